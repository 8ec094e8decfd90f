"""Statistics of a few runs per architecture: intervals over seeds, paired differences, and
significance with control of the family-wise error rate."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95  # of intervals; significance controls the family-wise error rate at 1 - LEVEL
Verdict = Literal['better', 'worse', 'no significant difference', 'too few seeds']


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its confidence interval.

  Attributes:
    mean: over the runs.
    low, high: ends of Student's t interval; infinite for a single run.
    runs: number of runs.
  """

  mean: float
  low: float
  high: float
  runs: int

  @property
  def half_width(self) -> float:
    return (self.high - self.low) / 2


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """Return the mean of independent runs with its 95% interval: mean +- t_{n-1} s / sqrt(n)."""
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or not x.size:
    raise ValueError('an estimate needs at least one value')
  mean, half = float(x.mean()), float('inf')
  if x.size > 1:
    half = float(stdtrit(x.size - 1, 0.5 + LEVEL / 2) * _standard_error(x))
  return Estimate(mean, mean - half, mean + half, x.size)


@dataclasses.dataclass(frozen=True)
class Difference:
  """Difference of two architectures, paired by seed.

  Attributes:
    name, against: the two.
    estimate: of (name - against), with the interval of this comparison alone.
    p: of the two-sided paired t-test, or of the sign test if all differences are equal; NaN if
      fewer than two seeds are shared.
    p_adjusted: p after Holm's correction for all comparisons of the family (Holm 1979).
    verdict: in words, from `p_adjusted`.
  """

  name: str
  against: str
  estimate: Estimate
  p: float
  p_adjusted: float
  verdict: Verdict

  def reversed(self) -> 'Difference':
    """Return the same comparison, of (against - name)."""
    e = self.estimate
    opposite: dict[Verdict, Verdict] = {'better': 'worse', 'worse': 'better'}
    return dataclasses.replace(
      self,
      name=self.against,
      against=self.name,
      estimate=Estimate(-e.mean, -e.high, -e.low, e.runs),
      verdict=opposite.get(self.verdict, self.verdict),
    )


def compare(
  scores: Mapping[str, Mapping[int, float]], against: str, *, lower_is_better: bool = True
) -> list[Difference]:
  """Compare every architecture with one of them.

  Args:
    scores: architecture -> seed -> score. Runs of one seed saw the same data in the same order, so
      the effect of the seed cancels in their difference. Seeds that only one of two architectures
      has are excluded.
    against: the baseline.
    lower_is_better: True for losses, False for accuracies.

  Differences are assumed normal. With two seeds only large differences can be significant; the
  interval says how large."""
  if against not in scores:
    raise ValueError(f'{against!r} must be one of {", ".join(scores)}')
  return _differences(
    scores, [(name, against) for name in scores if name != against], lower_is_better
  )


def compare_all(
  scores: Mapping[str, Mapping[int, float]], *, lower_is_better: bool = True
) -> list[Difference]:
  """Compare all pairs of architectures, each in order, as `compare` does: significance is corrected
  for all pairs, so it needs more evidence than in a comparison with one baseline."""
  return _differences(scores, list(itertools.combinations(scores, 2)), lower_is_better)


def _differences(
  scores: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]], lower_is_better: bool
) -> list[Difference]:
  found = []
  for name, against in pairs:
    seeds = sorted(set(scores[name]) & set(scores[against]))
    if not seeds:
      raise ValueError(f'{name} and {against} share no seed')
    d = np.array([scores[name][s] - scores[against][s] for s in seeds], np.float64)
    found.append((name, against, estimate(d), _paired_p(d)))
  adjusted = holm([p for *_, p in found])
  return [
    Difference(name, against, e, p, q, _verdict(e, q, lower_is_better))
    for (name, against, e, p), q in zip(found, adjusted, strict=True)
  ]


def holm(p: Sequence[float]) -> list[float]:
  """Return p-values adjusted to control the family-wise error rate under any dependence (Holm
  1979). NaN marks a missing test: it stays NaN and is not counted."""
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
  # All differences equal: Student's t is undefined, the sign test is not.
  if d.std(ddof=1) <= 1e-9 * abs(d[0]):
    return 1.0 if d[0] == 0 else float(2.0 ** (1 - d.size))
  return float(2 * stdtr(d.size - 1, -abs(d.mean()) / _standard_error(d)))


def _standard_error(x: np.ndarray) -> float:
  return float(x.std(ddof=1)) / x.size**0.5


def _verdict(e: Estimate, p: float, lower_is_better: bool) -> Verdict:
  if np.isnan(p):
    return 'too few seeds'
  if p >= 1 - LEVEL:
    return 'no significant difference'
  return 'better' if (e.mean < 0) == lower_is_better else 'worse'
