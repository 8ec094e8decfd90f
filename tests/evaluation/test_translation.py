"""Scores of translations against formulas written out, and how they are put together."""

import collections
import dataclasses
import itertools
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.data import Batch, Dates, HeldOutPair, open_data
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.evaluation import evaluate, evaluate_translation, loss_by_source_length
from jaxformer.evaluation.translation import by_length, score
from jaxformer.models.model import ModelConfig
from jaxformer.task_type import TaskType

pytestmark = pytest.mark.quick
HYPOTHESES = [
  'the cat sat on the mat today',
  'a dog ran away from the big house',
  'he said yes to all of them',
]
REFERENCES = [
  'the cat sat on a mat today',
  'a dog ran far away from the house',
  'he said yes to all of them',
]


def ngrams(items, n):
  return collections.Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(hypotheses, references):
  """Papineni et al. 2002, equations of section 2.3, on words between spaces."""
  matched, total = np.zeros(4), np.zeros(4)
  for h, r in zip(hypotheses, references):
    for n in range(1, 5):
      have, want = ngrams(h.split(), n), ngrams(r.split(), n)
      matched[n - 1] += sum((have & want).values())
      total[n - 1] += sum(have.values())
  c, r = (sum(len(t.split()) for t in texts) for texts in (hypotheses, references))
  return 100 * min(1.0, math.exp(1 - r / c)) * math.exp(np.log(matched / total).mean())


def chrf(hypotheses, references):
  """Popovic 2015, equation 1 with beta 2: precision and recall of character n-grams, each the mean
  over n up to 6; spaces are left out and counts are those of the corpus."""
  rates = []
  for n in range(1, 7):
    have, want = (
      [ngrams(t.replace(' ', ''), n) for t in texts] for texts in (hypotheses, references)
    )
    hits = sum(sum((a & b).values()) for a, b in zip(have, want))
    rates.append([hits / sum(sum(c.values()) for c in counts) for counts in (have, want)])
  p, r = np.mean(rates, axis=0)
  return 100 * 5 * p * r / (4 * p + r)


def test_scores_are_those_of_the_papers():
  pytest.importorskip('sacrebleu')
  found = score(HYPOTHESES, REFERENCES)
  assert (found.pairs, found.exact, found.exact_match) == (3, 1, pytest.approx(1 / 3))
  assert found.metrics['BLEU'].value == pytest.approx(bleu(HYPOTHESES, REFERENCES), abs=1e-6)
  assert found.metrics['chrF'].value == pytest.approx(chrf(HYPOTHESES, REFERENCES), abs=1e-6)
  assert found.metrics['BLEU'].interval is None
  assert found.metrics['BLEU'].signature.startswith(
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:'
  )
  assert 'nc:6|nw:0|space:no' in found.metrics['chrF'].signature
  perfect = score(REFERENCES, REFERENCES)
  assert (perfect.exact_match, perfect.metrics['BLEU'].value, perfect.metrics['chrF'].value) == (
    1.0,
    pytest.approx(100),
    pytest.approx(100),
  )


def test_intervals_are_those_of_resampling_and_repeat():
  pytest.importorskip('sacrebleu')
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(list('abcdefgh'), 12)) for _ in range(40)]
  wrong = [t if i % 3 else t.replace('a', 'b').replace('c', 'd') for i, t in enumerate(texts)]
  found = score(wrong, texts, bootstrap=500)
  assert found == score(wrong, texts, bootstrap=500)
  assert 'bs:500|seed:12345' in found.metrics['BLEU'].signature
  resampled = []
  for _ in range(500):
    index = rng.integers(0, 40, 40)
    resampled.append(bleu([wrong[i] for i in index], [texts[i] for i in index]))
  low, high = np.quantile(resampled, [0.025, 0.975])
  # two sets of resamples
  assert found.metrics['BLEU'].interval == pytest.approx((high - low) / 2, rel=0.25)
  assert score([''] * 3, REFERENCES, bootstrap=10).metrics['BLEU'].interval == 0.0


def test_groups_by_length_partition_the_pairs():
  lengths = [9, 3, 5, 7, 3, 12, 30]
  texts = [f'number {i} of a few' for i in range(7)]
  groups = by_length(texts, [*texts[:6], 'other'], lengths, edges=[4, 8, 20])
  assert [(*lengths, s.pairs, s.exact) for lengths, s in groups.items()] == [
    (3, 3, 2, 2),
    (5, 7, 2, 2),
    (9, 12, 2, 2),
    (30, 30, 1, 0),
  ]
  quarters = by_length(texts, texts, lengths)
  assert sum(s.pairs for s in quarters.values()) == 7
  assert all(a[1] < b[0] for a, b in itertools.pairwise(quarters))
  assert len(by_length(texts, texts, [5] * 7)) == 1
  with pytest.raises(InputError, match='ascending'):
    by_length(texts, texts, lengths, edges=[8, 4])


