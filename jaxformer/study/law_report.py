"""Tables and charts of a scaling study: laws, predictions, optimal sizes, and every training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.figures import Figure, drawn
from jaxformer.study.laws import FittedLaw, Interval, Optimum, Training
from jaxformer.study.results import Results
from jaxformer.study.tables import MATCHED, Table, amount, cell

CURVE = 40  # points of a drawn curve
LOSS = 'held-out loss'


def fitted(results: Results) -> tuple[FittedLaw, ...]:
  """Return the laws of a scaling study, by architecture."""
  return results.tasks[0].laws


# ---- tables ------------------------------------------------------------------------------------


def number(value: float) -> str:
  """Format a number of any magnitude."""
  return amount(value) if value >= 1e3 else f'{value:.3g}'


def between(i: Interval | None, form: Callable[[float], str] = number) -> str:
  """Format a value with its interval."""
  return '' if i is None else f'{form(i.value)} ({form(i.low)} to {form(i.high)})'


def law_tables(results: Results) -> list[Table]:
  """Return the tables of laws, predictions and optimal sizes."""
  return [coefficients(results), *predictions(results), optimal_sizes(results)]


def coefficients(results: Results) -> Table:
  note = (
    'Each coefficient with its 95% interval, by parametric bootstrap. Residual: root mean square '
    'of log loss. R² is of log losses. Optimal size: N in proportion to FLOPs to this power.'
  )
  header = ('architecture', 'E', 'A', 'B', 'α', 'β', 'optimal size', 'residual', 'R²', 'trainings')
  return Table('Laws', note, header, tuple(map(_law_row, fitted(results))))


def _law_row(f: FittedLaw) -> tuple[str, ...]:
  if f.residual is None or f.explained is None:
    return (f.title, f.no_law or '', *('' for _ in range(7)), f'{f.runs}')
  return (
    f.title,
    *(between(i) for i in f.coefficients.values()),
    between(f.exponent),
    f'{f.residual:.2%}',
    f'{f.explained:.3f}',
    f'{f.runs}',
  )


def predictions(results: Results) -> list[Table]:
  note = (
    'Held-out trainings, of more FLOPs than any that the law was fitted to. The interval is that '
    'of one more training: it covers the uncertainty of the law and the scatter of trainings '
    'around it.'
  )
  header = (
    'architecture',
    'FLOPs',
    'parameters',
    'tokens',
    'predicted',
    '95% interval',
    'observed',
    'relative error',
    'within interval',
  )
  rows = tuple(
    (
      f.title,
      amount(t.train_flops),
      f'{t.params:,.0f}',
      f'{t.tokens:,}',
      _predicted(t),
      '' if t.predicted is None else f'{t.predicted.low:.3f} to {t.predicted.high:.3f}',
      'diverged' if t.loss is None else f'{t.loss:.3f}',
      _error(t),
      {True: 'yes', False: 'no', None: ''}[t.within_interval],
    )
    for f in fitted(results)
    for t in f.held_out
  )
  return [Table('Predictions for held-out trainings', note, header, rows)] if rows else []


def _predicted(t: Training) -> str:
  return '' if t.predicted is None else f'{t.predicted.value:.3f}'


def _error(t: Training) -> str:
  return '' if t.relative_error is None else f'{t.relative_error:+.1%}'


def optimal_sizes(results: Results) -> Table:
  laws = fitted(results)
  k = '; '.join(f'{f.title} {f.flops_law[0]:.3g} N^{f.flops_law[1]:.3f}' for f in laws)
  note = (
    'The size with the least loss at a number of training FLOPs: by the law, with its 95% '
    'interval, and by the minimum of a parabola through the losses of that budget. Training '
    f'FLOPs per token, fitted to these models: {k}.'
  )
  header = (
    'architecture',
    'FLOPs',
    'parameters by the law',
    'tokens',
    'tokens per parameter',
    'loss by the law',
    'parameters by the parabola',
  )
  rows = tuple(
    (
      f.title,
      amount(o.flops),
      between(o.params),
      amount(o.tokens),
      f'{o.tokens / o.params.value:.3g}',
      f'{o.loss:.3f}',
      _minimum(f, o),
    )
    for f in laws
    for o in f.optima
  )
  return Table('Optimal sizes', note, header, rows)


def _minimum(f: FittedLaw, o: Optimum) -> str:
  if o.parabola is None:
    return f.no_parabola.get(f'{o.flops:g}', '')
  return number(o.parabola.params) + ('' if o.parabola.inside else ', beyond the sizes tried')


def trainings(f: FittedLaw, results: Results) -> Table:
  note = (
    'Passes: how often the training text was read; the law is one of fresh tokens. A rate at an '
    'end is the smallest or largest that was tried there.'
  )
  header = (
    'budget',
    MATCHED[results.study.match],
    'tokens',
    'tokens per parameter',
    'passes',
    'rate',
    *(f'seed {s}' for s in results.study.seeds),
    'predicted',
    'relative error',
  )
  rows = tuple(
    (
      amount(t.flops) + (', held out' if t.held_out else ''),
      f'{t.params:,.0f}',
      f'{t.tokens:,}',
      f'{t.tokens / t.params:.3g}',
      '' if t.passes is None else f'{t.passes:.2g}',
      f'{t.rate:g}' + (' (at an end)' if t.at_edge else ''),
      *('diverged' if v is None else f'{v:.3f}' for v in t.losses.values()),
      _predicted(t),
      _error(t),
    )
    for t in f.trainings
  )
  return Table(f'Trainings: {f.title}', note, header, rows)


LAW_CSV_HEADER = (
  'architecture',
  'budget_flops',
  'held_out',
  'params',
  'tokens',
  'train_flops',
  'train_flops_per_token',
  'passes',
  'learning_rate',
  'at_edge',
  'seeds',
  'loss',
  'predicted',
  'low',
  'high',
  'relative_error',
  'within_interval',
)


def law_csv_rows(results: Results) -> list[tuple[Any, ...]]:
  """Return one row per training; missing values are empty."""
  rows = [
    (
      f.title,
      t.flops,
      t.held_out,
      t.params,
      t.tokens,
      t.train_flops,
      t.flops_per_token,
      t.passes,
      t.rate,
      t.at_edge,
      len(t.losses),
      t.loss,
      *(t.predicted or (None,) * 3),
      t.relative_error,
      t.within_interval,
    )
    for f in fitted(results)
    for t in f.trainings
  ]
  return [tuple(map(cell, row)) for row in rows]


# ---- charts ------------------------------------------------------------------------------------


def law_figures(results: Results) -> list[Figure]:
  """Return the charts for which there is data."""
  found = [figure for f in fitted(results) for figure in (parabolas(f, results), agreement(f))]
  return [f for f in (*found, sizes(results), frontier(results)) if f is not None]


def parabolas(f: FittedLaw, results: Results) -> Figure | None:
  """Draw loss against size, one curve per budget."""
  series = []
  for style, flops in enumerate(dict.fromkeys(t.flops for t in f.trainings)):
    points = tuple(
      Point(t.params, t.loss) for t in f.trainings if t.flops == flops and t.loss is not None
    )
    if points and flops in f.parabolas:
      ends = np.geomspace(points[0].x, points[-1].x, CURVE)
      curve = tuple(Point(n, f.parabolas[flops].at(n)) for n in ends)
      series.append(Series('', style, curve, line=True, dots=False))
    series.append(Series(amount(flops), style, points))
  note = (
    'Each curve is a parabola through the trainings of equal FLOPs; budgets without one were held '
    'out.'
  )
  return drawn(
    f'{f.title}: loss against size at equal training FLOPs',
    note,
    series,
    Axis(MATCHED[results.study.match], True, amount),
    Axis(LOSS),
  )


def agreement(f: FittedLaw) -> Figure | None:
  """Draw the predicted against the observed loss of each training."""

  def points(of: list[Training], bars: bool) -> tuple[Point, ...]:
    return tuple(
      Point(t.loss, t.predicted.value, *(t.predicted[1:] if bars else ()))
      for t in of
      if t.loss is not None and t.predicted is not None
    )

  fit, held_out = points(f.fitted, False), points(f.held_out, True)
  if not fit:
    return None
  ends = [v for p in (*fit, *held_out) for v in p[:2]]
  diagonal = tuple(Point(v, v) for v in (min(ends), max(ends)))
  series = [
    Series('', 0, diagonal, line=True, dots=False),
    Series('fitted', 1, fit),
    Series('held out', 2, held_out),
  ]
  return drawn(
    f'{f.title}: predicted against observed loss',
    'On the line the two are equal. Bars: 95% prediction intervals.',
    series,
    Axis(f'observed {LOSS}'),
    Axis('predicted'),
  )


def sizes(results: Results) -> Figure | None:
  """Draw the optimal size against training FLOPs."""
  series = []
  for style, f in enumerate(fitted(results)):
    by_law = tuple(Point(o.flops, *o.params) for o in f.optima)
    by_parabola = tuple(Point(c, p.params) for c, p in f.parabolas.items() if p.inside)
    series += [
      Series(f.title, style, by_law, line=True, dots=False),
      Series('', style, by_parabola),
    ]
  return drawn(
    'Optimal size against training FLOPs',
    'Lines: by the law. Points: by parabolas whose minimum lies within the sizes tried.',
    series,
    Axis('training FLOPs', True, amount),
    Axis(MATCHED[results.study.match], True, amount),
  )


def frontier(results: Results) -> Figure | None:
  """Draw the loss against training FLOPs."""
  series = []
  for style, f in enumerate(fitted(results)):
    by_law = tuple(Point(o.flops, o.loss) for o in f.optima)
    observed = tuple(
      Point(
        flops,
        min(
          (t.loss for t in f.trainings if t.flops == flops and t.loss is not None), default=math.nan
        ),
      )
      for flops in dict.fromkeys(t.flops for t in f.trainings)
    )
    series += [Series(f.title, style, by_law, line=True, dots=False), Series('', style, observed)]
  return drawn(
    'Loss against training FLOPs',
    'Lines: at the optimal size by the law. Points: the best training of each budget.',
    series,
    Axis('training FLOPs', True, amount),
    Axis(LOSS),
  )
