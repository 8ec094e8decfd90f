"""What a few runs a side can say: intervals over seeds, paired differences, and verdicts that
account for how many were asked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal['better', 'worse', 'no difference seen at this budget', 'too few seeds']


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its interval.

  Attributes:
    mean: over the runs.
    low, high: ends of the interval by Student's t; infinite for a single run, which says nothing of
      its spread.
    runs: how many.
  """

  mean: float
  low: float
  high: float
  runs: int

  @property
  def half_width(self) -> float:
    return (self.high - self.low) / 2


def estimate(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
  """The mean of independent runs with its `level` interval: mean +- t_{n-1} s / sqrt(n)."""
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or not x.size:
    raise ValueError('an estimate needs at least one value')
  mean, half = float(x.mean()), float('inf')
  if x.size > 1:
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
  return Estimate(mean, mean - half, mean + half, x.size)


@dataclasses.dataclass(frozen=True)
class Difference:
  """What one architecture's runs say against another's, seed by seed.

  Attributes:
    name, against: the two.
    estimate: of (name - against), paired by seed, with the interval of this one comparison.
    p: of the two-sided paired t-test, or of the sign test where all differences are the same; NaN
      where fewer than two seeds are shared.
    p_adjusted: the same with all comparisons of the family accounted for (Holm 1979).
    verdict: in words, from `p_adjusted`.
  """

  name: str
  against: str
  estimate: Estimate
  p: float
  p_adjusted: float
  verdict: Verdict


def compare(
  scores: Mapping[str, Mapping[int, float]],
  against: str,
  *,
  lower_is_better: bool = True,
  level: float = 0.95,
) -> list[Difference]:
  """Every architecture against one of them.

  Args:
    scores: architecture -> seed -> score. Runs of one seed saw the same data in the same order, so
      what a seed adds to both cancels in their difference. Seeds that only one of two has are left
      out of their difference.
    against: the architecture that the others are compared to.
    lower_is_better: True for losses, False for accuracies.
    level: of the intervals; a verdict is spoken where the chance of even one false one among all
      comparisons is below 1 - level.

  Differences are taken as normal. With two seeds only large ones can show; the interval says how
  large."""
  if against not in scores:
    raise ValueError(f'{against!r} is none of {", ".join(scores)}')
  return _differences(
    scores, [(name, against) for name in scores if name != against], lower_is_better, level
  )


def compare_all(
  scores: Mapping[str, Mapping[int, float]], *, lower_is_better: bool = True, level: float = 0.95
) -> list[Difference]:
  """Every architecture against every one that comes after it, as `compare` does: a verdict accounts
  for all pairs, so that it takes more than one against a single architecture."""
  return _differences(scores, list(itertools.combinations(scores, 2)), lower_is_better, level)


def _differences(
  scores: Mapping[str, Mapping[int, float]],
  pairs: Sequence[tuple[str, str]],
  lower_is_better: bool,
  level: float,
) -> list[Difference]:
  found = []
  for name, against in pairs:
    seeds = sorted(set(scores[name]) & set(scores[against]))
    if not seeds:
      raise ValueError(f'{name} and {against} share no seed')
    d = np.array([scores[name][s] - scores[against][s] for s in seeds], np.float64)
    found.append((name, against, estimate(d, level), _paired_p(d)))
  adjusted, alpha = holm([p for *_, p in found]), 1 - level
  return [
    Difference(name, against, e, p, q, _verdict(e, q, lower_is_better, alpha))
    for (name, against, e, p), q in zip(found, adjusted, strict=True)
  ]


def holm(p: Sequence[float]) -> list[float]:
  """p-values adjusted so that rejecting those below a errs even once with probability at most a,
  whatever their dependence (Holm 1979). A NaN, which is no test, stays NaN and counts as none."""
  p_array = np.asarray(p, np.float64)
  adjusted = np.full(p_array.shape, np.nan)
  tests = np.flatnonzero(~np.isnan(p_array))
  order = tests[np.argsort(p_array[tests])]
  adjusted[order] = np.minimum(
    1.0, np.maximum.accumulate(p_array[order] * (len(order) - np.arange(len(order))))
  )
  return adjusted.tolist()


def _paired_p(d: np.ndarray) -> float:
  if d.size < 2:
    return float('nan')
  spread = d.std(ddof=1)
  # equal runs, or counts with equal shifts by chance: Student has no answer, the sign test has
  if spread <= 1e-9 * abs(d[0]):
    return 1.0 if d[0] == 0 else float(2.0 ** (1 - d.size))
  return float(2 * stats.t.sf(abs(d.mean()) / (spread / np.sqrt(d.size)), d.size - 1))


def _verdict(e: Estimate, p: float, lower_is_better: bool, alpha: float) -> Verdict:
  if np.isnan(p):
    return 'too few seeds'
  if p >= alpha:
    return 'no difference seen at this budget'
  return 'better' if (e.mean < 0) == lower_is_better else 'worse'
