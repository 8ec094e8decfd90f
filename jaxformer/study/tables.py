"""Tables of a report at one size, shared by all its formats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxformer.inference import DecodeTime
from jaxformer.study.results import Outcome, Results, TaskResults, interval_form, score_form

MATCHED = {
  'params': 'parameters',
  'active_params': 'active parameters',
  'train_flops_per_token': 'training FLOPs per token',
  'state_bytes': 'bytes of state',
}


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text under a header; the first column is left-aligned."""

  title: str
  note: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def amount(value: float | None, unit: str = '') -> str:
  """Format a count: 6.7M."""
  if value is None:
    return ''
  for prefix, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if abs(value) >= size:
      return f'{value / size:.3g}{" " if unit else ""}{prefix}{unit}'
  return f'{value:.3g}{" " + unit if unit else ""}'


def seconds(value: float | None) -> str:
  """Format a time: 12 ms."""
  if value is None:
    return ''
  for unit, size in (('s', 1.0), ('ms', 1e-3), ('µs', 1e-6)):
    if abs(value) >= size:
      return f'{value / size:.3g} {unit}'
  return f'{value * 1e6:.2g} µs'


def score_tables(results: Results) -> list[Table]:
  """Return the tables of scores, by task."""
  return [
    table
    for t in results.tasks
    for table in (scores(t, results), *pairs(t), *translations(t, results))
  ]


def detail_tables(results: Results) -> list[Table]:
  """Return the tables of sizes, costs and tuning."""
  return [
    *(sizes(t, results) for t in results.tasks),
    *costs(results),
    *(tuning(t) for t in results.tasks if any(o.tried for o in t.outcomes)),
  ]


def scores(task: TaskResults, results: Results) -> Table:
  note = (
    f'Mean and 95% interval (Student) of {task.metric} over seeds, '
    f'{"lower" if task.lower_is_better else "higher"} is better; scored on {task.scored_on}. '
    'Differences are paired by seed, with the interval of this comparison alone (of accuracies in '
    'percentage points); p is corrected for all comparisons of the task (Holm) and decides the '
    'verdict.'
  )
  header = (
    'architecture',
    task.metric,
    f'difference from {results.baseline}',
    '95% interval',
    'p (Holm)',
    'verdict',
    'rate',
    'seeds',
  )
  rows = tuple(_score_row(o, task.metric) for o in task.ranked)
  return Table(f'Scores: {task.title}', note, header, rows)


def pairs(task: TaskResults) -> list[Table]:
  """Return the differences of all pairs, where they are compared."""
  if not task.pairs:
    return []
  cells: dict[tuple[str, str], str] = {}
  for d in task.pairs:
    mark = '*' if d.verdict in ('better', 'worse') else ''
    cells[d.name, d.against] = _signed(task.metric, d.estimate.mean) + mark
    cells[d.against, d.name] = _signed(task.metric, -d.estimate.mean) + mark
  names = list(dict.fromkeys(n for d in task.pairs for n in (d.name, d.against)))
  note = (
    f'{task.metric.capitalize()} of the row minus that of the column, paired by seed, from the '
    f'best mean on. * marks significant differences, corrected for all {len(task.pairs)} pairs '
    '(Holm, 5%).'
  )
  rows = tuple((a, *(cells.get((a, b), '') for b in names)) for a in names)
  return [Table(f'Scores, all pairs: {task.title}', note, ('architecture', *names), rows)]


def _score_row(o: Outcome, metric: str) -> tuple[str, ...]:
  d = o.difference
  diverged = sum(v is None for v in o.scores.values())
  runs = f'{len(o.scores)}' + (f' ({diverged} diverged)' if diverged else '')
  between = (
    ''
    if d is None or not math.isfinite(d.estimate.low)
    else ' to '.join(
      _signed(metric, max(-1.0, min(1.0, v)) if metric == 'accuracy' else v)
      for v in (d.estimate.low, d.estimate.high)
    )
  )
  return (
    o.title,
    interval_form(metric, o.estimate),
    '' if d is None else _signed(metric, d.estimate.mean),
    between,
    '' if d is None or math.isnan(d.p_adjusted) else f'{d.p_adjusted:.2g}',
    o.verdict or 'baseline',
    f'{o.rate:g}',
    runs,
  )


def _signed(metric: str, value: float) -> str:
  size = f'{100 * abs(value):.1f} pts' if metric == 'accuracy' else score_form(metric, abs(value))
  return f'{"−" if value < 0 else "+"}{size}'


def translations(task: TaskResults, results: Results) -> list[Table]:
  """Return the scores of translations, for a task of source-target pairs."""
  found = {o.title: o.translation for o in task.ranked if o.translation}
  if not found:
    return []
  measures = list(next(iter(found.values())))
  forms = {m: 'accuracy' if m == 'exact match' else m for m in measures}
  rows = tuple(
    (title, *(interval_form(forms[m], of[m]) for m in measures)) for title, of in found.items()
  )
  note = (
    f'Mean and 95% interval (Student) over seeds, of at most {results.study.translations:,} '
    'held-out texts, decoded greedily.'
  )
  return [Table(f'Scores of translations: {task.title}', note, ('architecture', *measures), rows)]


