"""Mixtures are divided as a whole: no document is on both sides, whatever its corpora are."""

import random

import pytest

from jaxformer.config import InputError
from jaxformer.data import (
  ByDocument,
  ByPosition,
  BytePairs,
  Files,
  Mixture,
  Text,
  open_data,
  training_texts,
)
from jaxformer.data import cache as data_cache

pytestmark = pytest.mark.quick
WORDS = ['alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta']
CHOICE = random.Random(4)
DOCUMENTS = [' '.join(CHOICE.choices(WORDS, k=50)) for _ in range(200)]


def texts(columns) -> list[str]:
  """The documents of one side, decoded from bytes."""
  return [bytes(c.ids(row)[:-1].astype('uint8')).decode() for c in columns for row in range(c.rows)]


def mixed(*paths, **fields) -> Text:
  corpora = tuple(Files(path=path) for path in paths)
  return Text(corpus=Mixture(corpora=corpora), **{'sequence_length': 32} | fields)


@pytest.fixture
def large(corpus) -> str:
  return corpus(DOCUMENTS, 'large.jsonl')


@pytest.mark.parametrize('fraction', [0.05, 0.001, 0.3])
def test_no_document_is_on_both_sides(corpus, large, fraction):
  """A part of a few documents of another part, to give them a higher weight."""
  for t in range(6):
    small = corpus(DOCUMENTS[t * 5 : t * 5 + 5], f'{t}.jsonl')
    opened = open_data(mixed(large, small, split=ByDocument(fraction=fraction)))
    train, validation = texts(opened._train), texts(opened._validation)
    assert validation
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 205


def test_parts_of_few_documents_alone_have_one_bound(corpus):
  """Where the whole mixture has no document below the fraction, the nearest of all is validation
  text, with its copies in every part."""
  paths = [corpus(DOCUMENTS[i : i + 4], f'{i}.jsonl') for i in range(3)]
  opened = open_data(mixed(*paths, split=ByDocument(fraction=1e-9)))
  train, validation = texts(opened._train), texts(opened._validation)
  assert len(set(validation)) == 1
  assert not set(train) & set(validation)


def test_a_part_without_validation_text_is_scored_by_the_others(corpus, large):
  alone = open_data(Text(corpus=Files(path=large), sequence_length=32))
  outside = corpus([d for d in DOCUMENTS if d not in texts(alone._validation)][:1], 'one.jsonl')
  opened = open_data(mixed(large, outside))
  assert texts(opened._validation) == texts(alone._validation)
  assert opened.validation_rows == alone.validation_rows
  assert [side['documents'] for side in opened.manifest['validation']] == [
    len(opened._validation[0].starts_R1) - 1,
    0,
  ]
  assert sum((b.targets_BT >= 0).sum() for b in opened.validation_batches(8)) > 0
  assert opened.train_batch(0, 4, 0).inputs.shape == (4, 32)
  assert open_data(mixed(large, outside)).identity == opened.identity


def test_a_part_without_training_text_is_an_error(corpus, large):
  alone = open_data(Text(corpus=Files(path=large), sequence_length=32))
  held_out = corpus(texts(alone._validation)[:2], 'held-out.jsonl')
  problem = r'all its documents are on the validation side; ByDocument\.fraction'
  with pytest.raises(InputError, match=rf'Files \S*held-out\.jsonl: {problem}'):
    open_data(mixed(large, held_out))


def test_a_part_without_text_is_named(corpus, large):
  with pytest.raises(InputError, match=r'^Files \S*empty\.jsonl: the corpus holds no text'):
    open_data(mixed(large, corpus([], 'empty.jsonl')))


def test_parts_share_the_cache_of_the_corpus_alone(corpus, large, cache):
  lines = []
  open_data(Text(corpus=Files(path=large), sequence_length=32), log=lines.append)
  assert len(lines) == 3
  open_data(mixed(large, corpus(DOCUMENTS[:50], 'b.jsonl')), log=lines.append)
  assert len(lines) == 6
  open_data(mixed(large, large), log=lines.append)
  assert len(lines) == 6


def test_a_corpus_alone_is_divided_as_ever(corpus, large):
  """And in a mixture of large corpora too."""
  alone = open_data(Text(corpus=Files(path=large), sequence_length=32))
  opened = open_data(mixed(large, corpus([f'{d}!' for d in DOCUMENTS], 'b.jsonl')))
  assert opened.identity['train'][0] == alone.identity['train'][0]
  assert opened.identity['validation'][0] == alone.identity['validation'][0]


@pytest.mark.parametrize('split', [ByDocument(fraction=0.2), ByPosition()])
def test_a_tokenizer_is_trained_on_the_training_side_of_every_part(corpus, split):
  paths = [corpus([f'{k} {d}' for d in DOCUMENTS[:40]], f'{k}.jsonl') for k in 'ab']
  data = mixed(*paths, split=split)
  opened = open_data(data)
  used = list(training_texts(data.corpus, split, (0,)))
  whole = {t for t in texts(opened._train) if t in {f'{k} {d}' for k in 'ab' for d in DOCUMENTS}}
  assert whole <= set(used)
  assert not set(used) & set(texts(opened._validation))
  assert open_data(data.replace(tokenizer=BytePairs(vocab_size=300))).vocab_size <= 300


def test_a_survey_that_is_cut_off_is_made_again(corpus, large, cache):
  data = mixed(large, corpus(DOCUMENTS[:5], 'b.jsonl'))
  first = open_data(data).identity
  for file in cache.glob('survey-*/survey.json'):
    file.write_text(file.read_text()[:9])
  assert open_data(data).identity == first


def test_files_that_change_while_they_are_read(corpus, large, monkeypatch):
  build = data_cache._build

  def changing(*args):
    build(*args)
    corpus(DOCUMENTS[:90], 'large.jsonl')

  monkeypatch.setattr(data_cache, '_build', changing)
  with pytest.raises(
    InputError, match=r'Files \S*large\.jsonl: its files changed while they were read'
  ):
    open_data(Text(corpus=Files(path=large), sequence_length=32))
