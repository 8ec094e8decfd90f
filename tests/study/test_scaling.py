import numpy as np
import pytest

from jaxformer.study.scaling import Law, fit_law, iso_flop, power_law
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


@thorough
@pytest.mark.parametrize('law', [CHINCHILLA, OTHER])
def test_intervals_hold_the_truth(law):
  """Of 95 % intervals of six numbers over ten noisy studies, at least 85 % do: 95 % within what ten
  studies can tell."""
  held = []
  for seed in range(10):
    fit = fit_law(*runs(law, 0.01, seed), bootstrap=40, seed=seed)
    held += [
      low <= of(law) <= high for of in NUMBERS.values() for _, low, high in [fit.interval(of)]
    ]
  assert np.mean(held) >= 0.85


def test_intervals_are_no_wider_than_they_need_be():
  _, low, high = fit_law(*runs(CHINCHILLA, 0.003, 3), bootstrap=40).interval(lambda law: law.alpha)
  assert high - low < 0.03


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
