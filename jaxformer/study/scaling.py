"""Scaling laws (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models"): the
parametric fit of section 3.3 with bootstrap intervals, and the parabolas of equal training FLOPs of
section 3.2."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy.special import logsumexp, stdtrit

from jaxformer.study.statistics import LEVEL

HUBER = 1e-3  # on log loss, as in the paper
COEFFICIENTS = 5  # of the law


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
    n = (self.alpha * self.A / (power * self.beta * self.B) * total**self.beta) ** (
      1 / (self.alpha + power * self.beta)
    )
    return n, total * n**-power

  def exponent(self, power: float = 1.0) -> float:
    """Return a of N = k C^a: how the optimal size grows with the training FLOPs C."""
    return self.beta / (self.alpha + power * self.beta)


class Interval(NamedTuple):
  """A value with its 95% interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law with bootstrap refits.

  Attributes:
    law: the best fit.
    samples: the law of each bootstrap refit.
    runs: number of runs fitted.
    residual: root mean square of log(loss / fitted loss).
    explained: R^2 of the log losses.
  """

  law: Law
  samples: tuple[Law, ...]
  runs: int
  residual: float
  explained: float

  def interval(self, of: Callable[[Law], float], scatter: float = 0.0) -> Interval:
    """Return a positive function of the law, such as a coefficient or a predicted loss, with its
    95% confidence interval: on the logarithmic scale, its value for the best fit +- Student's t
    times the standard deviation over the bootstrap refits. `scatter` is the variance of a log loss
    around the law, which widens it to the interval of one more run."""
    if len(self.samples) < 2:
      raise ValueError('an interval needs a fit with bootstrap samples')
    spread = np.sqrt(np.var([np.log(of(law)) for law in self.samples], ddof=1) + scatter)
    half = stdtrit(self.runs - COEFFICIENTS, 0.5 + LEVEL / 2) * spread
    value = float(of(self.law))
    return Interval(value, float(value * np.exp(-half)), float(value * np.exp(half)))

  def prediction(self, params: float, tokens: float) -> Interval:
    """Return the loss of one more run by the law, with the interval of the law at this point,
    widened by the scatter of runs around the law."""
    scatter = self.residual**2 * self.runs / (self.runs - COEFFICIENTS)
    return self.interval(lambda law: float(law.loss(params, tokens)), scatter)


def fit_law(
  params: Sequence[float],
  tokens: Sequence[float],
  loss: Sequence[float],
  bootstrap: int = 200,
  seed: int = 0,
) -> Fit:
  """Fit the parametric law to the runs of one architecture: the least Huber loss (delta 1e-3) of
  log L, from several starting points, with E, A and B as exponentials so that they stay positive.

  The bootstrap is parametric: it refits to the law's own losses at each run's N and D with noise of
  the residuals' size, so that few runs keep their design.

  Args:
    params, tokens, loss: of each run; the final loss in nats per token.

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

  def law(theta: np.ndarray) -> Law:
    e, a, alpha, b, beta = theta.tolist()
    E, A, B = (math.exp(v) for v in (e, a + alpha * middle_n, b + beta * middle_d))
    return Law(E, A, B, alpha, beta)

  descents = (_descend(start, n, d, y) for start in _starts(n, d, y))
  best = min(descents, key=lambda found: found[0])[1]
  fitted = _log_loss(best, n, d)
  sigma = np.sqrt(np.sum((y - fitted) ** 2) / (len(n) - COEFFICIENTS))
  rng = np.random.default_rng(seed)
  noisy = (fitted + sigma * rng.normal(size=len(n)) for _ in range(bootstrap))
  samples = tuple(law(_descend(best, n, d, losses)[1]) for losses in noisy)
  squares = np.mean((y - fitted) ** 2)
  return Fit(law(best), samples, len(n), float(np.sqrt(squares)), float(1 - squares / np.var(y)))


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


# theta = (log E, log A, alpha, log B, beta); log L = logsumexp(log E, log A - alpha log N, log B -
# beta log D), with log N and log D centred, and A and B those of the centred logarithms


def _terms(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
  e, a, alpha, b, beta = theta
  return np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])


def _log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
  return logsumexp(_terms(theta, n, d), axis=0)


def _descend(
  start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray
) -> tuple[float, np.ndarray]:
  """Return the Huber loss at a local minimum, and the minimum."""

  def residuals(theta: np.ndarray) -> np.ndarray:
    return _log_loss(theta, n, d) - y

  def jacobian(theta: np.ndarray) -> np.ndarray:
    terms = _terms(theta, n, d)
    of_e, of_a, of_b = np.exp(terms - logsumexp(terms, axis=0))
    return np.stack([of_e, of_a, -n * of_a, of_b, -d * of_b], axis=1)

  theta, cost = np.clip(start, *_BOUNDS), 0.0
  # A descent stalls at a kink as sharp as the last one, so delta decreases gradually.
  for delta in (1.0, 0.01, 0.003, HUBER):
    found = optimize.least_squares(
      residuals, theta, jacobian, _BOUNDS, loss='huber', f_scale=delta, x_scale='jac', max_nfev=300
    )
    theta, cost = found.x, float(found.cost)
  return cost, theta


_BOUNDS = (np.array([-20.0, -30.0, 0.01, -30.0, 0.01]), np.array([5.0, 10.0, 3.0, 10.0, 3.0]))


def _starts(n: np.ndarray, d: np.ndarray, y: np.ndarray, count: int = 8) -> list[np.ndarray]:
  """Return the most promising points of a grid, in which the loss above the floor E is split
  between parameters and tokens."""
  least, mean = np.exp(y.min()), np.exp(y).mean()
  grid = [
    np.array(
      [
        np.log(floor * least),
        np.log(part * (mean - floor * least)),
        alpha,
        np.log((1 - part) * (mean - floor * least)),
        beta,
      ]
    )
    for floor, alpha, beta, part in itertools.product(
      (0.3, 0.6, 0.8, 0.9, 0.97), (0.15, 0.3, 0.5, 0.8), (0.15, 0.3, 0.5, 0.8), (0.2, 0.5, 0.8)
    )
  ]
  return sorted(grid, key=lambda theta: np.abs(_log_loss(theta, n, d) - y).sum())[:count]


@dataclasses.dataclass(frozen=True)
class Parabola:
  """Loss as a parabola in log parameters, at one number of training FLOPs.

  Attributes:
    params, loss: the minimum.
    inside: whether the minimum lies within the sizes that were run; otherwise it is an
      extrapolation.
    curvature: c of loss = `loss` + c log(N / `params`)^2.
  """

  params: float
  loss: float
  inside: bool
  curvature: float

  def at(self, params: float) -> float:
    """Return the loss at a size."""
    return self.loss + self.curvature * float(np.log(params / self.params)) ** 2


def iso_flop(params: Sequence[float], loss: Sequence[float]) -> Parabola:
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
  return Parabola(float(np.exp(at + x.mean())), lowest, inside, float(c2))


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
  """Return (a, k) of y = k x^a by least squares on logarithms. Raises `ValueError` for fewer than
  two values of x, and for numbers that are not positive and finite."""
  log_x, log_y = _logarithms(x=x, y=y)
  if len(log_x) < 2 or np.ptp(log_x) < 1e-9:
    raise ValueError(f'a power law needs at least 2 values of x; there are {min(len(log_x), 1)}')
  a, log_k = np.polyfit(log_x, log_y, 1)
  return float(a), float(np.exp(log_k))
