"""Tables of a report at one size, shared by all its formats."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

from jaxformer.study.results import (
  DIVERGED,
  Outcome,
  Results,
  TaskResults,
  cut_off,
  interval_form,
  score_form,
)
from jaxformer.study.sizing import MATCHED


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text under a header; the first column is left-aligned."""

  title: str
  note: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def table(title: str, note: str, rows: Iterable[Mapping[str, str]]) -> list[Table]:
  """Return the table of rows of cells by column, in a list that is empty without rows. A cell that
  a row lacks is empty."""
  found = list(rows)
  header = tuple(dict.fromkeys(column for row in found for column in row))
  cells = tuple(tuple(row.get(column, '') for column in header) for row in found)
  return [Table(title, note, header, cells)] if found else []


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


YES_NO = {True: 'yes', False: 'no', None: ''}
NGRAMS_NOTE = (
  ' The unigram and bigram models predict each byte by counts of the training text, and are scored '
  'on all held-out text.'
)
# title, field of `DecodeTime`, and format of each cost of decoding
DECODING: tuple[tuple[str, str, Callable[[float], str]], ...] = (
  ('Prefill time', 'prefill_seconds', seconds),
  ('Decoding time per token', 'seconds_per_token', seconds),
  ('State size', 'state_bytes', functools.partial(amount, unit='B')),
)


def score_tables(results: Results) -> list[Table]:
  """Return the tables of scores, by task."""
  return [
    table
    for t in results.tasks
    for table in (*scores(t, results), *pairs(t), *translations(t, results))
  ]


def detail_tables(results: Results) -> list[Table]:
  """Return the tables of sizes, costs and tuning."""
  return [
    *(table for t in results.tasks for table in sizes(t, results)),
    *costs(results),
    *(table for t in results.tasks for table in tuning(t)),
  ]


def scores(task: TaskResults, results: Results) -> list[Table]:
  corrected = f'{len(task.pairs)} pairs' if task.pairs else f'comparisons with {results.baseline}'
  note = (
    f'Mean and 95% interval (Student) of {task.metric} over seeds, '
    f'{"lower" if task.lower_is_better else "higher"} is better; scored on {task.scored_on}. '
    'Differences are paired by seed, with the interval of this comparison alone (of accuracies in '
    f'percentage points); p is corrected for all {corrected} (Holm) and decides the verdict.'
    + (NGRAMS_NOTE if task.ngrams else '')
  )

  def row(o: Outcome) -> dict[str, str]:
    diverged = sum(v is None for v in o.scores.values())
    difference = between = p = ''
    if d := o.difference:
      difference = _signed(task.metric, d.estimate.mean)
      if math.isfinite(d.estimate.low):
        ends = cut_off(task.metric, d.estimate, least=-1.0)
        between = ' to '.join(_signed(task.metric, v) for v in ends)
      p = '' if math.isnan(d.p_adjusted) else f'{d.p_adjusted:.2g}'
    return {
      'architecture': o.title,
      task.metric: interval_form(task.metric, o.estimate),
      f'difference from {results.baseline}': difference,
      '95% interval': between,
      'p (Holm)': p,
      'verdict': o.verdict or 'baseline',
      **({'better than bigram': YES_NO[o.better_than_bigram]} if task.ngrams else {}),
      'rate': f'{o.rate:g}',
      'seeds': f'{len(o.scores)}' + (f' ({diverged} diverged)' if diverged else ''),
    }

  rows = [(math.inf if o.estimate is None else o.estimate.mean, row(o)) for o in task.ranked]
  if task.ngrams:
    for order, v in task.ngrams.items():
      cells = {'architecture': f'{order} model of bytes', task.metric: score_form(task.metric, v)}
      rows.append((v, cells))
    rows.sort(key=lambda scored: scored[0])
  return table(f'Scores: {task.title}', note, [cells for _, cells in rows])


