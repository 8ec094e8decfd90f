"""Which text `evaluate` scores a run on: from any folder that which the run holds out, and no other
without a word."""

import dataclasses
import shutil

import jax
import pytest

import jaxformer
from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data import Bytes, Files, Text, open_data
from jaxformer.data.local_paths import located
from jaxformer.training import load_experiment, train
from tests.training.conftest import make_experiment

ONE = jax.devices()[:1]


def write(folder, words):
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(40):
    text = ' '.join(words[(i * j) % len(words)] for j in range(1, 40))
    (folder / f'{i}.txt').write_text(text)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A folder with a run on the text of a relative path."""
  home = tmp_path_factory.mktemp('home')
  write(home / 'corpus', ('one', 'two', 'three', 'four', 'five'))
  with pytest.MonkeyPatch.context() as m:
    m.setenv('JAXFORMER_CACHE', str(home / 'cache'))
    m.chdir(home)
    e = make_experiment('runs', steps=2)
    e = e.replace(data=Text(corpus=Files(path='corpus'), tokenizer=Bytes(), sequence_length=32))
    train(e, dataset=open_data(e.data), devices=ONE, log=str)
  return home


@pytest.fixture
def run(made, tmp_path, monkeypatch):
  """A copy of the run, and a folder beside it with another text at the same path."""
  home = shutil.copytree(made, tmp_path / 'home')
  config = home / 'runs' / 'run' / 'config.json'
  config.write_text(config.read_text().replace(str(made), str(home)))
  write(tmp_path / 'far' / 'corpus', ('alpha', 'beta', 'gamma', 'delta'))
  monkeypatch.setenv('JAXFORMER_CACHE', str(home / 'cache'))
  monkeypatch.chdir(home)
  return home / 'runs' / 'run'


def test_it_is_the_text_of_the_run_from_any_folder(run, tmp_path, monkeypatch):
  score = jaxformer.evaluate('run')
  assert score.of_run
  monkeypatch.chdir(tmp_path / 'far')
  away = jaxformer.evaluate(str(run))
  assert away == score
  other = jaxformer.evaluate(str(run), overrides={'data.corpus.path': 'corpus'})
  assert not other.of_run
  assert other.loss != score.loss
  assert 'Files validation, which the run does not hold out: ' in other.lines()[0]
  assert (other.json()['of_run'], away.json()['of_run']) == (False, True)
  # where the path of the run names nothing, that of here counts, if it is the same text
  (tmp_path / 'home' / 'corpus').rename(tmp_path / 'moved')
  with pytest.raises(InputError, match='Files validation is not what the run holds out'):
    jaxformer.evaluate(str(run))
  (tmp_path / 'far' / 'corpus').rename(tmp_path / 'far' / 'old')
  (tmp_path / 'far' / 'corpus').symlink_to(tmp_path / 'moved')
  assert jaxformer.evaluate(str(run)) == score


def test_a_text_that_has_changed_is_refused_unless_it_is_named(run, capsys):
  for file in (run.parents[1] / 'corpus').iterdir():
    file.write_text(file.read_text() + ' more')
  refused = (
    r'run: Files validation is not what .* data.corpus.path = \S+/corpus was changed; .*--data'
  )
  with pytest.raises(InputError, match=refused):
    jaxformer.evaluate('run')
  with pytest.raises(InputError, match=refused):  # names no text
    jaxformer.evaluate('run', overrides={'data.sequence_length': 16})
  assert main(['eval', 'run', '--data.corpus.path', 'corpus']) == 0
  assert 'which the run does not hold out' in capsys.readouterr().out


def test_the_length_of_rows_is_no_other_text(run):
  shorter = jaxformer.evaluate('run', overrides={'data.sequence-length': 16})
  assert shorter.of_run
  model = dataclasses.replace(jaxformer.load('run'), validation_sha256=None)  # unknown
  assert model.evaluate().of_run is None


def test_a_run_resumes_from_another_spelling_of_its_path(run):
  e = load_experiment(run)
  assert e.data.corpus.path == str(run.parents[1] / 'corpus')
  for path in (e.data.corpus.path, './corpus', 'corpus'):
    named = e.replace(
      data=e.data.replace(corpus=Files(path=path)), training=e.training.replace(steps=3)
    )
    assert train(named, dataset=open_data(named.data), devices=ONE, log=str).step == 3
  (run.parents[1] / 'copy').symlink_to(run.parents[1] / 'corpus')
  with pytest.raises(InputError, match=r'data.corpus.path: .* -> "copy"'):
    train(named.replace(data=e.data.replace(corpus=Files(path='copy'))), log=str)


def test_a_folder_without_a_run_does_not_hide_a_run_of_its_name(run):
  (run.parents[1] / 'run').mkdir()
  assert jaxformer.load('run').step == 2
  (run.parents[1] / 'llama3-tiny').mkdir()
  assert jaxformer.load('llama3-tiny').step is None


def test_what_names_nothing_stays_as_it_is(tmp_path):
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'a.jsonl').touch()
  data = {
    'type': 'Mixture',
    'corpora': [
      {'type': 'Files', 'path': 'x'},
      {'type': 'Files', 'path': 'x/*.jsonl'},
      {'type': 'Files', 'path': 'gone'},
      {'type': 'Files', 'path': '~/x'},
      {'type': 'HuggingFace', 'name': 'json', 'data_files': ['x/a.jsonl', 'hub/x.jsonl']},
    ],
  }
  texts = [list(c.values())[1:] for c in located(data, str(tmp_path))['corpora']]
  assert texts == [
    [f'{tmp_path}/x'],
    [f'{tmp_path}/x/*.jsonl'],
    ['gone'],
    ['~/x'],
    ['json', [f'{tmp_path}/x/a.jsonl', 'hub/x.jsonl']],
  ]
  assert located(data, None) == data
