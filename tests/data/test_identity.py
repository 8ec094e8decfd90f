"""Identity of data: by content, never by path, and of the validation rows alone."""

import json

import pytest

from jaxformer.data import Files, InductionHead, Mixture, Pairs, Text, Tsv, open_data

pytestmark = pytest.mark.quick
TEXTS = [f'document {i} ' * 9 for i in range(60)]


def opened(path, **fields):
  return open_data(Text(corpus=Files(path=path), **({'sequence_length': 16} | fields)))


def test_the_same_text_elsewhere_is_the_same_data(corpus, tmp_path):
  (tmp_path / 'other').mkdir()
  first, second = (opened(corpus(TEXTS, name)) for name in ('a.jsonl', 'other/b.jsonl'))
  assert first.identity == second.identity
  assert first.validation_sha256 == second.validation_sha256
  assert str(tmp_path) not in json.dumps(first.identity)


def test_the_validation_hash_follows_the_validation_rows_alone(corpus):
  first = opened(corpus(TEXTS))
  more = opened(corpus([*TEXTS, *(f'more {i}' for i in range(300))], 'more.jsonl'))
  assert opened(corpus(TEXTS), sequence_length=32).validation_sha256 == first.validation_sha256
  assert more.identity != first.identity
  assert more.validation_sha256 != first.validation_sha256
  mixture = Mixture(corpora=(Files(path=corpus(TEXTS)),) * 2)
  two = open_data(Text(corpus=mixture, sequence_length=16))
  assert two.validation_sha256 not in (first.validation_sha256, more.validation_sha256)


def test_pairs_and_tasks_have_one(tmp_path):
  hashes = []
  for word in ('eins', 'zwei'):
    (tmp_path / f'{word}.tsv').write_text(''.join(f'{i}\t{word} {i}\n' for i in range(60)))
    data = Pairs(
      corpus=Tsv(path=str(tmp_path / f'{word}.tsv')), source_lengths=(32,), target_lengths=(32,)
    )
    hashes.append(open_data(data).validation_sha256)
  tasks = [InductionHead(seed=seed, train_sequences=n) for seed, n in ((0, 9), (0, 10), (1, 9))]
  first, second, third = (open_data(t).validation_sha256 for t in tasks)
  assert first == second != third
  assert len({*hashes, first}) == 3