def pairs(task: TaskResults) -> list[Table]:
  """Return the differences of all pairs, where they are compared."""
  cells: dict[tuple[str, str], str] = {}
  for d in task.pairs:
    mark = '*' if d.verdict in ('better', 'worse') else ''
    cells[d.name, d.against] = _signed(task.metric, d.estimate.mean) + mark
    cells[d.against, d.name] = _signed(task.metric, -d.estimate.mean) + mark
  names = list(dict.fromkeys(name for pair in cells for name in pair))
  note = (
    f'{task.metric.capitalize()} of the row minus that of the column, paired by seed, from the '
    f'best mean on. * marks significant differences, corrected for all {len(task.pairs)} pairs '
    '(Holm, 5%).'
  )
  rows = ({'architecture': a} | {b: cells.get((a, b), '') for b in names} for a in names)
  return table(f'Scores, all pairs: {task.title}', note, rows)


def _signed(metric: str, value: float) -> str:
  size = f'{100 * abs(value):.1f} pts' if metric == 'accuracy' else score_form(metric, abs(value))
  return f'{"−" if value < 0 else "+"}{size}'


def translations(task: TaskResults, results: Results) -> list[Table]:
  """Return the scores of translations, for a task of source-target pairs."""
  forms = {'exact match': 'accuracy'}
  rows = (
    {'architecture': o.title}
    | {m: interval_form(forms.get(m, m), e) for m, e in o.translation.items()}
    for o in task.ranked
    if o.translation
  )
  note = (
    f'Mean and 95% interval (Student) over seeds, of at most {results.study.translations:,} '
    'held-out texts, decoded greedily.'
  )
  return table(f'Scores of translations: {task.title}', note, rows)


def sizes(task: TaskResults, results: Results) -> list[Table]:
  s = results.study
  note = (
    f'Matched: {MATCHED[s.match]}, {s.target:,.0f}, within {s.tolerance:.0%}. FLOPs and state at '
    f'{task.length} tokens.'
  )
  rows = (
    {
      'architecture': o.title,
      'parameters': f'{o.params:,}',
      'active': f'{o.active_params:,}',
      'size error': f'{o.size_error:+.2%}',
      'training FLOPs per token': amount(o.train_flops_per_token),
      'state': amount(o.state_bytes, 'B'),
    }
    for o in task.outcomes
  )
  return table(f'Sizes: {task.title}', note, rows)


def costs(results: Results) -> list[Table]:
  device = results.environment.get('devices', {})
  where = f'{device.get("count", 1)} × {device.get("kind", "device")}'
  note = (
    f'One run at a time on {where}; the median of {results.study.timing_repeats} timings, in '
    'which the architectures take turns. Memory of the training step is what the compiler '
    'reserves.'
  )
  training = (
    {
      'architecture': name,
      'tokens per second': amount(c.tokens_per_second),
      'compilation': seconds(c.compile_seconds),
      'memory of the step': amount(c.step_bytes, 'B'),
    }
    for name, c in results.costs.items()
    if c.tokens_per_second is not None
  )

  def decoding(title: str, field: str, form: Callable[[float], str]) -> list[Table]:
    rows = [
      {'architecture': name}
      | {f'{t.context_length:,} tokens': form(getattr(t, field)) for t in c.contexts}
      for name, c in results.costs.items()
    ]
    note = f'One sequence, by context length, on {where}.'
    return table(title, note, rows) if any(len(row) > 1 for row in rows) else []

  return [
    *table('Costs of training', note, training),
    *(found for cost in DECODING for found in decoding(*cost)),
  ]


def tuning(task: TaskResults) -> list[Table]:
  """Return the scores at each learning rate, if rates were tuned."""
  rates = sorted({rate for o in task.outcomes for rate, _ in o.tried})

  def row(o: Outcome) -> dict[str, str]:
    tried = {rate: score_form(task.metric, score, DIVERGED) for rate, score in o.tried}
    cells = {f'{rate:g}': tried.get(rate, '') for rate in rates}
    edge = 'yes' if o.at_edge else ''
    return {'architecture': o.title, **cells, 'used': f'{o.rate:g}', 'at an end': edge}

  note = (
    f'{task.metric.capitalize()} of the tuning seed, which is excluded from the comparison. The '
    'rate with the least held-out loss is used; where it lies at an end, the grid was extended.'
  )
  return table(f'Tuning: {task.title}', note, map(row, task.outcomes)) if rates else []
