"""Charts of a report at one size."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from jaxformer.study.charts import Axis, Point, Series, chart
from jaxformer.study.results import Outcome, Results, TaskResults, cut_off
from jaxformer.study.tables import DECODING, amount, seconds

MAX_BIN = 16  # positions averaged into one point
Form = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A chart with its title and note."""

  title: str
  note: str
  svg: str


def figures(results: Results) -> list[Figure]:
  """Return the charts for which there is data, in the order of the report."""
  tasks = results.tasks
  found = [
    *(figure for task in tasks for figure in _quality(task, results)),
    *(figure for task in tasks for figure in _curves(task, results)),
    *(_positions(task) for task in tasks),
    *_contexts(results),
  ]
  return [figure for figure in found if figure is not None]


def drawn(title: str, note: str, series: Sequence[Series], x: Axis, y: Axis) -> Figure | None:
  """Draw a chart as a figure; None without points."""
  if not any(s.finite_points for s in series):
    return None
  return Figure(title, note, chart(series, x, y, title))


def _series(points: Mapping[str, Iterable[Point]], line: bool, dots: bool) -> list[Series]:
  """One series per architecture, in the order of the study."""
  return [
    Series(name, style, tuple(of), line, dots) for style, (name, of) in enumerate(points.items())
  ]


def _quality(task: TaskResults, results: Results) -> list[Figure | None]:
  """Return charts of the score against compute, training speed and state size."""
  good, axis = 'down', Axis(task.metric)
  if not task.lower_is_better:
    good, axis = 'up', Axis(task.metric, form=lambda v: f'{100 * v:g}%')

  def of(cost: Callable[[Outcome], float | None], label: str, what: str) -> Figure | None:
    points = {}
    for o in task.outcomes:
      value, e = cost(o), o.estimate
      points[o.title] = [Point(value, e.mean, *cut_off(task.metric, e))] if value and e else []
    faster = what == 'training speed'
    best = _best(points, task.lower_is_better, more=faster)
    note = f'Better is {good} and to the {"right" if faster else "left"}.' + (
      f' On the Pareto frontier: {", ".join(best)}.' if best else ''
    )
    title = f'{task.title}: {task.metric} against {what}'
    return drawn(title, note, _series(points, False, True), Axis(label, True, amount), axis)

  return [
    of(lambda o: o.train_flops_per_token, 'training FLOPs per token', 'compute'),
    of(
      lambda o: results.costs[o.title].tokens_per_second,
      'training tokens per second',
      'training speed',
    ),
    of(lambda o: o.state_bytes, f'bytes of state after {task.length} tokens', 'state'),
  ]


def _best(points: Mapping[str, Sequence[Point]], lower_is_better: bool, more: bool) -> list[str]:
  """Return the names on the Pareto frontier of the means: no other is at least as good in both
  quantities and better in one."""
  sign, side = (1 if lower_is_better else -1), (-1 if more else 1)
  at = {name: (side * p.x, sign * p.y) for name, of in points.items() for p in of}
  return [
    n
    for n, (x, y) in at.items()
    if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in at.values())
  ]


def _curves(task: TaskResults, results: Results) -> list[Figure | None]:
  """Return charts of the training loss against tokens, compute and, for the task whose training
  was timed, time."""

  def of(
    per_token: Callable[[Outcome], float | None], label: str, what: str, form: Form = amount
  ) -> Figure | None:
    points = {
      o.title: [Point(tokens * factor, loss) for tokens, loss in o.curve]
      if (factor := per_token(o))
      else []
      for o in task.outcomes
    }
    title = f'{task.title}: training loss against {what}'
    note = 'Mean over seeds, smoothed; nats per target.'
    series = _series(points, True, False)
    return drawn(title, note, series, Axis(label, True, form), Axis('training loss'))

  def seconds_per_token(o: Outcome) -> float | None:
    speed = results.costs[o.title].tokens_per_second
    return None if speed is None else 1 / speed

  found = [
    of(lambda o: 1.0, 'training tokens', 'tokens'),
    of(lambda o: o.train_flops_per_token, 'training FLOPs', 'compute'),
  ]
  if task is results.tasks[0]:
    found.append(of(seconds_per_token, 'time at the measured training speed', 'time', seconds))
  return found


def _positions(task: TaskResults) -> Figure | None:
  note = (
    'Held-out loss by the number of preceding tokens of the document, mean over seeds; nats. '
    f'Trained on {task.length} tokens.'
  )
  points = {o.title: _binned(o.position_loss or ()) for o in task.outcomes}
  return drawn(
    f'{task.title}: loss by position',
    note,
    _series(points, True, False),
    Axis('preceding tokens', True, amount),
    Axis('held-out loss'),
  )


def _binned(losses: Sequence[float | None]) -> list[Point]:
  """Means over bins that grow with the position: the axis is logarithmic."""
  known = [Point(i + 1, v) for i, v in enumerate(losses) if v is not None]
  points, i = [], 0
  while i < len(known):
    bin_ = known[i : i + max(1, min(MAX_BIN, i // 4))]
    points.append(Point(fmean(p.x for p in bin_), fmean(p.y for p in bin_)))
    i += len(bin_)
  return points


def _contexts(results: Results) -> list[Figure | None]:
  """Return charts of the costs of decoding against the context length."""

  def of(title: str, field: str, form: Form) -> Figure | None:
    points = {
      name: [Point(t.context_length, v) for t in c.contexts if (v := getattr(t, field))]
      for name, c in results.costs.items()
    }
    x, y = Axis('context length', True, amount), Axis(title.lower(), True, form)
    title = f'{title} against context length'
    return drawn(title, 'One sequence.', _series(points, True, True), x, y)

  return [of(*cost) for cost in DECODING]
