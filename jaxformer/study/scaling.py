"""Scaling laws (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models"): the
parametric fit of section 3.3 and appendix D.3, and the parabolas of equal training FLOPs of section
3.2, with intervals by resampling.

The paper, and Besiroglu et al. 2024 ("Chinchilla Scaling: A replication attempt"), refit the law to
resampled runs. Few runs lose their design by that, so here each refit gives every run a random
weight instead, exponential with mean 1 (Rubin 1981, "The Bayesian Bootstrap"; Jin, Ying and Wei
2001 for losses with kinks). It assumes neither normal nor equal noise. A run far from the law
widens intervals little, unless it is at a corner of the sizes and tokens, where the Huber loss
follows it in the refits that give it much weight. Least-squares fits are refitted to resampled
residuals."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from jaxformer.study.statistics import LEVEL

HUBER = 1e-3  # on log loss, as in the paper
COEFFICIENTS = 5  # of the law
STEPS = 100  # of a descent at one delta, at most
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)  # the quantiles of an interval


@dataclasses.dataclass(frozen=True)
class Law:
  """L(N, D) = E + A / N^alpha + B / D^beta: the loss, in nats per token, of N parameters after D
  tokens."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def loss(self, params: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
    return (
      self.E
      + self.A * np.asarray(params, np.float64) ** -self.alpha
      + self.B * np.asarray(tokens, np.float64) ** -self.beta
    )

  def optimal(
    self, flops: float, flops_per_param_token: float = 6.0, power: float = 1.0
  ) -> tuple[float, float]:
    """Return the (N, D) with the least loss at `flops` = k N^power D training FLOPs; at `power` = 1
    the paper's eq. 4. Small models have other powers: their attention and their embeddings, which
    are looked up, do not grow in proportion to their parameters."""
    total = flops / flops_per_param_token
    with np.errstate(all='ignore'):  # of laws without an optimum it is 0 or infinite
      terms = np.log(np.array([self.alpha * self.A, power * self.beta * self.B]))
      log_n = (terms[0] - terms[1] + self.beta * np.log(total)) / (self.alpha + power * self.beta)
      return float(np.exp(log_n)), float(total * np.exp(-power * log_n))

  def exponent(self, power: float = 1.0) -> float:
    """Return a of N = k C^a: how the optimal size grows with the training FLOPs C."""
    return self.beta / (self.alpha + power * self.beta)


class Interval(NamedTuple):
  """A positive value with its 95% interval; `low` is 0, or `high` infinite, where the runs set no
  such bound."""

  value: float
  low: float
  high: float

  @property
  def identified(self) -> bool:
    """Whether the runs bound the value on at least one side."""
    return self.low > 0 or self.high < math.inf

  def ends(self, form: Callable[[float], str] = '{:.3f}'.format) -> str:
    """Format the interval without its value."""
    if not self.identified:
      return 'not identified'
    if self.low <= 0:
      return f'at most {form(self.high)}'
    return (
      f'{form(self.low)} to {form(self.high)}' if self.bounded else f'at least {form(self.low)}'
    )

  @property
  def bounded(self) -> bool:
    """Whether the runs bound the value on both sides."""
    return self.low > 0 and self.high < math.inf


def _interval(
  value: float, refits: np.ndarray, freedom: int, unidentified: np.ndarray | None = None
) -> Interval:
  """Return the percentile interval of a positive number over refits. Its ends are moved away from
  the value by the ratio of Student's t to the normal quantile, the lower one on the logarithmic
  scale: refits to n runs with p coefficients, `freedom` = n - p, scatter too little by about that.
  There is no interval without freedom, and none where more refits than its level admits are
  `unidentified`."""
  if freedom < 1 or (unidentified is not None and np.mean(unidentified) > TAILS[0]):
    return Interval(value, 0.0, math.inf)
  low, high = np.quantile(np.minimum(refits, 1e300), TAILS)
  ratio = _widening(freedom)
  low = value * min(1.0, low / value) ** ratio if value else 0.0
  return Interval(value, float(low), float(value + ratio * max(0.0, high - value)))


