"""`environment.json`: what is known of each start, written once."""

import json
import subprocess

import pytest

from jaxformer.data import Files
from jaxformer.data.dataset import open_data
from jaxformer.installation import Installation, commit_of
from jaxformer.training import environment
from jaxformer.training.environment import starts, with_start
from jaxformer.training.run import Run
from tests.training.conftest import DATA

pytestmark = pytest.mark.quick


def test_a_start_like_the_one_before_adds_its_time_and_step(experiment, tmp_path):
  for i in range(100):
    (tmp_path / f'{i}.txt').write_text(f'text {i}\n' * 20)
  data = DATA.replace(corpus=Files(path=str(tmp_path / '*.txt')))
  dataset = open_data(data, cache_dir=tmp_path / 'cache')
  e = experiment().replace(data=data)
  file, sizes = tmp_path / 'run' / 'environment.json', []
  for step in (0, 4, 8):
    with Run(e) as run:
      run.lock()
      run.resume_at(step)
      run.start(dataset.manifest, dataset.tokenizer)
    sizes.append(file.stat().st_size)
  first, *others = json.loads(file.read_text())
  assert len(first['data']['corpus']['files']) == 100
  assert [set(entry) for entry in others] == [{'time', 'step'}] * 2
  assert [entry['step'] for entry in (first, *others)] == [0, 4, 8]
  assert sizes[2] - sizes[0] < 200
  known = starts([first, *others])
  assert known[2] | {'time': 0, 'step': 0} == known[0] | {'time': 0, 'step': 0}


def test_what_differs_is_in_the_entry_and_lists_are_written_once():
  data = [{'files': ['a'] * 9}, {'files': ['b'] * 9}]
  given = [
    {'time': 'first', 'step': 0, 'cpus': 2, 'commit': None, 'data': data[0], 'code': [1]},
    {'time': 'second', 'step': 4, 'cpus': 8, 'commit': None, 'data': data[1]},
    {'time': 'third', 'step': 6, 'cpus': 8, 'commit': 'abc', 'data': data[0]},
    {'time': 'fourth', 'step': 6, 'cpus': 8, 'commit': 'abc', 'data': data[0]},
  ]
  entries = []
  for start in given:
    entries = with_start(entries, start)
  assert entries == [
    given[0],
    {'time': 'second', 'step': 4, 'cpus': 8, 'data': data[1], 'code': None},
    {'time': 'third', 'step': 6, 'commit': 'abc', 'data': {'as_at_start': 1}},
    {'time': 'fourth', 'step': 6},
  ]
  assert starts(entries) == [{k: v for k, v in s.items() if v is not None} for s in given]


def test_entries_of_earlier_versions_are_complete():
  old = [{'time': 'a', 'cpus': 2, 'code': [1]}, {'time': 'b', 'cpus': 2}]
  entries = with_start(old, {'time': 'c', 'step': 3, 'cpus': 2})
  assert entries == [*old, {'time': 'c', 'step': 3}]
  assert starts(entries)[1:] == [{'time': 'b', 'cpus': 2}, {'time': 'c', 'step': 3, 'cpus': 2}]
  # changed by somebody
  broken = [1, {'data': {'as_at_start': 7}}, {'step': 1, 'data': {'as_at_start': 'x'}}]
  assert len(with_start(broken, {'time': 'c', 'step': 3})) == 3


def test_the_commit_is_that_of_the_package_alone(tmp_path, monkeypatch):
  def git(*words):
    command = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  inside = tmp_path / '.venv' / 'site-packages'
  inside.mkdir(parents=True)
  git('init', '-q')
  git('commit', '-q', '--allow-empty', '-m', 'project of a user')
  commit = git('rev-parse', 'HEAD')
  assert [commit_of(p) for p in (tmp_path, inside, tmp_path / 'no')] == [commit, None, None]
  monkeypatch.setattr(environment, 'FOLDER', inside)
  for found, recorded in (
    (Installation('1'), None),
    (Installation('1', origin='https://host/jaxformer-1-py3-none-any.whl'), None),
    (Installation('1', origin='git+https://host/jaxformer@abc'), 'abc'),
    (Installation('1', checkout=inside), None),
    (Installation('1', checkout=tmp_path), commit),
  ):
    monkeypatch.setattr(environment, 'installation', lambda found=found: found)
    assert environment.environment({})['commit'] == recorded
