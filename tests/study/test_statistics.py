import math

import numpy as np
import pytest
from scipy import stats

from jaxformer.study.statistics import compare, compare_all, estimate, holm
from tests.tiers import thorough

pytestmark = pytest.mark.quick


def studies(seed, count, *, seeds, shift, shared=0.5, others=0):
  """Simulated studies of two architectures (and `others` that equal the first): the score of a run
  is noise of standard deviation 1, of which a part `shared` belongs to the seed."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    common = math.sqrt(shared) * rng.normal(size=seeds)

    def runs(shift, common=common):
      return dict(enumerate(shift + common + math.sqrt(1 - shared) * rng.normal(size=seeds)))

    yield {'a': runs(0.0), 'b': runs(shift)} | {f'c{i}': runs(0.0) for i in range(others)}


def verdicts(found):
  return {d.name: d.verdict for d in found}


def test_interval_is_students():
  x = [1.0, 2.0, 4.0]
  e = estimate(x)
  low, high = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
  assert (e.mean, e.low, e.high, e.runs) == (
    pytest.approx(7 / 3),
    pytest.approx(low),
    pytest.approx(high),
    3,
  )
  assert estimate([2.0]).low == -math.inf
  with pytest.raises(ValueError, match='at least one'):
    estimate([])


def test_intervals_cover():
  rng = np.random.default_rng(0)
  covered = sum(e.low <= 0 <= e.high for e in (estimate(rng.normal(size=4)) for _ in range(2000)))
  assert 0.93 < covered / 2000 < 0.97


def test_p_is_that_of_the_paired_test():
  a, b = {0: 1.0, 1: 2.0, 2: 3.5}, {0: 1.2, 1: 2.5, 2: 3.6, 3: 9.0}
  (d,) = compare({'a': a, 'b': b}, 'a')
  assert d.p == pytest.approx(stats.ttest_rel([1.2, 2.5, 3.6], [1.0, 2.0, 3.5]).pvalue)
  assert d.estimate.mean == pytest.approx(0.8 / 3)
  assert d.estimate.runs == 3  # the seed that one of them lacks is left out


@thorough
@pytest.mark.parametrize('shared', [0.0, 0.5])
@pytest.mark.parametrize('others', [0, 8])
def test_equal_models_seldom_differ_significantly(others, shared):
  """The chance of even one false verdict in a study, however many architectures it has, is 5 %."""
  clean = sum(
    set(verdicts(compare(s, 'a')).values()) == {'no significant difference'}
    for s in studies(1, 400, seeds=5, shift=0.0, others=others, shared=shared)
  )
  assert clean >= 0.9 * 400


@pytest.mark.parametrize('shared', [0.0, 0.5])
def test_a_difference_of_two_standard_deviations_is_found(shared):
  """With five seeds, at least half the time; better and worse are not mixed up."""
  for shift, word in ((-2.0, 'better'), (2.0, 'worse')):
    found = [
      verdicts(compare(s, 'a'))['b'] for s in studies(2, 300, seeds=5, shift=shift, shared=shared)
    ]
    assert found.count(word) >= 150
    assert set(found) <= {word, 'no significant difference'}


def test_counts_that_differ_by_the_same_by_chance():
  """Two accuracies of 128 answers each, both higher by 9: the interval has no width, and yet two
  seeds say next to nothing."""
  two = {'a': {0: 60 / 128, 1: 62 / 128}, 'b': {0: 69 / 128, 1: 71 / 128}}
  (found,) = compare(two, 'a', lower_is_better=False)
  assert (found.p, found.verdict) == (0.5, 'no significant difference')
  nine = {n: dict.fromkeys(range(9), v) for n, v in (('a', 0.5), ('b', 0.6))}
  (found,) = compare(nine, 'a', lower_is_better=False)
  assert (found.p, found.verdict) == (2.0**-8, 'better')


def test_words():
  scores = {'a': {0: 1.0, 1: 1.1}, 'b': {0: 2.0, 1: 2.11}, 'c': {0: 1.0, 1: 1.1}, 'd': {0: 5.0}}
  assert verdicts(compare(scores, 'a')) == {
    'b': 'worse',
    'c': 'no significant difference',
    'd': 'too few seeds',
  }
  assert verdicts(compare(scores, 'a', lower_is_better=False))['b'] == 'better'
  with pytest.raises(ValueError, match='one of a, b, c, d'):
    compare(scores, 'e')


def test_holm():
  assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # Holm's own example
  assert holm([0.9, 0.8]) == [1.0, 1.0]
  assert holm([0.02, math.nan])[0] == pytest.approx(0.02)


def test_all_pairs():
  scores = {
    'a': {0: 1.0, 1: 1.1, 2: 0.9},
    'b': {0: 2.0, 1: 2.1, 2: 1.8},
    'c': {0: 1.0, 1: 1.3, 2: 0.8},
  }
  found = {(d.name, d.against): d for d in compare_all(scores)}
  assert list(found) == [('a', 'b'), ('a', 'c'), ('b', 'c')]
  (single,) = compare({n: scores[n] for n in 'ab'}, 'b')
  assert found['a', 'b'].p == single.p
  assert found['a', 'b'].estimate == single.estimate
  # of all pairs at once
  assert [d.p_adjusted for d in found.values()] == holm([d.p for d in found.values()])
  assert found['a', 'b'].p_adjusted == pytest.approx(3 * single.p)
  assert [d.verdict for d in found.values()] == ['better', 'no significant difference', 'worse']


@thorough
def test_pairs_of_equal_models_seldom_differ_significantly():
  """The chance of even one false verdict among the 28 pairs of eight architectures is 5 %."""
  clean = sum(
    {d.verdict for d in compare_all(s)} == {'no significant difference'}
    for s in studies(3, 400, seeds=5, shift=0.0, others=6)
  )
  assert clean >= 0.9 * 400
