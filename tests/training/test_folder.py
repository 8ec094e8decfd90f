"""Runs whose folder is in a bucket. Memory stands in for the store; checkpoints, which Orbax writes
by a client of its own, stay on disk here and are tried against a server in
tests/e2e/test_bucket.py."""

import json
import logging
import os
import signal
import tempfile

import fsspec.config
import jax
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from jaxformer.config import InputError
from jaxformer.data import load_tokenizer
from jaxformer.exit_codes import Failure
from jaxformer.training import TensorBoard, load_experiment, lock, train
from jaxformer.training.checkpoint import Checkpoints, steps_in
from jaxformer.training.paths import local_copy, move, remove, to_path
from jaxformer.training.run import Run, read_metrics, run_folder
from tests.tiers import thorough
from tests.training.compare import curve
from tests.training.conftest import make_experiment

ONE = jax.devices()[:1]
DIR = 'gs://bucket/runs'


@pytest.fixture
def store(monkeypatch, tmp_path):
  """A store in memory with one bucket, that may be told to fail; temporary folders of runs are made
  in the test's own."""

  class Store(MemoryFileSystem):
    protocol = ('gs', 'gcs')
    store, pseudo_dirs = {}, ['', '/bucket']
    cachable = False
    failures = []

    @classmethod
    def _strip_protocol(cls, path):
      return '/' + path.removeprefix('gs://').strip('/') if path.strip('/') else ''

    def _open(self, path, mode='rb', **more):
      if self.failures and mode == 'wb':
        raise self.failures.pop()
      if mode == 'wb' and not path.startswith('/bucket/'):
        raise FileNotFoundError(path)
      return super()._open(path, mode, **more)

  store = Store()
  for name in Store.protocol:
    monkeypatch.setitem(_registry, name, Store)
  monkeypatch.setattr(backend._FileSystemSpecBackend, '_get_filesystem', lambda self, name: store)
  monkeypatch.setattr(fsspec.config, 'conf', {})
  monkeypatch.setattr(logging.getLogger('gcsfs'), 'level', logging.NOTSET)
  scratch = tmp_path / 'scratch'
  scratch.mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(scratch))
  store.scratch = scratch
  monkeypatch.setattr(lock, 'SETTLING', 0.01)
  return store


def begun(store, dataset, name='one', **training):
  """A run in the bucket that has started."""
  run = Run(make_experiment(DIR, name, **training))
  run.lock()
  run.resume_at(0)
  run.start(dataset.manifest, dataset.tokenizer)
  return run


def test_a_run_killed_loses_what_followed_its_last_checkpoint(store, dataset, monkeypatch):
  run = begun(store, dataset)
  assert run.fresh
  assert run.folder == run_folder(run.experiment) == to_path(f'{DIR}/one')
  assert str(run.folder) == f'{DIR}/one'
  assert load_experiment(f'{DIR}/one') == run.experiment
  run.event('start')
  for step in (1, 2, 3):
    run.metrics({'step': step})
  run.samples(3, 'text')
  assert not (run.folder / 'metrics.jsonl').exists()
  run.sync()
  assert read_metrics(run.folder) == [{'step': 1}, {'step': 2}, {'step': 3}]
  run.metrics({'step': 4})
  assert len(read_metrics(f'{DIR}/one')) == 3
  del run  # killed, with its machine
  taken = 'another process trains in this folder'
  with Run(make_experiment(DIR, 'one')) as second, pytest.raises(InputError, match=taken):
    second.lock()

  monkeypatch.setattr(lock, '_machine', lambda: 'a new machine')
  monkeypatch.setattr(lock, 'PATIENCE', 0.2)
  with begun(store, dataset) as run:
    assert not run.fresh
    run.rewind(2)
    run.event('resume')
    run.metrics({'step': 3})
    run.samples(3, 'text')
    assert len(json.loads((run.folder / 'environment.json').read_text())) == 2
  assert read_metrics(run.folder) == [{'step': 1}, {'step': 2}, {'step': 3}]
  events = [
    json.loads(line)['event'] for line in (run.folder / 'events.jsonl').read_text().splitlines()
  ]
  assert events == ['start', 'resume']
  assert (run.folder / 'samples.txt').read_text().count('text') == 2
  with local_copy(run.folder / 'tokenizer') as folder:
    assert load_tokenizer(folder).fingerprint() == dataset.tokenizer.fingerprint()
  assert len(list(store.scratch.iterdir())) == 1  # of the run that was killed


def test_a_run_that_is_another_is_refused(store, dataset):
  with begun(store, dataset):
    pass
  with pytest.raises(
    InputError,
    match=r'gs://bucket/runs/one was created by a different experiment:\n  training.seed: 0 -> 1',
  ):
    Run(make_experiment(DIR, 'one', seed=1))
  (to_path(DIR) / 'two' / 'notes.txt').write_text('mine')
  with pytest.raises(InputError, match='gs://bucket/runs/two is not empty and not a run folder'):
    Run(make_experiment(DIR, 'two'))


