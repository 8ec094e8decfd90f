import math

import numpy as np
import pytest

from jaxformer.study.scaling import Interval, Law, fit_law, iso_flop, power_law
from tests.tiers import thorough

pytestmark = pytest.mark.quick

CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, eq. 10
OTHER = Law(E=0.9, A=60.0, B=900.0, alpha=0.25, beta=0.4)


def runs(law, noise, seed, sizes=6, budgets=5):
  rng = np.random.default_rng(seed)
  n = np.repeat(np.geomspace(1e6, 1e9, sizes), budgets)
  d = np.tile(np.geomspace(2e7, 2e11, budgets), sizes)
  return n, d, law.loss(n, d) * np.exp(noise * rng.normal(size=n.shape))


@pytest.mark.parametrize('law', [CHINCHILLA, OTHER])
def test_exact_losses_give_the_law_back(law):
  fit = fit_law(*runs(law, 0.0, 0), bootstrap=0)
  for name in ('E', 'A', 'B', 'alpha', 'beta'):
    assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=2e-2)
  assert fit.residual < 1e-4


NUMBERS = {
  name: (lambda law, name=name: getattr(law, name)) for name in ('E', 'A', 'B', 'alpha', 'beta')
}
NUMBERS['exponent'] = lambda law: law.beta / (law.alpha + law.beta)


def noisy(kind, seed, size=0.01, count=4):
  """Five sizes by `count` numbers of tokens, with noise that is normal; up to three times as large
  for small models; or with outliers upwards, as of runs that did not converge."""
  n, d, loss = runs(CHINCHILLA, 0.0, 0, sizes=5, budgets=count)
  rng = np.random.default_rng(seed)
  noise = size * rng.normal(size=n.shape)
  if kind == 'larger for small models':
    noise *= np.geomspace(1.8, 0.6, 5).repeat(count)
  if kind == 'outliers':
    noise = np.where(rng.random(n.shape) < 0.08, size * 5 + 10 * np.abs(noise), noise)
  return n, d, loss * np.exp(noise)


def covered(kind, studies, bootstrap):
  """Whether each interval of each study holds the truth, its width, and its value: an array of
  shape (3, studies, numbers)."""
  found = []
  for seed in range(studies):
    fit = fit_law(*noisy(kind, seed), bootstrap=bootstrap, seed=seed)
    intervals = [fit.coefficient(name) for name in list(NUMBERS)[:5]]
    intervals.append(fit.interval(NUMBERS['exponent'], (True, True)))
    found.append(
      [
        (i.low <= of(CHINCHILLA) <= i.high, i.high - i.low, i.value)
        for i, of in zip(intervals, NUMBERS.values(), strict=True)
      ]
    )
  return np.moveaxis(np.array(found), -1, 0)


KINDS = 'normal', 'larger for small models', 'outliers'


@thorough
@pytest.mark.parametrize(('kind', 'widest'), [*zip(KINDS, (1.5, 1.6, 2.5), strict=True)])
def test_intervals_cover(kind, widest):
  """95 % intervals of sixty studies hold the truth in at least 88 % of them, for each number, which
  is 95 % within what sixty can tell; and they are not much wider than the estimates scatter."""
  holds, widths, values = covered(kind, studies=60, bootstrap=100)
  assert np.all(holds.mean(0) >= 0.88), holds.mean(0)
  assert 0.92 <= holds.mean() <= 0.995
  spread = np.ptp(np.quantile(values, (0.025, 0.975), axis=0), axis=0)
  relative = np.median(widths, axis=0) / spread
  assert np.all((relative > 0.8) & (relative < widest)), relative


@pytest.mark.parametrize('kind', KINDS)
def test_intervals_of_a_few_studies_cover(kind):
  assert covered(kind, studies=5, bootstrap=40)[0].mean() >= 0.85


def test_outliers_hardly_change_the_scatter():
  n, d, loss = runs(CHINCHILLA, 0.01, 3)
  clean = fit_law(n, d, loss, bootstrap=0)
  loss[[4, 17]] *= 1.3
  odd = fit_law(n, d, loss, bootstrap=0)
  assert clean.scatter == pytest.approx(0.01, rel=0.3)
  assert odd.scatter / clean.scatter < 1.4
  assert odd.residual / clean.residual > 4


