"""Results of a scaling study as data: every training, and the law of each architecture with
intervals and predictions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxformer.study.ngrams import better
from jaxformer.study.runner import Tuned
from jaxformer.study.scaling import (
  Fit,
  Interval,
  Law,
  Parabola,
  PowerLaw,
  fit_law,
  iso_flop,
  power_law,
)
from jaxformer.study.study import ScalingGrid

COEFFICIENTS = tuple(f.name for f in dataclasses.fields(Law))


@dataclasses.dataclass(frozen=True)
class Training:
  """One size at one budget.

  Attributes:
    flops: the budget; `train_flops` are those of the whole batches trained.
    held_out: whether it is excluded from the fit.
    params, tokens: the arguments of the law.
    flops_per_token: training FLOPs per token.
    passes: how often the training text was read; None where the data do not repeat.
    tried: (learning rate, loss of the tuning seed), None for a run that diverged; empty if nothing
      was tuned at this size.
    rate, at_edge: the rate used, and whether it lies at an end of the rates tried here.
    losses: seed -> held-out loss, nats per target; None for a run that diverged.
    loss: their mean; None if one diverged.
    predicted: the loss by the law, with the interval of one more such training; None without a law.
    runs: names of the run folders.
    better_than_bigram: whether the loss is lower than that of a bigram model of the training text;
      None where either is unknown.
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
  predicted: Interval | None
  runs: tuple[str, ...]
  better_than_bigram: bool | None

  REPORTED = 'within_interval', 'relative_error'

  @property
  def within_interval(self) -> bool | None:
    """Whether the observed loss lies within the prediction interval; None if either is missing."""
    if self.predicted is None or self.loss is None:
      return None
    return self.predicted.low <= self.loss <= self.predicted.high

  @property
  def relative_error(self) -> float | None:
    """Observed loss / predicted loss - 1; None if either is missing."""
    if self.predicted is None or self.loss is None:
      return None
    return self.loss / self.predicted.value - 1


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The size with the least loss at a number of FLOPs: by the law, with its tokens and loss, and by
  the parabola of the budget; None if there is no parabola."""

  flops: float
  params: Interval
  tokens: float
  loss: float
  parabola: Parabola | None


@dataclasses.dataclass(frozen=True)
class FittedLaw:
  """Law of one architecture, and the trainings that it is fitted to and tested on.

  Attributes:
    title: of the entry.
    trainings: of all budgets, held-out ones last.
    runs, residual, explained: of the fit (`study.scaling.Fit`).
    flops_law: (k, p) of training FLOPs per token = k N^p, fitted to these models.
    no_law: why there is no law; None if there is one.
    no_parabola: budget -> why it has no parabola.
    coefficients: E, A, B, alpha and beta; empty without a law.
    exponent: of the optimal size in the FLOPs.
    optima: by budget, held-out ones last; empty without a law.
  """

  title: str
  trainings: tuple[Training, ...]
  runs: int
  flops_law: tuple[float, float]
  no_law: str | None
  no_parabola: dict[str, str]
  REPORTED = ('parabola_exponent',)

  coefficients: dict[str, Interval] = dataclasses.field(default_factory=dict)
  exponent: Interval | None = None
  residual: float | None = None
  explained: float | None = None
  optima: tuple[Optimum, ...] = ()

  @property
  def law(self) -> Law | None:
    values = {name: i.value for name, i in self.coefficients.items()}
    return Law(**values) if values else None

  @property
  def fitted(self) -> list[Training]:
    return [t for t in self.trainings if not t.held_out]

  @property
  def held_out(self) -> list[Training]:
    return [t for t in self.trainings if t.held_out]

  @property
  def parabolas(self) -> dict[float, Parabola]:
    """Parabolas by FLOPs."""
    return {o.flops: o.parabola for o in self.optima if o.parabola is not None}

  @property
  def parabola_exponent(self) -> PowerLaw | None:
    """Power law of the optimal size in the FLOPs, by parabolas with their minimum within the sizes
    that were run (Hoffmann et al. 2022, section 3.2); None for fewer than three."""
    found = {flops: p.params for flops, p in self.parabolas.items() if p.inside}
    return power_law(list(found), list(found.values())) if len(found) > 2 else None


def law_of(
  scaling: ScalingGrid, title: str, tuned: Sequence[Tuned], ngrams: Mapping[str, float]
) -> FittedLaw:
  """Fit the law of one architecture to its trainings. `ngrams` are `TaskResults.ngrams`."""
  trainings = [_training(t, ngrams) for t in tuned]
  used = [t for t in trainings if not t.held_out and t.loss is not None]
  by_size = power_law([t.params for t in trainings], [t.flops_per_token for t in trainings])
  power, k = by_size.a, by_size.k
  parabolas, no_parabola = _parabolas(scaling, trainings)
  found = FittedLaw(title, tuple(trainings), len(used), (k, power), None, no_parabola)
  try:
    fit = fit_law(
      [t.params for t in used],
      [t.tokens for t in used],
      [t.loss for t in used if t.loss is not None],
      scaling.bootstrap,
    )
  except ValueError as e:
    return dataclasses.replace(found, no_law=str(e))
  return dataclasses.replace(
    found,
    trainings=tuple(
      dataclasses.replace(t, predicted=fit.prediction(t.params, t.tokens)) for t in trainings
    ),
    coefficients={name: fit.coefficient(name) for name in COEFFICIENTS},
    exponent=fit.interval(lambda law: law.exponent(power), (True, True)),
    residual=fit.residual,
    explained=fit.explained,
    optima=tuple(
      _optimum(fit, b.flops, k, power, parabolas.get(b.flops))
      for b in (*scaling.budgets, *scaling.held_out)
    ),
  )


def _training(t: Tuned, ngrams: Mapping[str, float]) -> Training:
  p = t.planned
  losses = {r.seed: r.finite_loss for r in t.runs}
  finite = [v for v in losses.values() if v is not None]
  loss = float(np.mean(finite)) if len(finite) == len(losses) else None
  return Training(
    flops=p.flops or 0.0,
    train_flops=p.flops_per_token * p.study.tokens,
    held_out=p.held_out,
    params=p.size,
    tokens=p.study.tokens,
    flops_per_token=p.flops_per_token,
    passes=p.passes,
    tried=tuple((r.rate, r.finite_loss) for r in t.trials),
    rate=t.rate,
    at_edge=t.at_edge,
    losses=losses,
    loss=loss,
    predicted=None,
    runs=t.folder_names,
    better_than_bigram=better(loss, ngrams),
  )


def _parabolas(
  scaling: ScalingGrid, trainings: Sequence[Training]
) -> tuple[dict[float, Parabola], dict[str, str]]:
  """Return the parabolas by FLOPs, and why a budget has none. Tokens are whole batches, so the
  FLOPs differ slightly from the budget."""
  found, missing = {}, {}
  for b in scaling.budgets:
    at = [(t.params, t.loss) for t in trainings if t.flops == b.flops and t.loss is not None]
    try:
      found[b.flops] = iso_flop([n for n, _ in at], [loss for _, loss in at])
    except ValueError as e:
      missing[f'{b.flops:g}'] = str(e)
  return found, missing


def _optimum(fit: Fit, flops: float, k: float, power: float, parabola: Parabola | None) -> Optimum:
  params, tokens = fit.law.optimal(flops, k, power)
  size = fit.interval(lambda law: law.optimal(flops, k, power)[0], (True, True))
  return Optimum(flops, size, tokens, float(fit.law.loss(params, tokens)), parabola)


def in_words(f: FittedLaw) -> str:
  """Summarize the law of an architecture: fit, predictions, and growth of the optimal size."""
  if f.exponent is None or f.residual is None or f.explained is None:
    return f'{f.title}: no law ({f.no_law}).'
  parts = [
    f'{f.title}: parameters and tokens predict the loss of {f.runs} trainings within '
    f'{f.residual:.1%} (R² {f.explained:.3f}).'
  ]
  for t in f.held_out:
    what = f'Held out, {t.params:,.0f} parameters after {t.tokens:,} tokens'
    if t.loss is None or t.predicted is None:
      parts.append(f'{what}: diverged.')
    else:
      parts.append(
        f'{what}: predicted {t.predicted.value:.3f} ({t.predicted.ends()}) nats, observed '
        f'{t.loss:.3f}, {"within" if t.within_interval else "outside"} the interval, relative '
        f'error {t.relative_error:+.1%}.'
      )
  ends = f.exponent.ends('{:.2f}'.format)
  parts.append(f'The optimal size grows as FLOPs^{f.exponent.value:.2f} ({ends}).')
  return ' '.join(parts)