def sizes(task: TaskResults, results: Results) -> Table:
  s = results.study
  matched = f'{MATCHED[s.match]}, {s.target:,.0f}, within {s.tolerance:.0%}'
  note = f'Matched: {matched}. FLOPs and state at {task.length} tokens.'
  header = (
    'architecture',
    'parameters',
    'active',
    'size error',
    'training FLOPs per token',
    'state',
  )
  rows = tuple(
    (
      o.title,
      f'{o.params:,}',
      f'{o.active_params:,}',
      f'{o.size_error:+.2%}',
      amount(o.train_flops_per_token),
      amount(o.state_bytes, 'B'),
    )
    for o in task.outcomes
  )
  return Table(f'Sizes: {task.title}', note, header, rows)


def costs(results: Results) -> list[Table]:
  found = results.costs
  device = results.environment.get('devices', {})
  where = f'{device.get("count", 1)} × {device.get("kind", "device")}'
  out = []
  if any(c.tokens_per_second is not None for c in found.values()):
    note = (
      f'One run at a time on {where}; the median of {results.study.timing_repeats} timings, in '
      'which the architectures take turns. Memory of the training step is what the compiler '
      'reserves.'
    )
    out.append(
      Table(
        'Costs of training',
        note,
        ('architecture', 'tokens per second', 'compilation', 'memory of the step'),
        tuple(
          (n, amount(c.tokens_per_second), seconds(c.compile_seconds), amount(c.step_bytes, 'B'))
          for n, c in found.items()
        ),
      )
    )
  lengths = sorted({a.context_length for c in found.values() for a in c.contexts})
  if lengths:

    def row(name: str, of: Callable[[DecodeTime], str]) -> tuple[str, ...]:
      at = {a.context_length: a for a in found[name].contexts}
      return (name, *(of(at[n]) if n in at else '' for n in lengths))

    kinds = (
      ('Prefill time', lambda a: seconds(a.prefill_seconds)),
      ('Decoding, time per token', lambda a: seconds(a.seconds_per_token)),
      ('State size', lambda a: amount(a.state_bytes, 'B')),
    )
    header = ('architecture', *(f'{n:,} tokens' for n in lengths))
    out += [
      Table(
        title,
        f'One sequence, by context length, on {where}.',
        header,
        tuple(row(n, of) for n in found),
      )
      for title, of in kinds
    ]
  return out


def tuning(task: TaskResults) -> Table:
  rates = sorted({rate for o in task.outcomes for rate, _ in o.tried})
  rows = tuple(
    (
      o.title,
      *(_tried(o, rate, task.metric) for rate in rates),
      f'{o.rate:g}',
      'yes' if o.at_edge else '',
    )
    for o in task.outcomes
  )
  note = (
    f'{task.metric.capitalize()} of the tuning seed, which is excluded from the comparison. The '
    'rate with the least held-out loss is used; where it lies at an end, the grid was extended.'
  )
  return Table(
    f'Tuning: {task.title}',
    note,
    ('architecture', *(f'{r:g}' for r in rates), 'used', 'at an end'),
    rows,
  )


def _tried(o: Outcome, rate: float, metric: str) -> str:
  found = dict(o.tried)
  if rate not in found:
    return ''
  return 'diverged' if found[rate] is None else score_form(metric, found[rate])


CSV_HEADER = (
  'task',
  'architecture',
  'metric',
  'mean',
  'low',
  'high',
  'seeds',
  'diverged',
  'difference',
  'difference_low',
  'difference_high',
  'p',
  'p_holm',
  'verdict',
  'learning_rate',
  'at_edge',
  'params',
  'active_params',
  'size_error',
  'train_flops_per_token',
  'state_bytes',
  'tokens_per_second',
  'compile_seconds',
  'step_bytes',
)


def csv_rows(results: Results) -> list[tuple[Any, ...]]:
  """Return one row per task and architecture; missing or infinite values are empty."""
  return [_csv_row(task, o, results) for task in results.tasks for o in task.outcomes]


def _csv_row(task: TaskResults, o: Outcome, results: Results) -> tuple[Any, ...]:
  e, d, c = o.estimate, o.difference, results.costs[o.title]
  values = (
    task.title,
    o.title,
    task.metric,
    e and e.mean,
    e and e.low,
    e and e.high,
    len(o.scores),
    sum(v is None for v in o.scores.values()),
    d and d.estimate.mean,
    d and d.estimate.low,
    d and d.estimate.high,
    d and d.p,
    d and d.p_adjusted,
    o.verdict or 'baseline',
    o.rate,
    o.at_edge,
    o.params,
    o.active_params,
    o.size_error,
    o.train_flops_per_token,
    o.state_bytes,
    c.tokens_per_second,
    c.compile_seconds,
    c.step_bytes,
  )
  return tuple(map(cell, values))


def cell(value: Any) -> Any:
  """Return a CSV cell: empty for a missing or infinite value."""
  return '' if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
