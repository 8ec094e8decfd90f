"""Writes that fail: the run ends with one line that names the file and the reason, what it had
stays valid, and it is resumed bit for bit once there is room."""

import errno
import json
import os
import resource
import sys
import time

import jax
import pytest

from jaxformer.cli.main import main
from jaxformer.exit_codes import FAILED
from jaxformer.files import WriteError, append, write_atomically
from jaxformer.training import train
from jaxformer.training.checkpoint import SaveError, steps_in
from jaxformer.training.loop import _profiler
from jaxformer.training.rows import read_events
from jaxformer.training.run import Run
from tests.tiers import case
from tests.training.compare import assert_same

ONE = jax.devices()[:1]
FULL = os.strerror(errno.ENOSPC)


class Disk:
  """Lets writes to files with some name fail, after a part of the data was written."""

  def __init__(self, monkeypatch):
    self._write, self._sync = os.write, os.fsync
    monkeypatch.setattr(os, 'write', self.write)
    monkeypatch.setattr(os, 'fsync', self.sync)
    self.mend()

  def fail(self, name, code=errno.ENOSPC, *, syncs=False):
    self._name, self._code, self._syncs, self._began = name, code, syncs, False

  def mend(self):
    self.fail(None)

  def _fails(self, descriptor):
    return self._name and self._name in os.readlink(f'/proc/self/fd/{descriptor}')

  def write(self, descriptor, data):
    if self._syncs or not self._fails(descriptor):
      return self._write(descriptor, data)
    if self._began:
      raise OSError(self._code, os.strerror(self._code))
    self._began = True
    return self._write(descriptor, data[: len(data) // 2])

  def sync(self, descriptor):
    if self._syncs and self._fails(descriptor):
      raise OSError(self._code, os.strerror(self._code))
    self._sync(descriptor)


@pytest.fixture
def disk(monkeypatch):
  return Disk(monkeypatch)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, dataset):
  from tests.training.conftest import make_experiment

  return run(make_experiment(tmp_path_factory.mktemp('uninterrupted')), dataset)


def run(experiment, dataset, log=print):
  return train(
    experiment, dataset=dataset, devices=ONE, log=log, sample=lambda params, step: 'text'
  ).folder


@pytest.mark.parametrize(
  ('name', 'code', 'syncs', 'kept'),
  [
    ('metrics.jsonl', errno.ENOSPC, False, [4]),
    ('metrics.jsonl', errno.EIO, True, [4]),
    # the event of the checkpoint
    case('events.jsonl', errno.EDQUOT, False, [4, 8], standing=False),
    ('samples.txt', errno.EROFS, False, [4, 8]),
  ],
)
def test_a_run_that_cannot_write_is_resumed(
  experiment, dataset, uninterrupted, disk, name, code, syncs, kept
):
  def log(line):
    if line.startswith('step 7/') and 'lr' in line:
      disk.fail(name, code, syncs=syncs)

  e = experiment()
  folder = Run(e).folder
  with pytest.raises(WriteError) as failed:
    run(e, dataset, log)
  reason = f'{folder}/{name}: cannot be written ({os.strerror(code)})'
  assert str(failed.value) == reason
  assert steps_in(folder / 'checkpoints') == kept
  for file in ('metrics.jsonl', 'events.jsonl'):
    for line in (folder / file).read_text().splitlines():
      json.loads(line)
  disk.mend()
  assert_same(uninterrupted, run(e, dataset), 12)
  assert (folder / 'samples.txt').read_text() == (uninterrupted / 'samples.txt').read_text()


def test_a_checkpoint_that_cannot_be_written_in_the_background(
  experiment, dataset, uninterrupted, capfd
):
  """A limit on the size of files, which the small ones do not reach, stands in for the disk."""
  e, lines = experiment(), []
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)

  def log(line):
    lines.append(line)
    if line.startswith('step 7/') and 'lr' in line:
      until = time.monotonic() + 60
      while steps_in(Run(e).folder / 'checkpoints') != [4] and time.monotonic() < until:
        time.sleep(0.01)  # it is written in the background too, and would fail as well
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

  try:
    with pytest.raises(SaveError) as failed:
      run(e, dataset, log)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  folder = Run(e).folder
  reason = f'in {folder}/checkpoints: cannot be written ({os.strerror(errno.EFBIG)})'
  assert str(failed.value) == f'checkpoint 12 {reason} (the previous one failed too)'
  assert [text for text in lines if 'warning' in text] == [
    f'warning: checkpoint 8 {reason}; training continues, and the next checkpoint will be tried'
  ]
  assert steps_in(folder / 'checkpoints') == [4]
  assert_same(uninterrupted, run(e, dataset), 12)
  assert 'Traceback' not in capfd.readouterr().err


