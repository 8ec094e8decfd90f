"""Shared code of the claims that mixing attention with recurrent layers keeps recall: state size
by length, the verdict, the table and the pictures."""

from __future__ import annotations

import argparse

import gallery
import mixers
from mixers import between, outcomes, told

from jaxformer.study.charts import Axis, Point, Series
from jaxformer.study.results import Results, TaskResults, interval_form
from jaxformer.study.statistics import Difference
from jaxformer.study.tables import amount

HYBRID, ATTENTION = 'hybrid', 'attention'
MARGIN = 0.02  # of accuracy, within which recall counts as kept
CONTEXTS = tuple(2**n for n in range(6, 19))
FAR = 65_536
HEADER = (
  'model',
  'parameters',
  'recall (95 %)',
  'rate',
  'against attention, points',
  'state at 64',
  'at 4,096',
  f'at {FAR:,}',
)

Caches = dict[str, list[int]]
"""Bytes of one sequence's state of each model, at each of `CONTEXTS`."""


def decide(
  task: TaskResults, cache: Caches, recurrent: str, fraction: float
) -> tuple[gallery.Verdict, str]:
  """Return the verdict on a hybrid of attention and `recurrent`, and why. Its state at `FAR` tokens
  has to be less than `fraction` of attention's."""
  of, at = outcomes(task), CONTEXTS.index(FAR)
  hybrid, alone = of[HYBRID].difference, of[recurrent].difference
  kept = hybrid is not None and hybrid.estimate.low > -MARGIN
  lost = hybrid is not None and hybrid.estimate.high < -MARGIN
  behind = alone is not None and alone.verdict == 'worse'
  share = cache[HYBRID][at] / cache[ATTENTION][at]
  small = share < fraction
  verdict: gallery.Verdict = (
    'supported'
    if kept and behind and small
    else 'contradicted'
    if lost or not small
    else 'partly supported'
    if kept
    else 'not supported'
  )
  seeds = len(of[HYBRID].scores)
  whether = 'kept' if kept else 'lost' if lost else 'neither shown to be kept nor to be lost'
  return verdict, (
    f'Accuracy over {seeds} seeds with 95 % intervals: '
    f'{", ".join(told(task, o) for o in task.ranked)}. Paired differences in '
    f'points: hybrid - attention {in_points(hybrid)}, {recurrent} - attention {in_points(alone)}, '
    f'hybrid - {recurrent} {in_points(between(task, HYBRID, recurrent))}. '
    f'Recall is {whether} within {100 * MARGIN:.0f} points, and {recurrent} is '
    f'{"" if behind else "not supported to be "}behind attention. '
    f'At {FAR:,} tokens the hybrid keeps {share:.1%} of the bytes of attention '
    f'({amount(cache[HYBRID][at], "B")} of {amount(cache[ATTENTION][at], "B")}), {recurrent} '
    f'{amount(cache[recurrent][at], "B")} at any length.'
  )


def in_points(d: Difference | None) -> str:
  """Format a difference of accuracies."""
  if d is None:
    return 'none (a run diverged)'
  e = d.estimate
  return f'{100 * e.mean:+.1f} ({100 * e.low:+.1f} to {100 * e.high:+.1f}; p {d.p_adjusted:.2g})'


def rows(task: TaskResults, cache: Caches) -> tuple[tuple[str, ...], ...]:
  """Return the table under `HEADER`."""
  return tuple(
    (
      o.title,
      f'{o.params:,}',
      interval_form(task.metric, o.estimate),
      f'{o.rate:g}',
      in_points(o.difference) if o.verdict else '',
      *(amount(cache[o.title][CONTEXTS.index(n)], 'B') for n in (64, 4096, FAR)),
    )
    for o in task.outcomes
  )


def pictures(task: TaskResults, cache: Caches) -> list[gallery.Picture]:
  """Return recall against state size, and state size by length."""
  far = {name: float(sizes[CONTEXTS.index(FAR)]) for name, sizes in cache.items()}
  form, style = (lambda v: amount(v, 'B')), {name: i for i, name in enumerate(cache)}
  recall = [Series(name, style[name], (point,)) for name, point in mixers.points(task, far).items()]
  lines = [
    Series(
      name, style[name], tuple(Point(n, s) for n, s in zip(CONTEXTS, sizes, strict=True)), line=True
    )
    for name, sizes in cache.items()
  ]
  return [
    gallery.Picture.of(
      'recall',
      f'Recall against what is kept of {FAR:,} tokens; bars are 95 % intervals over seeds',
      recall,
      Axis('bytes', log=True, form=form),
      Axis('accuracy, %'),
    ),
    gallery.Picture.of(
      'cache',
      'State size of one sequence by its length',
      lines,
      Axis('tokens', log=True, form='{:,.0f}'.format),
      Axis('bytes', log=True, form=form),
    ),
  ]


def publish(
  args: argparse.Namespace,
  number: int,
  claim: str,
  verdict: gallery.Verdict,
  because: str,
  scale: str,
  results: Results,
  cache: Caches,
) -> None:
  """Write the claim's pictures, numbers and page."""
  task = results.tasks[0]
  numbers = mixers.numbers(results, cache={'contexts': CONTEXTS, **cache})
  gallery.publish(
    args,
    gallery.Result(number, claim, verdict, because, scale, HEADER, rows(task, cache), numbers),
    pictures(task, cache),
  )
