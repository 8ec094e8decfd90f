"""Charts of a report at one size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from jaxformer.study.charts import Axis, Point, Series, chart
from jaxformer.study.results import Outcome, Results, TaskResults
from jaxformer.study.tables import amount, seconds

MAX_BIN = 16  # positions averaged into one point


@dataclasses.dataclass(frozen=True)
class Figure:
  """A chart with its title and note."""

  title: str
  note: str
  svg: str


def figures(results: Results) -> list[Figure]:
  """Return the charts for which there is data, in the order of the report."""
  style = {e.title: i for i, e in enumerate(results.study.entries)}
  found: list[Figure | None] = []
  for task in results.tasks:
    found += _quality(task, results, style)
  for task in results.tasks:
    found += _curves(task, results, style)
  found += [_positions(task, style) for task in results.tasks]
  found += _contexts(results, style)
  return [f for f in found if f is not None]


def drawn(title: str, note: str, series: Sequence[Series], x: Axis, y: Axis) -> Figure | None:
  """Draw a chart as a figure; None without points."""
  if not any(math.isfinite(p.y) for s in series for p in s.points):
    return None
  return Figure(title, note, chart(series, x, y, title))


def _quality(task: TaskResults, results: Results, style: dict[str, int]) -> list[Figure | None]:
  """Return charts of the score against compute, training speed and state size."""

  def of(cost: Callable[[Outcome], float | None], label: str, what: str) -> Figure | None:
    series = []
    for o in task.outcomes:
      value, e = cost(o), o.estimate
      if value and e:
        scale = 1.0 if task.lower_is_better else 100.0
        ends = (e.low * scale, e.high * scale) if math.isfinite(e.low) else (None, None)
        ends = (
          ends
          if task.lower_is_better or ends[0] is None or ends[1] is None
          else (max(0.0, ends[0]), min(100.0, ends[1]))
        )
        series.append(Series(o.title, style[o.title], (Point(value, e.mean * scale, *ends),)))
    best = _best(series, task.lower_is_better, more=what == 'training speed')
    good = 'down' if task.lower_is_better else 'up'
    right = 'right' if what == 'training speed' else 'left'
    note = f'Better is {good} and to the {right}.' + (
      f' On the Pareto frontier: {", ".join(best)}.' if best else ''
    )
    return drawn(
      f'{task.title}: {task.metric} against {what}',
      note,
      series,
      Axis(label, True, amount),
      _score_axis(task),
    )

  def speed(o: Outcome) -> float | None:
    return results.costs[o.title].tokens_per_second

  return [
    of(lambda o: o.train_flops_per_token, 'training FLOPs per token', 'compute'),
    of(speed, 'training tokens per second', 'training speed'),
    of(lambda o: o.state_bytes, f'bytes of state after {task.length} tokens', 'state'),
  ]


def _best(series: Sequence[Series], lower_is_better: bool, more: bool) -> list[str]:
  """Return the names on the Pareto frontier of the means: no other is at least as good in both
  quantities and better in one."""
  sign, side = (1 if lower_is_better else -1), (-1 if more else 1)
  at = {s.name: (side * s.points[0].x, sign * s.points[0].y) for s in series}
  return [
    n
    for n, (x, y) in at.items()
    if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in at.values())
  ]


def _score_axis(task: TaskResults) -> Axis:
  return Axis(task.metric) if task.lower_is_better else Axis('accuracy', form=lambda v: f'{v:g}%')


def _curves(task: TaskResults, results: Results, style: dict[str, int]) -> list[Figure | None]:
  def of(
    factor: Callable[[Outcome], float | None], label: str, what: str, form: Callable[[float], str]
  ) -> Figure | None:
    series = []
    for o in task.outcomes:
      per_token = factor(o)
      if per_token:
        points = tuple(Point(tokens * per_token, loss) for tokens, loss in o.curve)
        series.append(Series(o.title, style[o.title], points, line=True, dots=False))
    return drawn(
      f'{task.title}: training loss against {what}',
      'Mean over seeds, smoothed; nats per target.',
      series,
      Axis(label, True, form),
      Axis('training loss'),
    )

  def second(o: Outcome) -> float | None:
    speed = results.costs[o.title].tokens_per_second
    return None if speed is None else 1 / speed

  return [
    of(lambda o: 1.0, 'training tokens', 'tokens', amount),
    of(lambda o: o.train_flops_per_token, 'training FLOPs', 'compute', amount),
    of(second, 'time at the measured training speed', 'time', seconds)
    if task is results.tasks[0]
    else None,
  ]


def _positions(task: TaskResults, style: dict[str, int]) -> Figure | None:
  series = []
  for o in task.outcomes:
    loss = [(i, v) for i, v in enumerate(o.position_loss or ()) if v is not None]
    points, i = [], 0
    while i < len(loss):  # bins grow with the position: the axis is logarithmic
      bin_ = loss[i : i + max(1, min(MAX_BIN, i // 4))]
      points.append(
        Point(sum(p for p, _ in bin_) / len(bin_) + 1, sum(v for _, v in bin_) / len(bin_))
      )
      i += len(bin_)
    series.append(Series(o.title, style[o.title], tuple(points), line=True, dots=False))
  note = (
    'Held-out loss by the number of preceding tokens of the document, mean over seeds; nats. '
    f'Trained on {task.length} tokens.'
  )
  return drawn(
    f'{task.title}: loss by position',
    note,
    series,
    Axis('preceding tokens', True, amount),
    Axis('held-out loss'),
  )


def _contexts(results: Results, style: dict[str, int]) -> list[Figure | None]:
  def of(value: Callable, title: str, label: str, form: Callable[[float], str]) -> Figure | None:
    series = [
      Series(
        n,
        style[n],
        tuple(Point(a.context_length, v) for a in c.contexts if (v := value(a))),
        line=True,
      )
      for n, c in results.costs.items()
    ]
    return drawn(
      title, 'One sequence.', series, Axis('context length', True, amount), Axis(label, True, form)
    )

  return [
    of(
      lambda a: a.seconds_per_token,
      'Decoding time against context length',
      'time per token',
      seconds,
    ),
    of(lambda a: a.prefill_seconds, 'Prefill time against context length', 'prefill', seconds),
    of(
      lambda a: a.state_bytes,
      'State size against context length',
      'bytes of state',
      lambda v: amount(v, 'B'),
    ),
  ]