def begin(experiment, dataset):
  with Run(experiment) as opened:
    opened.lock()
    opened.resume_at(0)
    opened.start(dataset.manifest, dataset.tokenizer)
    opened.event('begun')
    return opened.folder


def content(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.quick
@pytest.mark.parametrize(
  'name', ['lock.json', 'tokenizer_kind.json', 'environment.json', 'config.json', 'events.jsonl']
)
def test_a_start_that_cannot_write_can_be_repeated(experiment, dataset, disk, name):
  e, changed = experiment(), experiment(log_every=2)
  where = f'tokenizer/{name}' if name.startswith('tokenizer') else name
  full = f'{Run(e).folder}/{where}: cannot be written ({FULL})'

  def fail(started):
    disk.fail(name)
    with pytest.raises(WriteError) as failed:
      begin(started, dataset)
    assert str(failed.value) == full
    disk.mend()

  fail(e)
  folder = begin(e, dataset)
  before = content(folder)
  fail(changed)
  after = content(folder)
  assert after.keys() == before.keys()
  written = {p.name for p in before if before[p] != after[p]}
  assert written <= {'config.json', 'environment.json'} - {name}
  begin(changed, dataset)
  assert [row['event'] for row in read_events(folder)] == ['begun', 'begun']


@pytest.mark.quick
def test_a_write_that_fails_changes_no_file_and_names_it(tmp_path, disk):
  file = tmp_path / 'file'
  file.write_text('old\n')
  disk.fail('file')
  for write in (append, write_atomically):
    with pytest.raises(OSError, match=FULL) as failed:
      write(file, 'new\n' * 100)
    assert (failed.value.filename, failed.value.errno) == (str(file), errno.ENOSPC)
    assert [p.read_text() for p in tmp_path.iterdir()] == ['old\n']
  disk.mend()
  append(file, 'new\n')
  assert file.read_text() == 'old\nnew\n'


@pytest.mark.quick
def test_a_line_that_a_crash_cut_short_takes_nothing_of_the_next(experiment, dataset):
  folder = begin(experiment(), dataset)
  for _ in range(2):
    with (folder / 'events.jsonl').open('a') as file:
      file.write('{"time": 1, "ev')
    begin(experiment(), dataset)
  assert [row['event'] for row in read_events(folder)] == ['begun'] * 3
  assert len((folder / 'events.jsonl').read_text().splitlines()) == 5


@pytest.mark.quick
def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: None)

  def stop():
    raise RuntimeError('RESOURCE_EXHAUSTED: file;\nNo space left')

  monkeypatch.setattr(jax.profiler, 'stop_trace', stop)
  lines = []
  with _profiler((1, 2), tmp_path / 'profile', lines.append) as profile:
    for step in range(4):
      profile(step)
  assert lines == [
    f'warning: {tmp_path}/profile has no complete profile (RESOURCE_EXHAUSTED: file; No space left)'
  ]


@pytest.mark.quick
def test_any_command_says_it_in_one_line(monkeypatch, capsys):
  def fail(code):
    def surroundings():
      raise OSError(code, os.strerror(code), 'report.html')

    monkeypatch.setattr(sys.modules[main.__module__], 'check_surroundings', surroundings)
    return main(['list'])

  assert fail(errno.ENOSPC) == FAILED
  assert capsys.readouterr() == ('', f'error: report.html: cannot be written ({FULL})\n')
  with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
    fail(errno.ENOTCONN)
