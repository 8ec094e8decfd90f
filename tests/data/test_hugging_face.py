"""Datasets of the Hub and local files in its formats: what they read, and what identifies them."""

import sys
import types

import pytest

from jaxformer.config import InputError
from jaxformer.data import HuggingFace, Text, hugging_face, open_data

pytestmark = pytest.mark.quick
COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def library(monkeypatch):
  """Stands for `datasets`: what it was asked for, and the rows that it gives."""
  asked = types.SimpleNamespace(rows=[{'text': f'document {i} ' * 9} for i in range(60)], with_=[])

  def load_dataset(name, config, *, split, revision, data_files, streaming):
    assert streaming
    asked.with_.append((name, config, split, revision, data_files))
    if name == 'some/missing':
      raise ConnectionError('no route\nto host')
    return iter(asked.rows)

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  return asked


@pytest.fixture
def hub(monkeypatch):
  """Stands for the Hub: the commits of revisions."""
  commits = {None: COMMIT}

  class HfApi:
    def dataset_info(self, name, revision, timeout):
      return types.SimpleNamespace(sha=commits[revision])

  hugging_face._commit_of.cache_clear()
  monkeypatch.setattr('huggingface_hub.HfApi', HfApi)
  yield commits
  hugging_face._commit_of.cache_clear()


def test_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(
    InputError,
    match=r"needs the package 'datasets'; install the extra: pip install 'jaxformer\[hf\]'",
  ):
    list(HuggingFace(name='some/name', revision=COMMIT).rows())


def test_streams_a_commit_and_wraps_errors(library, hub):
  library.rows = [{'content': f'row {i}'} for i in range(9)]
  corpus = HuggingFace(name='some/name', config='en', text_field='content', max_documents=2)
  assert [row.texts[0] for row in corpus.rows()] == ['row 0', 'row 1']
  assert library.with_ == [('some/name', 'en', 'train', COMMIT, None)]
  with pytest.raises(InputError, match=r'ConnectionError: no route$'):
    list(HuggingFace(name='some/missing').rows())
  with pytest.raises(InputError, match=r"row 1: no field 'text'.*content.*on_bad_row = skip"):
    list(HuggingFace(name='some/name').rows())


def test_rows_without_text_are_errors_or_skipped(library, hub):
  library.rows = [{'text': 'a'}, {'text': None}, {}, {'text': 3}, {'text': 'b'}]
  with pytest.raises(InputError, match=r"some/name row 2: field 'text' is null"):
    list(HuggingFace(name='some/name').rows())
  rows = list(HuggingFace(name='some/name', on_bad_row='skip').rows())
  assert [row.texts for row in rows if not row.problem] == [('a',), ('b',)]
  assert sum(bool(row.problem) for row in rows) == 3


def test_a_dataset_is_identified_by_its_commit(hub):
  first = HuggingFace(name='some/name')
  assert first.manifest()['commit'] == COMMIT
  assert first.fingerprint() == HuggingFace(name='some/name', revision=COMMIT).fingerprint()
  hub['v2'] = COMMIT[::-1]
  assert HuggingFace(name='some/name', revision='v2').fingerprint() != first.fingerprint()


def test_a_commit_that_cannot_be_looked_up(hub):
  with pytest.raises(InputError, match=r'revision = .*v3.*looked up.*give one of 40 hex digits'):
    HuggingFace(name='some/name', revision='v3').fingerprint()
  HuggingFace(name='some/name', revision=COMMIT).fingerprint()  # no look-up


@pytest.mark.parametrize('pattern', ['a.jsonl', '*.jsonl', '**/*.jsonl', '.'])
def test_local_files_are_identified_by_content(tmp_path, library, pattern):
  """Tokens of a pattern of files are made again when a file changes."""
  path = tmp_path / 'texts' / 'a.jsonl'
  path.parent.mkdir()
  path.write_text('one')
  corpus = HuggingFace(name='json', data_files=(f'{tmp_path}/texts/{pattern}',))
  lines = []
  for text, built in (('one', True), ('one', False), ('two', True)):
    path.write_text(text)
    library.rows = [{'text': f'{text} {i} ' * 9} for i in range(60)]
    lines.clear()
    data = open_data(Text(corpus=corpus, sequence_length=16), log=lines.append)
    assert bool(lines) == built
    assert text in data.tokenizer.decode(data.train_batch(0, 1, 0).inputs[0])
  with pytest.raises(InputError, match=r"data_files = .*: no file matches '.*nothing'"):
    HuggingFace(name='json', data_files=(f'{tmp_path}/*.nothing',)).fingerprint()


def test_a_local_folder_is_identified_by_content_and_not_by_its_place(tmp_path):
  for name, text in (('a', 'one'), ('b', 'one'), ('c', 'two')):
    (tmp_path / name / 'data').mkdir(parents=True)
    (tmp_path / name / 'data' / 'train.jsonl').write_text(text)
  first, second, third = (HuggingFace(name=str(tmp_path / n)).fingerprint() for n in 'abc')
  assert first == second != third
  inside = Text(corpus=HuggingFace(name=str(tmp_path / 'a')), sequence_length=16)
  with pytest.raises(InputError, match=r'HuggingFace\.name = .*contains the cache folder'):
    open_data(inside, cache_dir=tmp_path / 'a' / 'cache')
  files = HuggingFace(name=str(tmp_path / 'a'), data_files=('data/*.jsonl',)).files()
  assert list(files) == ['data/train.jsonl', '0/train.jsonl']


def test_remote_files_are_identified_by_their_address():
  first, second = (
    HuggingFace(name='json', data_files=(f'https://host/{n}.jsonl',)).fingerprint() for n in 'ab'
  )
  assert first != second
