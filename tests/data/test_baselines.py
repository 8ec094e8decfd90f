"""Byte baselines against the same formulas written out."""

import math

import pytest

from jaxformer.data import ByDocument, Bytes, Characters, Files, Text, open_data
from jaxformer.data.baselines import BOUNDARY, PairCounter
from jaxformer.data.splits import divide

pytestmark = pytest.mark.quick
TEXTS = [f'the {"quick brown" if i % 3 else "lazy"} fox {i} jumps über' for i in range(40)]


def naive(train, validation, ends, bigram):
  """Bits per byte, by dictionaries of counts."""
  symbols = 257 if ends else 256
  unigram, pairs = [0] * 257, {}
  for text in train:
    for a, b in zip([BOUNDARY, *text.encode()], [*text.encode(), BOUNDARY]):
      if b < symbols:
        unigram[b] += 1
        pairs.setdefault(a, {}).setdefault(b, 0)
        pairs[a][b] += 1
  total = sum(unigram)
  bits = count = 0
  for text in validation:
    count += len(text.encode())
    for a, b in zip([BOUNDARY, *text.encode()], [*text.encode(), BOUNDARY]):
      if b >= symbols:
        continue
      p = (unigram[b] + 1) / (total + symbols)
      if bigram and a in pairs:
        p = (pairs[a].get(b, 0) + len(pairs[a]) * p) / (sum(pairs[a].values()) + len(pairs[a]))
      bits -= math.log2(p)
  return bits / count


@pytest.mark.parametrize(('tokenizer', 'ends'), [(Bytes(), True), (Characters(), False)])
def test_baselines_are_the_stated_formulas(corpus, tokenizer, ends):
  source, split = Files(path=corpus(TEXTS)), ByDocument(fraction=0.3)
  data = open_data(Text(corpus=source, tokenizer=tokenizer, split=split, sequence_length=8))
  pieces = list(divide(source.rows, split, '')[1])
  unigram, bigram = data.baselines().values()
  train, validation = ([p.texts[0] for p in pieces if p.side == s] for s in ('train', 'validation'))
  assert unigram == pytest.approx(naive(train, validation, ends, bigram=False), rel=1e-12)
  assert bigram == pytest.approx(naive(train, validation, ends, bigram=True), rel=1e-12)
  assert bigram < unigram < 8


def test_pieces_count_as_the_whole(monkeypatch):
  whole, parts = PairCounter(), PairCounter()
  whole.add([(b'abcdef', True, True), (b'xy', True, True)])
  monkeypatch.setattr('jaxformer.data.baselines.SLICE', 2)
  parts.add([(b'ab', True, False)])
  parts.add([(b'c', False, False), (b'def', False, True)])
  parts.add([(b'xy', True, True)])
  assert (whole.pairs == parts.pairs).all()
  assert whole.pairs.sum() == 7 + 3