def _widening(freedom: int) -> float:
  return float(stdtrit(freedom, TAILS[1]) / ndtri(TAILS[1]))


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law with refits to randomly weighted runs.

  Attributes:
    law: the best fit; E is 0 where no positive one fits better.
    samples: the law of each refit.
    flat: whether a refit has no identified term of N, and of D: its coefficient or its exponent is
      at an end of the range searched.
    runs: number of runs fitted.
    residual: root mean square of log(loss / fitted loss).
    scatter: standard deviation of a log loss around the law, of runs that are no outliers.
    explained: R^2 of the log losses.
  """

  law: Law
  samples: tuple[Law, ...]
  flat: tuple[tuple[bool, bool], ...]
  runs: int
  residual: float
  scatter: float
  explained: float

  def coefficient(self, name: str) -> Interval:
    """Return a coefficient of the law with its interval."""
    terms = {'A': (True, False), 'alpha': (True, False), 'B': (False, True), 'beta': (False, True)}
    return self.interval(operator.attrgetter(name), terms.get(name, (False, False)))

  def interval(
    self, of: Callable[[Law], float], terms: tuple[bool, bool] = (False, False)
  ) -> Interval:
    """Return a positive function of the law with its 95% confidence interval; `terms` says whether
    it depends on the separate coefficients of the terms of N and of D, and so has no interval
    unless they are identified."""
    if len(self.samples) < 2:
      raise ValueError('an interval needs a fit with bootstrap samples')
    refits = np.array([of(law) for law in self.samples], np.float64)
    flat = np.any(np.array(self.flat) & np.array(terms), axis=1)
    return _interval(float(of(self.law)), refits, self.runs - COEFFICIENTS, flat)

  def prediction(self, params: float, tokens: float) -> Interval:
    """Return the loss of one more run by the law, with the interval of the law at this point,
    widened by the scatter of runs around the law. It does not count on outliers."""
    value, low, high = self.interval(lambda law: float(law.loss(params, tokens)))
    noise = self.scatter * stdtrit(self.runs - COEFFICIENTS, 0.5 + LEVEL / 2)
    below, above = (math.hypot(math.log(end / value), noise) for end in (low, high))
    return Interval(value, value * math.exp(-below), value * math.exp(above))


def fit_law(
  params: Sequence[float],
  tokens: Sequence[float],
  loss: Sequence[float],
  bootstrap: int = 200,
  seed: int = 0,
) -> Fit:
  """Fit the parametric law to the runs of one architecture: the least Huber loss (delta 1e-3) of
  log L, from several starting points, with E, A and B as exponentials so that they are not negative
  (Hoffmann et al. 2022, section 3.3 and appendix D.3).

  Args:
    params, tokens, loss: of each run; the final loss in nats per token.
    bootstrap: number of refits to randomly weighted runs, on which intervals are based.
    seed: of the weights.

  Raises `ValueError` for fewer than six runs, for numbers that are not positive and finite, and for
  runs that all have the same parameters, the same tokens or the same loss."""
  n, d, y = _logarithms(params=params, tokens=tokens, losses=loss)
  if len(n) <= COEFFICIENTS:
    raise ValueError(f'five coefficients need at least 6 runs; there are {len(n)}')
  for name, values in (('parameters', n), ('tokens', d), ('losses', y)):
    if np.ptp(values) < 1e-9:
      raise ValueError(f'the runs must differ in {name}: all have {math.exp(values[0]):.6g}')
  # Centred logarithms decorrelate alpha from A and beta from B, which conditions the descent.
  middle_n, middle_d = n.mean(), d.mean()
  n, d = n - middle_n, d - middle_d

  starts = _starts(n, d, y)
  costs, found = _descend(starts, n, d, y, np.ones((len(starts), len(n))))
  best = found[np.argmin(costs)]
  weights = np.random.default_rng(seed).exponential(size=(bootstrap, len(n)))
  _, refits = _descend(np.tile(best, (bootstrap, 1)), n, d, y, weights)
  at_bound = (refits <= _BOUNDS[0]) | (refits >= _BOUNDS[1])
  residuals = y - _terms(best, n, d)[0]
  squares = float(np.mean(residuals**2))
  return Fit(
    _law(best, middle_n, middle_d),
    tuple(_law(theta, middle_n, middle_d) for theta in refits),
    tuple((a or alpha, b or beta) for _, a, alpha, b, beta in at_bound.tolist()),
    len(n),
    squares**0.5,
    _scale(residuals, len(n) - COEFFICIENTS),
    1 - squares / float(np.var(y)),
  )


def _law(theta: np.ndarray, middle_n: float, middle_d: float) -> Law:
  """Return the law of logarithms that are no longer centred."""
  e, a, alpha, b, beta = theta.tolist()
  E, A, B = (math.exp(v) for v in (e, a + alpha * middle_n, b + beta * middle_d))
  return Law(E if e > _BOUNDS[0, 0] else 0.0, A, B, alpha, beta)


def _scale(residuals: np.ndarray, freedom: int) -> float:
  """Return the standard deviation of residuals that outliers hardly change: s of
  sum min(|r|, c s)^2 = freedom s^2 E min(|z|, c)^2 for normal z (Huber 1964, proposal 2), with
  c = 1.5."""
  c = 1.5
  density, above = math.exp(-c * c / 2) / math.sqrt(2 * math.pi), ndtr(-c)
  expected = 1 - 2 * above - 2 * c * density + 2 * c * c * above
  size, s = np.abs(residuals), float(np.std(residuals))
  for _ in range(100):
    s = math.sqrt(float(np.sum(np.minimum(size, c * s) ** 2)) / (freedom * expected))
  return s


def _logarithms(**given: Sequence[float]) -> list[np.ndarray]:
  """Return the logarithms of columns of numbers. Raises `ValueError` for unequal lengths, and for
  numbers that are not positive and finite."""
  columns = {name: np.asarray(values, np.float64) for name, values in given.items()}
  if len({c.shape for c in columns.values()}) > 1 or any(c.ndim != 1 for c in columns.values()):
    sizes = ', '.join(f'{name} {c.size}' for name, c in columns.items())
    raise ValueError(f'one number of each per run is needed; there are: {sizes}')
  for name, column in columns.items():
    if np.any(wrong := ~(np.isfinite(column) & (column > 0))):
      raise ValueError(f'{name} must be positive and finite; one is {column[wrong][0]:g}')
  return [np.log(c) for c in columns.values()]


# theta = (log E, log A, alpha, log B, beta); log L = log(E + A / N^alpha + B / D^beta), with log N
# and log D centred, and A and B those of the centred logarithms. Rows of theta are separate fits.
_BOUNDS = np.array([[-20.0, -30.0, 0.01, -30.0, 0.01], [5.0, 10.0, 3.0, 10.0, 3.0]])


def _terms(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Return the log losses, and the fractions of the loss that are E, A / N^alpha and B /
  D^beta."""
  e, a, alpha, b, beta = np.moveaxis(theta[..., None], -2, 0)
  logs = np.stack(np.broadcast_arrays(e, a - alpha * n, b - beta * d))
  most = logs.max(0)
  terms = np.exp(logs - most)
  total = terms.sum(0)
  return most + np.log(total), terms / total


