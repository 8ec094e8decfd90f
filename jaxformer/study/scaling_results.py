"""A scaling study's results as data: every training, each architecture's law with intervals, and
what it foretold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer import config
from jaxformer.study.results import plain
from jaxformer.study.scaling import Fit, Law, Parabola, Runs, fit_law, iso_flop, power_law
from jaxformer.study.scaling_study import FinishedScaling, Scaled, ScalingStudy

COEFFICIENTS = tuple(f.name for f in dataclasses.fields(Law))


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number of a law, and the ends of its 95 % interval."""

  value: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Point:
  """One size at one budget.

  Attributes:
    flops: the budget; `train_flops` are those of the whole batches trained.
    held_out: whether it took no part in the fit.
    params, tokens: what the law is about.
    flops_per_token: of training.
    passes: how often the training text was read; None where the data do not repeat.
    tried: (learning rate, loss of the tuning seed), None for one that diverged; empty where nothing
      was tuned here.
    rate, at_edge: the rate taken, and whether it lies at the end of what was tried here.
    losses: seed -> held-out loss, nats a target; None for a run whose numbers stopped being finite.
    loss: their mean; None where one diverged.
    foretold: the loss by the law, with the interval in which one more such training lies; None
      without a law.
    runs: names of the run folders.
  """

  flops: float
  train_flops: float
  held_out: bool
  params: float
  tokens: int
  flops_per_token: float
  passes: float | None
  tried: tuple[tuple[float, float | None], ...]
  rate: float
  at_edge: bool
  losses: dict[int, float | None]
  loss: float | None
  foretold: Interval | None
  runs: tuple[str, ...]

  @property
  def covered(self) -> bool | None:
    """Whether what came lies in the interval of what was foretold; None where there is no one or
    the other."""
    return (
      None
      if self.foretold is None or self.loss is None
      else self.foretold.low <= self.loss <= self.foretold.high
    )


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The size with the least loss at a number of FLOPs: by the law, with the tokens and the loss
  that go with it, and by the parabola of the budget; None where there is none."""

  flops: float
  params: Interval
  tokens: float
  loss: float
  parabola: Parabola | None


@dataclasses.dataclass(frozen=True)
class FamilyLaw:
  """What came of one architecture.

  Attributes:
    title: of the entry.
    points: its trainings, those held out last.
    coefficients: E, A, B, alpha and beta; empty without a law.
    exponent: of the best size in the FLOPs.
    runs, residual, explained: of the fit (`compare.scaling.Fit`).
    flops_law: (k, p) of training FLOPs a token = k N^p, by these models.
    optima: by budget, those held out last.
    without: why there is no law; None where there is one.
    flat: budgets without a parabola, and why.
  """

  title: str
  points: tuple[Point, ...]
  coefficients: dict[str, Interval]
  exponent: Interval | None
  runs: int
  residual: float | None
  explained: float | None
  flops_law: tuple[float, float]
  optima: tuple[Optimum, ...]
  without: str | None
  flat: dict[str, str]

  @property
  def law(self) -> Law | None:
    return (
      Law(**{name: i.value for name, i in self.coefficients.items()}) if self.coefficients else None
    )

  @property
  def fitted(self) -> list[Point]:
    return [p for p in self.points if not p.held_out]

  @property
  def held_out(self) -> list[Point]:
    return [p for p in self.points if p.held_out]

  @property
  def parabolas(self) -> dict[float, Parabola]:
    """By FLOPs."""
    return {o.flops: o.parabola for o in self.optima if o.parabola is not None}


@dataclasses.dataclass(frozen=True)
class ScalingResults:
  """A finished scaling study; `environment` is that of this program: command, versions, device,
  commit, and the data."""

  study: ScalingStudy
  scored_on: str
  families: tuple[FamilyLaw, ...]
  environment: dict[str, Any]

  @property
  def answer(self) -> list[str]:
    """A few sentences an architecture: how well the law fits, what it foretold, and how the best
    size grows."""
    return [said(f) for f in self.families]

  def to_json(self) -> dict[str, Any]:
    """JSON data; numbers that are not finite are null."""
    return plain(
      {
        'study': self.study.name,
        'answer': self.answer,
        'scored_on': self.scored_on,
        'families': [
          {
            **dataclasses.asdict(f),
            'points': [{**dataclasses.asdict(p), 'covered': p.covered} for p in f.points],
          }
          for f in self.families
        ],
        'config': config.to_json(self.study),
        'digest': config.digest(self.study),
        'environment': self.environment,
      }
    )


def gather_scaling(done: FinishedScaling, environment: dict[str, Any]) -> ScalingResults:
  """The results of trainings that are done."""
  families = tuple(_family(done.study, title, scaled) for title, scaled in done.results.items())
  scores = [r.metrics for scaled in done.results.values() for s in scaled for r in s.tuned.runs]
  source = next(
    (str(m['eval/source']) for m in scores if 'eval/source' in m), done.study.task.held_out
  )
  return ScalingResults(done.study, source, families, environment)


def _family(study: ScalingStudy, title: str, scaled: Sequence[Scaled]) -> FamilyLaw:
  points = [_point(s) for s in scaled]
  used = [(p.params, p.tokens, p.loss) for p in points if not p.held_out and p.loss is not None]
  power, k = power_law([p.params for p in points], [p.flops_per_token for p in points])
  parabolas, flat = _parabolas(study, points)
  try:
    fit = fit_law(Runs(*zip(*used, strict=True)) if used else Runs((), (), ()), study.bootstrap)
  except ValueError as e:
    return FamilyLaw(
      title, tuple(points), {}, None, len(used), None, None, (k, power), (), str(e), flat
    )
  optima = tuple(
    _optimum(fit, b.flops, k, power, parabolas.get(b.flops))
    for b in (*study.budgets, *study.held_out)
  )
  return FamilyLaw(
    title,
    tuple(dataclasses.replace(p, foretold=_foretold(fit, p)) for p in points),
    {name: _interval(fit, lambda law, name=name: getattr(law, name)) for name in COEFFICIENTS},
    _interval(fit, lambda law: law.exponent(power)),
    fit.runs,
    fit.residual,
    fit.explained,
    (k, power),
    optima,
    None,
    flat,
  )


def _point(s: Scaled) -> Point:
  p, t = s.planned, s.tuned
  losses = {r.seed: r.loss if np.isfinite(r.loss) else None for r in t.runs}
  finite = [v for v in losses.values() if v is not None]
  return Point(
    p.flops,
    p.flops_per_token * p.tokens,
    p.held_out,
    p.params,
    p.tokens,
    p.flops_per_token,
    s.passes,
    tuple((r.rate, r.loss if np.isfinite(r.loss) else None) for r in t.trials),
    t.rate,
    t.at_edge,
    losses,
    float(np.mean(finite)) if len(finite) == len(losses) else None,
    None,
    tuple(Path(r.folder).name for r in t.runs),
  )


def _parabolas(
  study: ScalingStudy, points: Sequence[Point]
) -> tuple[dict[float, Parabola], dict[str, str]]:
  """By FLOPs; and why a budget has none. Tokens are whole batches, so FLOPs are a little off the
  budget, and the law knows."""
  found, flat = {}, {}
  for b in study.budgets:
    at = [p for p in points if p.flops == b.flops and p.loss is not None]
    try:
      found[b.flops] = iso_flop(
        b.flops, [p.params for p in at], [p.loss for p in at if p.loss is not None]
      )
    except ValueError as e:
      flat[f'{b.flops:g}'] = str(e)
  return found, flat


def _interval(fit: Fit, of: Any) -> Interval:
  return Interval(float(of(fit.law)), *fit.interval(of))


def _foretold(fit: Fit, p: Point) -> Interval:
  return Interval(float(fit.law.loss(p.params, p.tokens)), *fit.foretold(p.params, p.tokens))


def _optimum(fit: Fit, flops: float, k: float, power: float, parabola: Parabola | None) -> Optimum:
  params, tokens = fit.law.optimal(flops, k, power)
  size = _interval(fit, lambda law: law.optimal(flops, k, power)[0])
  return Optimum(flops, size, tokens, float(fit.law.loss(params, tokens)), parabola)


# ---- in words ----------------------------------------------------------------------------------


def said(f: FamilyLaw) -> str:
  """What came of an architecture, in sentences."""
  if f.without is not None or f.exponent is None or f.residual is None or f.explained is None:
    return f'{f.title}: no law ({f.without}).'
  parts = [
    f'{f.title}: parameters and tokens tell the loss of {f.runs} trainings within {f.residual:.1%} '
    f'(R² {f.explained:.3f}).'
  ]
  for p in f.held_out:
    if p.loss is None or p.foretold is None:
      parts.append(f'Held out, {p.params:,.0f} parameters after {p.tokens:,} tokens: diverged.')
    else:
      place = 'inside' if p.covered else 'outside'
      parts.append(
        f'Held out, {p.params:,.0f} parameters after {p.tokens:,} tokens: foretold '
        f'{p.foretold.value:.3f} ({p.foretold.low:.3f} to '
        f'{p.foretold.high:.3f}) nats, and {p.loss:.3f} came, {place} the interval and '
        f'{p.loss / p.foretold.value - 1:+.1%} off.'
      )
  parts.append(
    f'The best size grows as FLOPs to the power {f.exponent.value:.2f} ({f.exponent.low:.2f} to '
    f'{f.exponent.high:.2f}).'
  )
  return ' '.join(parts)
