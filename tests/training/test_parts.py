"""Run folders with parts that a run does not write: what stands where a file or a folder should,
and lines that are no rows."""

import os

import pytest

from jaxformer.config import InputError
from jaxformer.training.rows import read_events, read_metrics
from jaxformer.training.run import Run
from tests.e2e.program import contents


def a_file(path):
  path.write_text('')


def a_link_to_nothing(path):
  path.symlink_to('nowhere')


@pytest.mark.quick
@pytest.mark.parametrize(
  ('part', 'make', 'kind'),
  [
    ('', a_file, 'folder'),
    ('', a_link_to_nothing, 'folder'),
    ('checkpoints', a_link_to_nothing, 'folder'),
    ('checkpoints/4', a_file, 'folder'),
    ('tokenizer', a_file, 'folder'),
    ('undone', a_file, 'folder'),
    ('events.jsonl', os.mkfifo, 'file'),
    ('metrics.jsonl', os.mkdir, 'file'),
    ('samples.txt', os.mkdir, 'file'),
    ('environment.json', os.mkfifo, 'file'),
    ('lock.json', os.mkfifo, 'file'),
    ('config.json', os.mkdir, 'file'),
  ],
)
def test_a_part_of_another_kind_is_refused_before_anything_is_written(
  part, make, kind, experiment, tmp_path
):
  path = tmp_path / 'run' / part
  path.parent.mkdir(parents=True, exist_ok=True)
  make(path)
  before = contents(tmp_path)
  with pytest.raises(InputError) as e:
    Run(experiment())
  assert str(e.value).startswith(f'{path}: must be a {kind}')
  assert contents(tmp_path) == before


@pytest.mark.quick
@pytest.mark.parametrize(
  ('part', 'needed'),
  [
    ('', os.R_OK | os.W_OK | os.X_OK),
    ('checkpoints/4', os.R_OK | os.W_OK | os.X_OK),
    ('metrics.jsonl', os.R_OK | os.W_OK),
  ],
)
def test_a_part_without_permission_is_refused(part, needed, experiment, tmp_path, monkeypatch):
  path, access = tmp_path / 'run' / part, os.access
  (tmp_path / 'run' / 'checkpoints' / '4').mkdir(parents=True)
  (tmp_path / 'run' / 'metrics.jsonl').write_text('')
  monkeypatch.setattr(os, 'access', lambda p, mode: (p, mode) != (path, needed) and access(p, mode))
  with pytest.raises(InputError) as e:
    Run(experiment())
  assert str(e.value).startswith(f'{path}: permission denied')


@pytest.mark.quick
@pytest.mark.parametrize('there', [[], ['a/b/run'], ['a/b/run/checkpoints']])
def test_a_run_that_is_not_started_leaves_nothing_behind(there, experiment, tmp_path):
  for folder in there:
    (tmp_path / folder).mkdir(parents=True)
  before = contents(tmp_path)
  with Run(experiment('a/b/run')) as run:
    run.lock()
    assert (run.home / 'lock.json').exists()
  assert contents(tmp_path) == before


ODD = b"""{"step": 1, "train/loss": 2.5, "eval/source": "x"}
{"step": 2, "eval/loss": null}
{"step": "3"}
{"step": -1}
{"step": true}
{"step": 1e400}
{"step": 99999999999999999999}
{"step": 4, "eval/loss": "x"}
{"step": 4, "eval/loss": NaN}
{"step": 4, "eval/source": 3}
[1]
"x"
{"event": "start", "step": 1, "init_from": null}
{"event": 3}
{"event": "st"""


@pytest.mark.quick
def test_lines_that_are_no_rows_are_left_out(tmp_path):
  odd = b'\n'.join([ODD, b'\xff\xfe', b'\0', b'[' * 100_000, b'{"step": ' + b'9' * 5000 + b'}'])
  (tmp_path / 'metrics.jsonl').write_bytes(odd)
  (tmp_path / 'events.jsonl').write_bytes(odd)
  rows = [{'step': 1, 'train/loss': 2.5, 'eval/source': 'x'}, {'step': 2, 'eval/loss': None}]
  assert read_metrics(tmp_path) == rows
  assert [row['event'] for row in read_events(tmp_path)] == ['start']


@pytest.mark.quick
def test_the_next_folder_of_undone_steps_is_counted_by_those_that_are_numbers(experiment, tmp_path):
  run = Run(experiment())
  for name in ('x', '2', '²'):
    (tmp_path / 'run' / 'undone' / name).mkdir(parents=True)
  (tmp_path / 'run' / 'config.json').write_text('{}')
  run._go_back(4)
  assert (tmp_path / 'run' / 'undone' / '3' / 'config.json').read_text() == '{}'