def test_intervals_repeat():
  first, second = (fit_law(*noisy('normal', 1), bootstrap=20) for _ in range(2))
  assert first == second
  assert first.samples != fit_law(*noisy('normal', 1), bootstrap=20, seed=1).samples


def test_what_runs_do_not_determine_has_no_interval():
  """A loss on which the tokens have no effect."""
  n, d, _ = runs(CHINCHILLA, 0.0, 0)
  rng = np.random.default_rng(2)
  fit = fit_law(n, d, (1.7 + 400 * n**-0.35) * np.exp(0.01 * rng.normal(size=n.shape)))
  for name in ('B', 'beta'):
    assert fit.coefficient(name)[1:] == (0.0, math.inf)
  assert not fit.interval(NUMBERS['exponent'], (True, True)).identified
  assert fit.coefficient('alpha').low < 0.35 < fit.coefficient('alpha').high < 0.6
  low, high = fit.prediction(1e9, 1e10)[1:]
  assert low < 1.7 + 400 * 1e9**-0.35 < high < 1.05 * low


def test_a_floor_that_may_be_none_is_bounded_above():
  """Losses of small models, far above the floor."""
  law = Law(E=0.02, A=406.4, B=410.7, alpha=0.34, beta=0.28)
  _, low, high = fit_law(*runs(law, 0.03, 0)).coefficient('E')
  assert low == 0
  assert 0.02 < high < 2


@pytest.mark.parametrize(
  ('interval', 'text'),
  [
    (Interval(2, 1, 3), '1.000 to 3.000'),
    (Interval(2, 0, 3), 'at most 3.000'),
    (Interval(2, 1, math.inf), 'at least 1.000'),
    (Interval(2, 0, math.inf), 'not identified'),
  ],
)
def test_an_end_that_is_not_known_is_said(interval, text):
  assert interval.ends() == text


@pytest.mark.parametrize('points', [4, 5, 9])
def test_intervals_of_parabolas_and_power_laws_cover(points):
  rng, x = np.random.default_rng(points), np.geomspace(0.3, 3, points) * 1e6
  holds = []
  for seed in range(200):
    noise = 0.01 * rng.normal(size=points)
    p = iso_flop(x, 2 + 0.1 * np.log(x / 1e6) ** 2 + noise, seed=seed)
    a = power_law(x, x**0.5 * np.exp(noise), seed=seed)
    holds.append((p.interval.low <= 1e6 <= p.interval.high, a.low <= 0.5 <= a.high))
  assert np.all(np.abs(np.mean(holds, axis=0) - 0.95) < 0.045)


def test_as_many_points_as_coefficients_have_no_interval():
  assert not iso_flop([1e6, 2e6, 4e6], [3.0, 2.9, 3.0]).interval.identified
  assert power_law([1e6, 2e6], [2.0, 3.0])[2:] == (-math.inf, math.inf)
  assert not fit_law(SIX[:3].repeat(2), SIX, FALLING).interval(lambda law: law.E).bounded


def test_larger_runs_are_predicted():
  fit = fit_law(*runs(CHINCHILLA, 0.003, 1), bootstrap=40)
  _, low, high = fit.interval(lambda law: law.loss(1e10, 1e12))
  assert low <= CHINCHILLA.loss(1e10, 1e12) <= high
  assert high - low < 0.1


@thorough
def test_intervals_of_one_more_run_hold_it():
  """Of 95 % intervals, over three larger runs in each of eight noisy studies; they are wider than
  those of the law by the noise."""
  held, rng = [], np.random.default_rng(5)
  for seed in range(8):
    fit = fit_law(*runs(CHINCHILLA, 0.01, seed), bootstrap=30, seed=seed)
    for n, d in ((3e9, 1e11), (3e9, 1e12), (1e10, 1e12)):
      low, high = fit.prediction(n, d)[1:]
      held.append(low <= CHINCHILLA.loss(n, d) * np.exp(0.01 * rng.normal()) <= high)
      inner = fit.interval(lambda law, n=n, d=d: law.loss(n, d))[1:]
      assert low < inner[0] < inner[1] < high
  assert np.mean(held) >= 0.85
  assert high / low - 1 < 0.1