def _descend(
  theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Return the weighted Huber losses at local minima, and the minima, one per row of `theta` and
  `weights`. A descent stalls at a kink as sharp as the last one, so delta decreases gradually."""
  theta, losses = np.clip(theta, *_BOUNDS), np.zeros(len(theta))
  for delta in (0.03, 0.01, 0.003, HUBER):
    losses, theta = _settle(theta, functools.partial(_expand, delta, n, d, y), weights)
  return losses, theta


def _expand(
  delta: float, n: np.ndarray, d: np.ndarray, y: np.ndarray, theta: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return the Huber losses, their gradients, and the second derivatives of the parabolas that lie
  above the Huber loss and touch it at the residuals (iteratively reweighted least squares)."""
  fitted, (of_e, of_a, of_b) = _terms(theta, n, d)
  r = fitted - y
  size = np.abs(r)
  loss = np.where(size <= delta, r * r / 2, delta * (size - delta / 2))
  slopes = np.stack([of_e, of_a, -n * of_a, of_b, -d * of_b], axis=1)
  weighted = slopes * (weights * (delta / np.maximum(size, delta)))[:, None]
  return (
    np.sum(weights * loss, axis=1),
    np.einsum('rpn,rn->rp', weighted, r),
    weighted @ np.swapaxes(slopes, 1, 2),
  )


def _settle(
  theta: np.ndarray, expand: Callable[..., Sequence[np.ndarray]], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Descend by Levenberg-Marquardt within the bounds, all rows at once."""
  found = [theta, *expand(theta, weights)]
  damping, active = np.full(len(theta), 1e-3), np.arange(len(theta))
  for _ in range(STEPS):
    if not len(active):
      break
    now, loss, gradient, curvature = (values[active] for values in found)
    outward = ((now <= _BOUNDS[0]) & (gradient > 0)) | ((now >= _BOUNDS[1]) & (gradient < 0))
    fixed = outward[:, :, None] | outward[:, None, :]
    scale = np.einsum('rpp->rp', curvature)
    ridge = damping[active, None] * scale + 1e-15 + outward
    matrix = np.where(fixed, 0.0, curvature) + ridge[:, :, None] * np.eye(COEFFICIENTS)
    step = np.linalg.solve(matrix, np.where(outward, 0.0, gradient)[..., None])[..., 0]
    moved = np.clip(now - np.clip(step, -1, 1), *_BOUNDS)
    new = [moved, *expand(moved, weights[active])]
    better = new[1] < loss
    for values, news in zip(found, new, strict=True):
      values[active[better]] = news[better]
    damping[active] *= np.where(better, 0.2, 5.0)
    np.maximum(damping, 1e-7, out=damping)
    done = better & (loss - new[1] < 1e-7 * loss)
    active = active[~done & (damping[active] < 1e8)]
  return found[1], found[0]


def _starts(n: np.ndarray, d: np.ndarray, y: np.ndarray, count: int = 8) -> np.ndarray:
  """Return the most promising points of a grid, in which the loss above the floor E is split
  between parameters and tokens."""
  least, mean = np.exp(y.min()), np.exp(y).mean()
  exponents = (0.15, 0.3, 0.5, 0.8)
  axes = ((0.3, 0.6, 0.8, 0.9, 0.97), exponents, exponents, (0.2, 0.5, 0.8))
  floor, alpha, beta, part = np.array(list(itertools.product(*axes))).T
  rest = mean - floor * least
  grid = np.stack(
    [np.log(floor * least), np.log(part * rest), alpha, np.log((1 - part) * rest), beta], axis=1
  )
  return grid[np.argsort(np.abs(_terms(grid, n, d)[0] - y).sum(1), kind='stable')[:count]]


@dataclasses.dataclass(frozen=True)
class Parabola:
  """Loss as a parabola in log parameters, at one number of training FLOPs.

  Attributes:
    params, loss: the minimum.
    inside: whether the minimum lies within the sizes that were run; otherwise it is an
      extrapolation.
    curvature: c of loss = `loss` + c log(N / `params`)^2.
    interval: of `params`; not identified if there are only three runs, or if refits do not curve
      upwards.
  """

  params: float
  loss: float
  inside: bool
  curvature: float
  interval: Interval

  def at(self, params: float) -> float:
    """Return the loss at a size."""
    return self.loss + self.curvature * float(np.log(params / self.params)) ** 2


def iso_flop(
  params: Sequence[float], loss: Sequence[float], bootstrap: int = 200, seed: int = 0
) -> Parabola:
  """Fit the parabola of runs with equal training FLOPs. Raises `ValueError` for fewer than three
  sizes, numbers that are not positive and finite, or losses that do not curve upwards."""
  x, _ = _logarithms(params=params, losses=loss)
  y = np.asarray(loss, np.float64)
  if len(set(x)) < 3:
    raise ValueError(f'a parabola needs at least 3 sizes; there are {len(set(x))}')
  c2, c1, c0 = np.polyfit(x - x.mean(), y, 2)
  if c2 <= 0 or np.ptp(y) < 1e-9 * y.mean():
    raise ValueError('the losses do not curve upwards, so there is no optimal size')
  at = -c1 / (2 * c2)
  lowest, inside = float(c0 - c1 * c1 / (4 * c2)), bool(x.min() <= at + x.mean() <= x.max())
  size = float(np.exp(at + x.mean()))
  r2, r1, _ = _polynomials(x - x.mean(), y, 2, bootstrap, seed)
  upwards = r2 > 0
  refits = np.exp(np.clip(-r1 / (2 * np.where(upwards, r2, 1.0)) + x.mean(), -700, 700))
  interval = _interval(size, refits, len(x) - 3, ~upwards)
  return Parabola(size, lowest, inside, float(c2), interval)


def _polynomials(x: np.ndarray, y: np.ndarray, degree: int, refits: int, seed: int) -> np.ndarray:
  """Return the coefficients of least-squares refits to resampled residuals, highest power first,
  one column per refit. Residuals are divided by sqrt(1 - leverage) and centred (Davison and Hinkley
  1997, "Bootstrap Methods and their Application", section 6.2)."""
  powers = np.vander(x, degree + 1)
  inverse = np.linalg.pinv(powers)
  fitted = powers @ (inverse @ y)
  leverage = np.einsum('np,pn->n', powers, inverse)
  residuals = (y - fitted) / np.sqrt(np.maximum(1 - leverage, 1e-6))
  residuals = (residuals - residuals.mean()) * math.sqrt(len(x) / (len(x) - 1))
  drawn = np.random.default_rng(seed).choice(residuals, (refits, len(x)))
  return inverse @ (fitted + drawn).T


class PowerLaw(NamedTuple):
  """y = k x^a, with the 95% interval of a, which may have either sign; infinite for two points."""

  a: float
  k: float
  low: float
  high: float


def power_law(
  x: Sequence[float], y: Sequence[float], bootstrap: int = 200, seed: int = 0
) -> PowerLaw:
  """Fit y = k x^a by least squares on logarithms. Raises `ValueError` for fewer than two values of
  x, and for numbers that are not positive and finite."""
  log_x, log_y = _logarithms(x=x, y=y)
  if len(log_x) < 2 or np.ptp(log_x) < 1e-9:
    raise ValueError(f'a power law needs at least 2 values of x; there are {min(len(log_x), 1)}')
  a, log_k = (float(c) for c in np.polyfit(log_x, log_y, 1))
  low, high = -math.inf, math.inf
  if len(log_x) > 2:
    middle = log_x.mean()
    refits = _polynomials(log_x - middle, log_y, 1, bootstrap, seed)[0]
    low, high = a + _widening(len(log_x) - 2) * (np.quantile(refits, TAILS) - a)
  return PowerLaw(a, math.exp(log_k), min(a, float(low)), max(a, float(high)))
