"""The report of a scaling study: laws, what they foretold, best sizes, and every training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxformer import config
from jaxformer.data import open_data
from jaxformer.study.figures import Figure, drawn
from jaxformer.study.page import Page, as_csv, reproduction, save_report
from jaxformer.study.runner import Log
from jaxformer.study.scaling_results import (
  FamilyLaw,
  Interval,
  Point,
  ScalingResults,
  gather_scaling,
)
from jaxformer.study.scaling_study import ScalingStudy, Transferred, run_scaling
from jaxformer.study.sharing import running
from jaxformer.study.svg import Axis, Series
from jaxformer.study.svg import Point as At
from jaxformer.study.tables import MATCHED, Table, amount
from jaxformer.training.interrupt import Interrupt
from jaxformer.training.run import environment

CURVE = 40  # points of a drawn curve
NATS = 'held-out loss'


def report_scaling(
  study: ScalingStudy, log: Log, helpers: Sequence[Sequence[str]] = ()
) -> ScalingResults:
  """Runs a scaling study and writes its report to `DIR/STUDY/report`. Raises
  `compare.sharing.Interrupted` after a signal; called again, it goes on from there. `helpers` are
  commands that train the same study beside this process."""
  with Interrupt() as interrupt:
    with running(helpers, study.folder):
      done = run_scaling(study, log, interrupt)
    results = gather_scaling(done, environment({study.task.tag: open_data(study.task).manifest}))
    save_scaling(results)
  return results


def save_scaling(results: ScalingResults) -> None:
  """Writes report.html, .md, .csv and .json."""
  save_report(
    results.study.folder / 'report',
    page_of(results),
    as_csv(CSV_HEADER, csv_rows(results)),
    results.to_json(),
  )


def page_of(results: ScalingResults) -> Page:
  """What the report says."""
  return Page(
    title=f'Scaling study {results.study.name}',
    answer=results.answer,
    introduction=introduction(results),
    results=('Laws', [laws(results), *extrapolation(results), best_sizes(results)]),
    figures=figures(results),
    keys=(),
    bars='Bars are 95% intervals.',
    details=('Every training', [trainings(f, results) for f in results.families]),
    reproduction=reproduction(results.study, results.environment),
    study=config.text(results.study),
  )


def introduction(results: ScalingResults) -> str:
  """What was done, in a few sentences."""
  s = results.study
  seeds = 'one seed' if len(s.seeds) == 1 else f'the mean over {len(s.seeds)} seeds'
  grid = ', '.join(f'{r:g}' for r in s.learning_rates)
  if len(s.learning_rates) == 1 and not isinstance(s.rates, Transferred):
    rates = f'at the learning rate {grid}'
  elif isinstance(s.rates, Transferred):
    rates = (
      f'at the best learning rate of {grid} for the middle size of the least budget, times (FLOPs '
      '/ those of that budget)^'
      f'{s.rates.exponent:g}'
    )
  else:
    rates = f'each at its best learning rate of {grid}'
  return (
    f'Sizes of each architecture at {len(s.budgets)} budgets of training FLOPs '
    f'({amount(s.budgets[0].flops)} to '
    f'{amount(s.budgets[-1].flops)}), {seeds}, {rates}. To the trainings of each is fitted L(N, D) '
    '= E + A / N^α + B / D^β '
    '(Hoffmann et al. 2022, section 3.3: Huber loss of log L), N parameters, D tokens, L the loss '
    'in nats a token on '
    f'{results.scored_on}. Those held out took no part in the fit. What is said holds for these '
    'data, sizes and budgets.'
  )


# ---- tables ------------------------------------------------------------------------------------


def number(value: float) -> str:
  return amount(value) if value >= 1e3 else f'{value:.3g}'


def between(i: Interval | None, form: Callable[[float], str] = number) -> str:
  return '' if i is None else f'{form(i.value)} ({form(i.low)} to {form(i.high)})'


def laws(results: ScalingResults) -> Table:
  note = (
    'Each coefficient with its 95% interval, from refits to the law with noise like the residuals. '
    'Residual: root mean square of '
    'log loss. R² is of log losses. Best size: N in proportion to FLOPs to this power.'
  )
  header = ('architecture', 'E', 'A', 'B', 'α', 'β', 'best size', 'residual', 'R²', 'trainings')
  return Table('The law of each', note, header, tuple(_law_row(f) for f in results.families))


def _law_row(f: FamilyLaw) -> tuple[str, ...]:
  if f.residual is None or f.explained is None:
    return (f.title, f.without or '', *('' for _ in range(7)), f'{f.runs}')
  return (
    f.title,
    *(between(i) for i in f.coefficients.values()),
    between(f.exponent),
    f'{f.residual:.2%}',
    f'{f.explained:.3f}',
    f'{f.runs}',
  )


def extrapolation(results: ScalingResults) -> list[Table]:
  note = (
    'Trainings of more FLOPs than any that the law was fitted to. The interval is that of one more '
    'training: of the law there, and '
    'the spread of trainings around it.'
  )
  header = (
    'architecture',
    'FLOPs',
    'parameters',
    'tokens',
    'foretold',
    '95% interval',
    'came',
    'off by',
    'inside',
  )
  rows = tuple(
    (f.title, amount(p.train_flops), f'{p.params:,.0f}', f'{p.tokens:,}', *_foretold_cells(p))
    for f in results.families
    for p in f.held_out
  )
  return [Table('Foretold and held out', note, header, rows)] if rows else []


def _foretold_cells(p: Point) -> tuple[str, ...]:
  came = 'diverged' if p.loss is None else f'{p.loss:.3f}'
  if p.foretold is None:
    return ('', '', came, '', '')
  cells = f'{p.foretold.value:.3f}', f'{p.foretold.low:.3f} to {p.foretold.high:.3f}', came
  return (
    (*cells, '', '')
    if p.loss is None
    else (*cells, f'{p.loss / p.foretold.value - 1:+.1%}', 'yes' if p.covered else 'no')
  )


def best_sizes(results: ScalingResults) -> Table:
  k = '; '.join(f'{f.title} {f.flops_law[0]:.3g} N^{f.flops_law[1]:.3f}' for f in results.families)
  note = (
    'The size with the least loss at a number of training FLOPs: by the law, with its 95% '
    'interval, and by the lowest point of a '
    f'parabola through the losses of that budget. Training FLOPs a token, from these models: {k}.'
  )
  header = (
    'architecture',
    'FLOPs',
    'by the law',
    'tokens',
    'tokens a parameter',
    'loss by the law',
    'by the parabola',
  )
  rows = tuple(
    (
      f.title,
      amount(o.flops),
      between(o.params),
      amount(o.tokens),
      f'{o.tokens / o.params.value:.3g}',
      f'{o.loss:.3f}',
      _lowest(f, o),
    )
    for f in results.families
    for o in f.optima
  )
  return Table('Best sizes', note, header, rows)


def _lowest(f: FamilyLaw, o: Any) -> str:
  if o.parabola is not None:
    return number(o.parabola.params) + ('' if o.parabola.inside else ', beyond the sizes tried')
  return f.flat.get(f'{o.flops:g}', '')


def trainings(f: FamilyLaw, results: ScalingResults) -> Table:
  seeds = results.study.seeds
  note = (
    'Passes: how often the training text was read; the law is one of fresh tokens. A rate at an '
    'end is the least or the '
    'greatest that was tried there.'
  )
  header = (
    'budget',
    MATCHED[results.study.match],
    'tokens',
    'tokens a parameter',
    'passes',
    'rate',
    *(f'seed {s}' for s in seeds),
    'foretold',
    'off by',
  )
  return Table(f'Trainings: {f.title}', note, header, tuple(_training_row(p) for p in f.points))


def _training_row(p: Point) -> tuple[str, ...]:
  losses = ('diverged' if v is None else f'{v:.3f}' for v in p.losses.values())
  off = (
    f'{p.loss / p.foretold.value - 1:+.1%}' if p.loss is not None and p.foretold is not None else ''
  )
  return (
    amount(p.flops) + (', held out' if p.held_out else ''),
    f'{p.params:,.0f}',
    f'{p.tokens:,}',
    f'{p.tokens / p.params:.3g}',
    '' if p.passes is None else f'{p.passes:.2g}',
    f'{p.rate:g}' + (' (at an end)' if p.at_edge else ''),
    *losses,
    '' if p.foretold is None else f'{p.foretold.value:.3f}',
    off,
  )


CSV_HEADER = (
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
  'foretold',
  'low',
  'high',
  'inside',
)


def csv_rows(results: ScalingResults) -> list[tuple[Any, ...]]:
  """One row a training of an architecture; what is not known is empty."""
  rows = [
    (
      f.title,
      p.flops,
      p.held_out,
      p.params,
      p.tokens,
      p.train_flops,
      p.flops_per_token,
      p.passes,
      p.rate,
      p.at_edge,
      len(p.losses),
      p.loss,
      *((p.foretold.value, p.foretold.low, p.foretold.high) if p.foretold else (None,) * 3),
      p.covered,
    )
    for f in results.families
    for p in f.points
  ]
  return [
    tuple('' if v is None or (isinstance(v, float) and not math.isfinite(v)) else v for v in row)
    for row in rows
  ]


# ---- figures -----------------------------------------------------------------------------------


def figures(results: ScalingResults) -> list[Figure]:
  """All that there are numbers for."""
  found = [figure for f in results.families for figure in (parabolas(f, results), agreement(f))]
  return [f for f in (*found, sizes(results), frontier(results)) if f is not None]


def parabolas(f: FamilyLaw, results: ScalingResults) -> Figure | None:
  """Loss against size, a curve a budget."""
  series = []
  for style, flops in enumerate(dict.fromkeys(p.flops for p in f.points)):
    points = [p for p in f.points if p.flops == flops and p.loss is not None]
    if len(points) and flops in f.parabolas:
      ends = np.geomspace(points[0].params, points[-1].params, CURVE)
      series.append(
        Series(
          '', style, tuple(At(n, f.parabolas[flops].at(n)) for n in ends), line=True, dots=False
        )
      )
    series.append(
      Series(
        amount(flops), style, tuple(At(p.params, p.loss) for p in points if p.loss is not None)
      )
    )
  note = 'Each curve is a parabola through the trainings of equal FLOPs, which stand beside it; those without one were held out.'
  return drawn(
    f'{f.title}: loss against size at equal training FLOPs',
    note,
    series,
    Axis(MATCHED[results.study.match], True, amount),
    Axis(NATS),
  )


def agreement(f: FamilyLaw) -> Figure | None:
  """What the law says of each training against what came."""

  def of(points: list[Point], bars: bool) -> tuple[At, ...]:
    return tuple(
      At(p.loss, p.foretold.value, *((p.foretold.low, p.foretold.high) if bars else ()))
      for p in points
      if p.loss is not None and p.foretold is not None
    )

  fitted, held_out = of(f.fitted, False), of(f.held_out, True)
  if not fitted:
    return None
  ends = [v for p in (*fitted, *held_out) for v in (p.x, p.y)]
  series = [
    Series('', 0, (At(min(ends), min(ends)), At(max(ends), max(ends))), line=True, dots=False),
    Series('fitted', 1, fitted),
    Series('held out', 2, held_out),
  ]
  note = 'On the line the two agree. Bars: where one more training lies by the law, with 95%.'
  return drawn(
    f'{f.title}: loss by the law against the loss that came',
    note,
    series,
    Axis(f'{NATS}, measured'),
    Axis('by the law'),
  )


def sizes(results: ScalingResults) -> Figure | None:
  series = []
  for style, f in enumerate(results.families):
    series.append(
      Series(
        f.title,
        style,
        tuple(At(o.flops, o.params.value, o.params.low, o.params.high) for o in f.optima),
        line=True,
        dots=False,
      )
    )
    series.append(
      Series('', style, tuple(At(flops, p.params) for flops, p in f.parabolas.items() if p.inside))
    )
  note = 'Lines by the law, points by the parabolas that are lowest among the sizes tried.'
  return drawn(
    'Best size against training FLOPs',
    note,
    series,
    Axis('training FLOPs', True, amount),
    Axis(MATCHED[results.study.match], True, amount),
  )


def frontier(results: ScalingResults) -> Figure | None:
  series = []
  for style, f in enumerate(results.families):
    series.append(
      Series(f.title, style, tuple(At(o.flops, o.loss) for o in f.optima), line=True, dots=False)
    )
    came = {
      flops: min(
        (p.loss for p in f.points if p.flops == flops and p.loss is not None), default=math.nan
      )
      for flops in dict.fromkeys(p.flops for p in f.points)
    }
    series.append(Series('', style, tuple(At(flops, loss) for flops, loss in came.items())))
  note = 'Lines: at the best size by the law. Points: the best training of each budget.'
  return drawn(
    'Loss against training FLOPs', note, series, Axis('training FLOPs', True, amount), Axis(NATS)
  )