def test_explained_is_the_part_that_is_no_noise():
  clean, noisy = (
    fit_law(*runs(CHINCHILLA, noise, 0), bootstrap=0).explained for noise in (0.0, 0.1)
  )
  assert clean > 0.9999
  assert 0.5 < noisy < 0.99


@pytest.mark.parametrize('power', [1.0, 0.9])
def test_optimum_is_the_least_at_equal_flops(power):
  params, tokens = CHINCHILLA.optimal(1e21, 6.0, power)
  assert params**power * tokens == pytest.approx(1e21 / 6)
  around = [CHINCHILLA.loss(params * f, tokens / f**power) for f in (0.8, 1.0, 1.25)]
  assert around[1] == min(around)
  larger = CHINCHILLA.optimal(1e22, 6.0, power)[0]
  assert np.log10(larger / params) == pytest.approx(CHINCHILLA.exponent(power))


def test_parabolas_find_it_too():
  sizes, budgets = np.geomspace(0.3, 3, 7), (1e19, 1e20, 1e21)
  lowest = []
  for c in budgets:
    best = CHINCHILLA.optimal(c)[0]
    p = iso_flop(best * sizes, [CHINCHILLA.loss(n, c / 6 / n) for n in best * sizes])
    assert p.params == pytest.approx(best, rel=0.1)
    assert p.inside
    assert p.at(best) == pytest.approx(CHINCHILLA.loss(best, c / 6 / best), rel=0.01)
    lowest.append(p.params)
  assert power_law(budgets, lowest)[0] == pytest.approx(0.28 / 0.62, abs=0.01)


SIX = np.geomspace(1e6, 1e8, 6)
FALLING = np.linspace(3.0, 2.0, 6)


@pytest.mark.parametrize(
  ('fit', 'columns', 'problem'),
  [
    (fit_law, ([1e6, 2e6, 3e6], [1e8] * 3, [3.0, 2.9, 2.8]), 'at least 6 runs; there are 3'),
    (fit_law, ([1e6] * 6, SIX, FALLING), 'differ in parameters: all have 1e[+]06'),
    (fit_law, (SIX, [1e9] * 6, FALLING), 'differ in tokens: all have 1e[+]09'),
    (fit_law, (SIX, SIX, [3.0] * 6), 'differ in losses: all have 3'),
    (fit_law, (SIX, SIX, [*FALLING[:5], np.nan]), 'losses must be positive and finite; one is nan'),
    (fit_law, (SIX, [0.0, *SIX[1:]], FALLING), 'tokens must be positive and finite; one is 0'),
    (fit_law, (SIX, SIX, FALLING[:5]), 'are: params 6, tokens 6, losses 5'),
    (fit_law, ([], [], []), 'at least 6 runs; there are 0'),
    (iso_flop, ([1e6, 2e6, 4e6], [3.0, 2.9, 2.8]), 'do not curve upwards'),
    (iso_flop, ([1e6, 2e6, 4e6], [3.0, 3.0, 3.0]), 'do not curve upwards'),
    (iso_flop, ([1e6, 2e6], [3.0, 2.9]), 'at least 3 sizes; there are 2'),
    (iso_flop, ([1e6, 2e6, 4e6], [3.0, np.nan, 3.0]), 'losses must be .* finite; one is nan'),
    (iso_flop, ([1e6, 2e6, 4e6], [3.0, np.inf, 3.0]), 'losses must be .* finite; one is inf'),
    (iso_flop, ([1e6, 2e6, -4e6], [3.0, 2.0, 3.0]), 'params must be positive'),
    (power_law, ([1e6], [2.0]), 'at least 2 values of x; there are 1'),
    (power_law, ([1e6, 1e6], [2.0, 3.0]), 'at least 2 values of x; there are 1'),
    (power_law, ([], []), 'at least 2 values of x; there are 0'),
    (power_law, ([1e6, 2e6], [2.0, np.nan]), 'y must be positive and finite; one is nan'),
    (power_law, ([1e6, 2e6], [2.0]), 'are: x 2, y 1'),
  ],
)
def test_what_cannot_be_fitted_is_said(fit, columns, problem):
  with pytest.raises(ValueError, match=problem):
    fit(*columns)