def test_translations_end_at_the_first_end_and_are_decoded():
  pairs = [
    HeldOutPair(np.array([*s.encode(), 256], np.int32), s, s.upper())
    for s in ('ab', 'a longer one', 'cde')
  ]
  outputs = [
    [*p.reference.encode(), 256, 65, 66] if i != 1 else np.frombuffer(b'WRONG', np.uint8)
    for i, p in enumerate(pairs)
  ]
  result = evaluate_translation(outputs, pairs, ByteTokenizer(), edges=[3], bootstrap=None)
  assert result.hypotheses == ['AB', 'WRONG', 'CDE']
  assert {lengths: s.exact for lengths, s in result.by_length.items()} == {(2, 3): 2, (12, 12): 0}
  value = result.json()
  assert (value['pairs'], value['exact_match']) == (3, pytest.approx(2 / 3))
  assert [g['longest'] for g in value['by_source_length']] == [3, 12]
  assert result.lines()[0].startswith('3 translations: exact match 66.67%')
  with pytest.raises(ValueError, match='2 translations of 3'):
    evaluate_translation([[], []], pairs, ByteTokenizer())
  with pytest.raises(InputError, match='no pairs'):
    evaluate_translation([], [], ByteTokenizer())


def test_without_sacrebleu_there_are_exact_matches(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
  data = open_data(Dates(test_sequences=50))
  pairs = data.held_out_pairs()
  result = evaluate_translation(
    [data.tokenizer.encode(p.reference) for p in pairs], pairs, data.tokenizer
  )
  assert (result.scores.exact_match, result.scores.metrics) == (1.0, {})
  assert result.json()['bleu'] is None
  assert result.lines()[-1].endswith("pip install 'jaxformer[translation]'")


@pytest.mark.parametrize(
  ('hypotheses', 'references', 'bootstrap', 'message'),
  [
    ([], [], None, '0 translations'),
    (['a'], ['a', 'b'], None, '1 translations and 2 references'),
    (['a'], ['a'], 1, 'at least 2'),
  ],
)
def test_scores_of_nothing(hypotheses, references, bootstrap, message):
  with pytest.raises(InputError, match=message):
    score(hypotheses, references, bootstrap)


# ---- losses of pairs ---------------------------------------------------------------------------


class Sizes(ModelConfig, abstract=True):
  vocab_size: int = 257
  source_vocab_size: int = 257
  context_length: int = 64
  width: int = 1

  @property
  def task(self):
    return TaskType(
      inputs='pairs', vocab_size=self.vocab_size, source_vocab_size=self.source_vocab_size
    )


@dataclasses.dataclass(frozen=True)
class CountsSource:
  """A model whose loss at every target is the number of tokens in the source."""

  config: Sizes

  def merge(self, params):
    return self

  def scores(self, batch):
    length_B = (batch.source_BS >= 0).sum(1)
    wanted_BT = batch.targets_BT >= 0
    return jnp.where(wanted_BT, length_B[:, None].astype(jnp.float32), 0.0), wanted_BT


def test_losses_of_pairs_are_summed_over_the_targets_of_every_bucket():
  data = open_data(Dates(test_sequences=30))
  pairs = data.held_out_pairs()
  want = sum(len(p.source_ids) * (len(p.reference) + 1) for p in pairs)
  for batch_size in (30, 16):
    r = evaluate(
      CountsSource(Sizes()),
      {},
      data.validation_batches(batch_size),
      token_bytes_V=data.tokenizer.token_bytes,
    )
    assert r.nll_sum == pytest.approx(want)
    # the end of a document is a target without bytes
    assert (r.count, r.correct, r.bytes) == (30 * 11, 30 * 11, 30 * 10)
  whole = data.train_batch(0, 6, 0)
  short = Batch(*(a if a is None else a[:2] for a in whole))
  both = evaluate(CountsSource(Sizes()), {}, [whole, short])
  assert both.count == 8 * 11
  with pytest.raises(
    InputError, match='source tokens from -1 to 256: must be below the vocabulary of 100'
  ):
    evaluate(CountsSource(Sizes(source_vocab_size=100)), {}, [whole])


def test_losses_by_source_are_those_of_the_pairs_in_each_group():
  data = open_data(Dates(test_sequences=30))
  lengths = [len(p.source_ids) - 1 for p in data.held_out_pairs()]
  edges = [8, 11, 18]  # none is so short; none so long stands alone
  for batch_size in (30, 16):
    found = loss_by_source_length(
      CountsSource(Sizes()), {}, data.validation_batches(batch_size), edges
    )
    for low, high, r in zip([0, *edges], [*edges, 99], found, strict=True):
      mine = [n for n in lengths if low < n <= high]
      assert (r is None) == (not mine)
      if r is not None:
        assert (r.count, r.correct) == (11 * len(mine), 11 * len(mine))
        assert r.nll_sum == pytest.approx(sum(11 * (n + 1) for n in mine))
  assert found[0] is None
  assert sum(r.count for r in found[1:]) == 330
