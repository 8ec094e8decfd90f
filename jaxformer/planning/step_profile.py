"""Where the predicted time of a training step goes: by phase, by layer, and by line of Python."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxformer.planning.hlo import Frame
from jaxformer.planning.step_clock import Timed

PHASES = ('forward', 'recompute', 'backward', 'loss', 'optimizer', 'communication', 'other')
SOURCES = 15
_PACKAGE = Path(__file__).resolve().parents[1]
# What wraps or calls the work of others: a line of theirs says more.
_CALLERS = (
  'models/stack.py',
  'models/params.py',
  'models/block.py',
  'sharding.py',
  'layers/layer.py',
)


@dataclasses.dataclass(frozen=True)
class TimeSource:
  """A line of Python, and what comes from it.

  Attributes:
    place: 'ops/linear.py:25', relative to the package, or a path outside it.
    operation: of the traced program, without loops and transformations.
    phase, layer, kind: see `StepProfile`.
    seconds, hidden, times, flops, bytes: sums of `Timed`.
  """

  place: str
  operation: str
  phase: str
  layer: str
  kind: str
  seconds: float
  hidden: float
  times: int
  flops: float
  bytes: float

  def plus(self, other: 'TimeSource') -> 'TimeSource':
    """The sums of two, as one."""
    fields = ('seconds', 'hidden', 'times', 'flops', 'bytes')
    sums = {name: getattr(self, name) + getattr(other, name) for name in fields}
    return dataclasses.replace(self, **sums)


@dataclasses.dataclass(frozen=True)
class StepProfile:
  """The predicted time of a program, broken down.

  Attributes:
    seconds: of one run.
    flops: of its products and kernels, on one device.
    by_kind: 'product', 'kernel', 'memory', 'communication' -> seconds.
    by_phase: `PHASES` -> seconds; what is communicated and not hidden is a phase of its own.
    by_layer: name of the class of a layer, 'Embedder', 'Head', 'Optimizer' or 'other' -> phase ->
      seconds, with 'communication' for those of the layer.
    hidden_communication: seconds of collectives behind computation.
    sources: all lines, the longest first.
  """

  seconds: float
  flops: float
  by_kind: dict[str, float]
  by_phase: dict[str, float]
  by_layer: dict[str, dict[str, float]]
  hidden_communication: float
  sources: list[TimeSource]

  def as_json(self) -> dict[str, Any]:
    """All of it as JSON data."""
    return dataclasses.asdict(self)


def profile_of(rows: Iterable[Timed], layers: Iterable[str]) -> StepProfile:
  """Break down the time of a program.

  Args:
    rows: of `time_program`.
    layers: names of the classes of the model's layers, which stand in its operations.
  """
  rows, named = list(rows), {*layers, 'Embedder', 'Head', 'Optimizer'}
  kinds: dict[str, float] = {}
  phases = dict.fromkeys(PHASES, 0.0)
  by_layer: dict[str, dict[str, float]] = {}
  sources: dict[tuple[str, ...], TimeSource] = {}

  def add(to: dict[str, float], key: str, seconds: float) -> None:
    to[key] = to.get(key, 0.0) + seconds

  for row in rows:
    layer = layer_of(row.operation, named)
    phase = phase_of(row, layer)
    add(kinds, row.kind, row.seconds)
    add(phases, phase, row.seconds)
    add(by_layer.setdefault(layer, {}), phase, row.seconds)
    what = TimeSource(
      _place(row.frames),
      _short(row.operation) or row.name,
      phase,
      layer,
      row.kind,
      row.seconds,
      row.hidden,
      row.times,
      row.flops,
      row.bytes,
    )
    key = what.place, what.operation, phase, layer, row.kind
    sources[key] = sources[key].plus(what) if key in sources else what
  return StepProfile(
    sum(kinds.values()),
    sum(row.flops for row in rows),
    kinds,
    phases,
    dict(sorted(by_layer.items(), key=lambda pair: -sum(pair[1].values()))),
    sum(r.hidden for r in rows if r.kind == 'communication'),
    sorted(sources.values(), key=lambda s: -s.seconds),
  )


def layer_of(operation: str, layers: Iterable[str]) -> str:
  """The last of the names of layers in an operation, 'other' if there is none."""
  found = [word for word in re.findall(r'\w+', operation) if word in layers]
  return found[-1] if found else 'other'


def phase_of(row: Timed, layer: str) -> str:
  """The phase of training in which an instruction is executed."""
  operation = row.operation
  if row.kind == 'communication':
    return 'communication'
  if layer in ('Head', 'Optimizer'):
    return {'Head': 'loss', 'Optimizer': 'optimizer'}[layer]
  if 'rematted_computation' in operation:
    return 'recompute'
  if 'transpose(' in operation:
    return 'backward'
  return 'forward' if 'jvp(' in operation or layer != 'other' else 'other'


def _place(frames: Sequence[Frame]) -> str:
  """The innermost frame that says where work comes from: of this package or of a user's file, not
  of an installed library, and not a mere caller; '' if there is none."""
  ours = [f for f in frames if 'site-packages' not in f.file and not f.file.startswith('<')]
  inside = [f for f in ours if not f.file.endswith(_CALLERS)]
  for frame in inside or ours:
    path = Path(frame.file)
    where = path.relative_to(_PACKAGE) if path.is_relative_to(_PACKAGE) else path
    return f'{where}:{frame.line}'
  return ''


def _short(operation: str) -> str:
  """An operation without the loops, calls and transformations around it."""
  operation = re.sub(r'\b(jit|jvp|transpose|vmap|checkpoint)\(([^()]*)\)', r'\2', operation)
  operation = re.sub(r'\b(jit|jvp|transpose|vmap|checkpoint)\(([^()]*)\)', r'\2', operation)
  noise = {'while', 'body', 'closed_call', 'checkpoint', 'rematted_computation', 'step', 'pjit', ''}
  return '/'.join(part for part in operation.split('/') if part not in noise)
