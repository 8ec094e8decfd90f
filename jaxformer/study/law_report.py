"""Tables and charts of a scaling study: laws, predictions, optimal sizes, and every training."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxformer.study.charts import Axis, Point, Series, line
from jaxformer.study.figures import Figure, drawn
from jaxformer.study.laws import FittedLaw, Interval, Optimum, Training
from jaxformer.study.results import Results
from jaxformer.study.sizing import MATCHED
from jaxformer.study.tables import NGRAMS_NOTE, YES_NO, Table, amount, table

CURVE = 40  # points of a drawn curve
LOSS = 'held-out loss'
SYMBOLS = ('E', 'A', 'B', 'α', 'β')  # of the coefficients, in their order


def fitted(results: Results) -> tuple[FittedLaw, ...]:
  """Return the laws of a scaling study, by architecture."""
  return results.tasks[0].laws


# ---- tables ------------------------------------------------------------------------------------


def number(value: float) -> str:
  """Format a number of any magnitude."""
  return amount(value) if value >= 1e3 else f'{value:.3g}'


def between(i: Interval | None) -> str:
  """Format a value with its interval."""
  return '' if i is None else f'{number(i.value)} ({i.ends(number)})'


def law_tables(results: Results) -> list[Table]:
  """Return the tables of laws, predictions and optimal sizes."""
  return [*coefficients(results), *predictions(results), *optimal_sizes(results)]


def coefficients(results: Results) -> list[Table]:
  note = (
    'Each coefficient with its 95% interval, by refits to randomly weighted trainings (Bayesian '
    'bootstrap); "not identified" if the trainings do not determine it. Residual: root mean square '
    'of log loss. R² is of log losses. Optimal size: N in proportion to FLOPs to this power.'
  )

  def row(f: FittedLaw) -> dict[str, str]:
    found = dict(zip(SYMBOLS, map(between, f.coefficients.values())))
    return {
      'architecture': f.title,
      **dict.fromkeys(SYMBOLS, ''),
      **(found or {'E': f.no_law or ''}),
      'optimal size': between(f.exponent),
      'residual': '' if f.residual is None else f'{f.residual:.2%}',
      'R²': '' if f.explained is None else f'{f.explained:.3f}',
      'trainings': f'{f.runs}',
    }

  return table('Laws', note, map(row, fitted(results)))


def predictions(results: Results) -> list[Table]:
  note = (
    'Held-out trainings, of more FLOPs than any that the law was fitted to. The interval is that '
    'of one more training: it covers the uncertainty of the law and the scatter of trainings '
    'around it, outliers excepted.'
  )
  rows = (
    {
      'architecture': f.title,
      'FLOPs': amount(t.train_flops),
      'parameters': f'{t.params:,.0f}',
      'tokens': f'{t.tokens:,}',
      'predicted': _predicted(t),
      '95% interval': t.predicted.ends() if t.predicted else '',
      'observed': _loss(t.loss),
      'relative error': _error(t),
      'within interval': YES_NO[t.within_interval],
    }
    for f in fitted(results)
    for t in f.held_out
  )
  return table('Predictions for held-out trainings', note, rows)


def _loss(value: float | None) -> str:
  return 'diverged' if value is None else f'{value:.3f}'


def _predicted(t: Training) -> str:
  return '' if t.predicted is None else f'{t.predicted.value:.3f}'


def _error(t: Training) -> str:
  return '' if t.relative_error is None else f'{t.relative_error:+.1%}'


def optimal_sizes(results: Results) -> list[Table]:
  laws = fitted(results)
  k = '; '.join(f'{f.title} {f.flops_law[0]:.3g} N^{f.flops_law[1]:.3f}' for f in laws)
  growth = '; '.join(
    f'{f.title} FLOPs^{p.a:.2f} ({p.low:.2f} to {p.high:.2f})'
    for f in laws
    if (p := f.parabola_exponent)
  )
  note = (
    'The size with the least loss at a number of training FLOPs: by the law, and by the minimum of '
    'a parabola through the losses of that budget, whose 95% interval is by resampled residuals. '
    + (f'By the parabolas the optimal size grows as: {growth}. ' if growth else '')
    + f'Training FLOPs per token, fitted to these models: {k}.'
  )
  rows = (
    {
      'architecture': f.title,
      'FLOPs': amount(o.flops),
      'parameters by the law': between(o.params),
      'tokens': amount(o.tokens),
      'tokens per parameter': f'{o.tokens / o.params.value:.3g}',
      'loss by the law': f'{o.loss:.3f}',
      'parameters by the parabola': _minimum(f, o),
    }
    for f in laws
    for o in f.optima
  )
  return table('Optimal sizes', note, rows)


def _minimum(f: FittedLaw, o: Optimum) -> str:
  if o.parabola is None:
    return f.no_parabola.get(f'{o.flops:g}', '')
  return between(o.parabola.interval) + ('' if o.parabola.inside else ', beyond the sizes tried')


def trainings(f: FittedLaw, results: Results) -> list[Table]:
  note = (
    'Passes: how often the training text was read; the law is one of fresh tokens. A rate at an '
    'end is the smallest or largest that was tried there.'
  )
  ngrams = results.tasks[0].ngrams
  if ngrams:
    scores = ', '.join(f'{order} model {v:.3f}' for order, v in ngrams.items())
    note += f' Loss of models of bytes: {scores}.{NGRAMS_NOTE}'
  rows = (
    {
      'budget': amount(t.flops) + (', held out' if t.held_out else ''),
      MATCHED[results.study.match]: f'{t.params:,.0f}',
      'tokens': f'{t.tokens:,}',
      'tokens per parameter': f'{t.tokens / t.params:.3g}',
      'passes': '' if t.passes is None else f'{t.passes:.2g}',
      'rate': f'{t.rate:g}' + (' (at an end)' if t.at_edge else ''),
      **{f'seed {seed}': _loss(loss) for seed, loss in t.losses.items()},
      'predicted': _predicted(t),
      'relative error': _error(t),
      **({'better than bigram': YES_NO[t.better_than_bigram]} if ngrams else {}),
    }
    for t in f.trainings
  )
  return table(f'Trainings: {f.title}', note, rows)


# ---- charts ------------------------------------------------------------------------------------


def law_figures(results: Results) -> list[Figure]:
  """Return the charts for which there is data."""
  found = [figure for f in fitted(results) for figure in (parabolas(f, results), agreement(f))]
  return [f for f in (*found, sizes(results), frontier(results)) if f is not None]


def parabolas(f: FittedLaw, results: Results) -> Figure | None:
  """Draw loss against size, one curve per budget."""
  series = []
  for style, (flops, points) in enumerate(_by_budget(f).items()):
    if points and flops in f.parabolas:
      ends = np.geomspace(points[0].x, points[-1].x, CURVE)
      series.append(line('', style, (Point(n, f.parabolas[flops].at(n)) for n in ends)))
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


def _by_budget(f: FittedLaw) -> dict[float, tuple[Point, ...]]:
  """FLOPs -> (parameters, loss) of the trainings that did not diverge."""
  return {
    flops: tuple(
      Point(t.params, t.loss) for t in f.trainings if t.flops == flops and t.loss is not None
    )
    for flops in dict.fromkeys(t.flops for t in f.trainings)
  }


def agreement(f: FittedLaw) -> Figure | None:
  """Draw the predicted against the observed loss of each training."""

  def points(of: list[Training]) -> tuple[Point, ...]:
    return tuple(Point(t.loss, *t.predicted) for t in of if t.loss and t.predicted)

  held_out = points(f.held_out)
  fit = tuple(Point(p.x, p.y) for p in points(f.fitted))  # bars are for the others
  if not fit:
    return None
  ends = [v for p in (*fit, *held_out) for v in (p.x, p.y)]
  series = [
    line('', 0, (Point(v, v) for v in (min(ends), max(ends)))),
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


def _point(x: float, i: Interval) -> Point:
  return Point(x, *i) if i.bounded else Point(x, i.value)


def sizes(results: Results) -> Figure | None:
  """Draw the optimal size against training FLOPs."""
  return _against_flops(
    results,
    'Optimal size',
    'Lines: by the law. Points: by parabolas whose minimum lies within the sizes tried. Values '
    'without a bar have no interval with two ends.',
    Axis(MATCHED[results.study.match], True, amount),
    lambda o: _point(o.flops, o.params),
    lambda f: [_point(c, p.interval) for c, p in f.parabolas.items() if p.inside],
  )


def frontier(results: Results) -> Figure | None:
  """Draw the loss against training FLOPs."""
  return _against_flops(
    results,
    'Loss',
    'Lines: at the optimal size by the law. Points: the best training of each budget.',
    Axis(LOSS),
    lambda o: Point(o.flops, o.loss),
    lambda f: [Point(c, min(p.y for p in of)) for c, of in _by_budget(f).items() if of],
  )


def _against_flops(
  results: Results,
  what: str,
  note: str,
  y: Axis,
  by_law: Callable[[Optimum], Point],
  points: Callable[[FittedLaw], Sequence[Point]],
) -> Figure | None:
  series = []
  for style, f in enumerate(fitted(results)):
    series.append(line(f.title, style, map(by_law, f.optima)))
    series.append(Series('', style, tuple(points(f))))
  x = Axis('training FLOPs', True, amount)
  return drawn(f'{what} against training FLOPs', note, series, x, y)