@thorough
def test_trained_stopped_and_resumed_in_a_bucket_as_on_disk(
  store, experiment, dataset, monkeypatch, tmp_path
):
  disk = tmp_path / 'disk'

  def near(folder, *more):
    return Checkpoints(disk / folder.parent.name, *more)

  def stop(line):
    if line.startswith('step 6/') and 'lr' in line:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr('jaxformer.training.member.Checkpoints', near)
  remote = make_experiment(DIR, 'one', trackers=(TensorBoard(),), profile=(2, 4))
  first = train(remote, dataset=dataset, devices=ONE, log=stop, sample=lambda params, step: 'text')
  assert (first.exit_code, first.step) == (75, 7)
  assert (
    json.loads((first.folder / 'events.jsonl').read_text().splitlines()[-1])['event']
    == 'interrupted'
  )
  assert [r['step'] for r in read_metrics(first.folder) if 'train/loss' in r] == [
    1,
    2,
    3,
    4,
    5,
    6,
    7,
  ]
  second = train(remote, dataset=dataset, devices=ONE, log=lambda line: None)
  assert (second.exit_code, second.step) == (0, 12)
  whole = train(experiment('whole'), dataset=dataset, devices=ONE, log=lambda line: None)
  assert curve(second.folder) == curve(whole.folder)
  assert len(list((second.folder / 'tensorboard').iterdir())) == 2
  assert any('.xplane.pb' in name for name in store.find('gs://bucket/runs/one/profile'))
  assert (second.folder / 'samples.txt').read_text() == '==== step 4 ====\ntext\n'
  assert not list(store.scratch.iterdir())


def test_a_store_that_fails_once_is_tried_again(store, dataset):
  with begun(store, dataset) as run:
    run.metrics({'step': 1})
    store.failures.append(OSError('busy'))
    run.sync()
    assert read_metrics(run.folder) == []
    run.sync()
    assert read_metrics(run.folder) == [{'step': 1}]
    run.metrics({'step': 2})
    store.failures.extend([OSError('busy')] * 2)
    run.sync()
    with pytest.raises(Failure, match=r'gs://bucket/runs/one: cannot be reached \(OSError: busy\)'):
      run.sync()
  assert len(read_metrics(run.folder)) == 2


def test_an_error_on_its_way_out_is_the_one_to_be_seen(store, dataset):
  def fail(*problems):
    with begun(store, dataset) as run:
      run.event('start')
      store.failures.extend(problems)
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail(OSError('busy'))
  assert not (to_path(DIR) / 'one' / 'events.jsonl').exists()
  with pytest.raises(ZeroDivisionError):
    fail()
  assert 'start' in (to_path(DIR) / 'one' / 'events.jsonl').read_text()
  assert not list(store.scratch.iterdir())


def test_what_cannot_be_reached_is_said_before_anything_is_written(store, dataset, monkeypatch):
  with pytest.raises(InputError, match='gs://nowhere/runs/one: there is no bucket gs://nowhere'):
    Run(make_experiment('gs://nowhere/runs', 'one'))
  store.failures.append(PermissionError('no access\nfor you'))
  with pytest.raises(
    InputError,
    match=r'gs://bucket/runs/one: cannot be reached \(PermissionError: no access for you\)',
  ):
    train(make_experiment(DIR, 'one'), dataset=dataset, devices=ONE)
  assert not list(store.scratch.iterdir())
  assert Run(make_experiment(DIR, 'two')).fresh

  def refuse(path, **more):
    raise PermissionError('403')

  monkeypatch.setattr(store, 'info', refuse)
  monkeypatch.setattr(store, 'exists', refuse)
  with pytest.raises(
    InputError, match=r'gs://bucket/runs/one: cannot be reached \(PermissionError: 403\)'
  ):
    Run(make_experiment(DIR, 'one'))


@pytest.mark.quick
def test_checkpoints_in_a_bucket_count_once_they_are_marked_whole(store):
  home = to_path('gs://bucket/run/checkpoints')
  assert steps_in(home) == []
  for step in (2, 10):
    (home / str(step) / 'meta' / 'data.json').write_text('{}')
    (home / str(step) / 'commit_success.txt').write_text('')
  (home / '11' / 'meta' / 'data.json').write_text('{}')
  assert steps_in(home) == [2, 10]
  move(home / '10', home.parent / 'corrupt' / '10')
  assert steps_in(home) == [2]
  assert (home.parent / 'corrupt' / '10' / 'meta' / 'data.json').read_text() == '{}'
  remove(home / '2')
  remove(home / '3')
  assert steps_in(home) == []


@pytest.mark.quick
@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('s3://bucket/runs', "run.dir = 's3://bucket/runs': Orbax"),
    ('ftp://host/runs', "run.dir = 'ftp://host/runs': no such store"),
    ('gs:///runs', "run.dir = 'gs:///runs': names no bucket"),
  ],
)
def test_a_url_that_is_of_no_use(name, words):
  with pytest.raises(InputError) as e:
    run_folder(make_experiment(name))
  assert str(e.value).startswith(words)


@pytest.mark.quick
def test_without_the_package_the_extra_is_named(monkeypatch):
  def missing(name):
    raise ImportError('Please install gcsfs')

  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  with pytest.raises(InputError) as e:
    run_folder(make_experiment(DIR))
  assert (
    str(e.value) == "run.dir = 'gs://bucket/runs': needs gcsfs: pip install 'jaxformer[storage]'"
  )


@pytest.mark.quick
def test_a_local_path_stays_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert to_path('runs/one') == tmp_path / 'runs' / 'one'
  assert to_path('~/runs').is_absolute()
