"""Predicted time of a compiled TPU program: the schedule of its HLO text, instruction by
instruction.

The TPU compiler writes the cycles that it expects of an instruction into the program. Those of
large matrix products agree with the rates that chips are known to reach; those of the rest are far
below what the memory can do (docs/clock.md). So

- a fusion with a matrix product takes the compiler's cycles at the clock of the chip, or as long
  as its traffic with the high-bandwidth memory (HBM), what is longer;
- any other takes as long as its traffic (`hlo_bytes`), and one that stays in on-chip memory the
  compiler's cycles;
- a Pallas kernel takes its FLOPs at the share of the peak that `kernel_time` gives, or as long as
  its traffic;
- a collective takes what `links` says.

The text is in the order in which the program executes. A transfer or a collective with a start and
a done proceeds while the instructions between them execute: transfers as fast as those leave HBM
unused, collectives at their full speed, one after another if they use the same links. What is left
at the done is waited for. A loop counts as often as it runs; of a conditional the longest branch
counts."""

import dataclasses
import re
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from jaxformer.hardware import Chip
from jaxformer.planning.collectives import KINDS, Collective, collective_of
from jaxformer.planning.hlo import Frame, Instruction, Program
from jaxformer.planning.hlo_bytes import bytes_moved, hbm_bytes_of_each
from jaxformer.planning.hlo_flops import flops_of
from jaxformer.planning.kernel_time import kernel_time
from jaxformer.planning.links import Links

# Instructions that only name, or describe, what others compute.
_FREE = (
  'parameter',
  'constant',
  'get-tuple-element',
  'tuple',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'add-dependency',
  'domain',
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Timed:
  """One instruction in all its executions during a run of the program.

  Attributes:
    kind: 'product', 'kernel', 'memory' or 'communication'.
    seconds: by which the program is longer because of it.
    hidden: seconds of a transfer or a collective behind other instructions.
    times: executions.
    flops: of products and kernels.
    bytes: moved to and from HBM; of a collective, its results.
    name: of the instruction.
    operation: of the traced program, such as 'jit(step)/jvp()/while/body/...'.
    frames: of the Python program, innermost first.
  """

  kind: str
  seconds: float
  hidden: float
  times: int
  flops: float
  bytes: float
  name: str
  operation: str
  frames: tuple[Frame, ...]

  def repeated(self, times: int) -> 'Timed':
    return dataclasses.replace(
      self,
      seconds=times * self.seconds,
      hidden=times * self.hidden,
      times=times * self.times,
      flops=times * self.flops,
      bytes=times * self.bytes,
    )


def time_program(compiled: jax.stages.Compiled | str, mesh: Mesh, chip: Chip) -> list[Timed]:
  """The instructions of a program that take time, or hide it, on one device.

  Args:
    compiled: a program for the devices of `mesh`, or its HLO text.
    chip: a TPU whose `clock_hz` and links are known.
  """
  program = Program(compiled)
  return _Clock(program, Links(mesh, chip), chip).run(program.entry)


class _Clock:
  """Executes the schedule of a program."""

  def __init__(self, program: Program, links: Links, chip: Chip):
    self.program, self.links, self.chip = program, links, chip
    self._hbm = chip.bytes_per_second / chip.devices
    self._known: dict[str, list[Timed]] = {}

  def run(self, name: str) -> list[Timed]:
    """The instructions of one execution of a computation, those inside loops repeated."""
    if name not in self._known:
      self._known[name] = list(self._execute(name))
    return self._known[name]

  def _execute(self, name: str) -> Iterable[Timed]:
    queues = _Queues()
    for i in self.program.computations[name].values():
      inside, times = self.program.calls(i)
      if i.operation in _FREE:
        continue
      if i.operation == 'while':
        yield from (t.repeated(times) for t in self.run(inside[0]))
      elif i.operation in ('conditional', 'call'):
        branches = [self.run(b) for b in inside]
        yield from max(branches, key=lambda rows: sum(t.seconds for t in rows), default=[])
      else:
        yield from self._instruction(i, queues)

  def _instruction(self, i: Instruction, queues: '_Queues') -> Iterable[Timed]:
    if (started := self._started(i)) is not None:
      queues.start(*started)
    elif (source := self._ended(i)) is not None:
      waited = queues.wait(source)
      if waited is not None:
        link, exposed, hidden, size = waited
        kind = 'memory' if link == 'hbm' else 'communication'
        yield self._row(i, kind, exposed, hidden=hidden, bytes=size)
    elif (sent := self._collective(i)) is not None:
      seconds = self.links.seconds(sent)
      queues.advance(seconds, 0.0)
      yield self._row(i, 'communication', seconds, bytes=sent.bytes)
    else:
      kind, seconds, busy, flops, moved = self._computation(i)
      queues.advance(seconds, busy)
      if seconds:
        yield self._row(i, kind, seconds, flops=flops, bytes=moved)

  def _row(self, i: Instruction, kind: str, seconds: float, *, hidden=0.0, flops=0.0, bytes=0.0):
    operation = i.attribute('op_name')
    return Timed(kind, seconds, hidden, 1, flops, bytes, i.name, operation, self.program.frames(i))

  # ---- what an instruction is --------------------------------------------------------------------

  def _started(self, i: Instruction) -> tuple[str, str, float, float] | None:
    """(key, queue, seconds, bytes) of what an instruction starts; None if it starts nothing. The
    key of a collective is its channel, of anything else the name of the instruction."""
    kind, start = i.operation.removesuffix('-start'), i.operation.endswith('-start')
    sent = None
    if start and kind in KINDS:
      sent = collective_of(kind, i, 1)
    elif i.operation == 'async-start' or self._marked(i, 'AsyncCollectiveStart'):
      sent = self._sent_inside(i)
    if sent is not None:
      key = self._channel(i) if i.operation == 'fusion' else i.name
      return key, sent.devices, self.links.seconds(sent), float(sent.bytes)
    if not start:
      return None
    # The result holds the source and the destination, of which the smaller is moved.
    arrays = [b for b in hbm_bytes_of_each(i.shape)[:2] if b]
    moved = float(min(arrays, default=0) * len(arrays))
    return i.name, 'hbm', moved / self._hbm, moved

  def _ended(self, i: Instruction) -> str | None:
    """The key of what an instruction waits for; None if it waits for nothing."""
    if i.operation.endswith('-done'):
      return i.operand(0).name
    return self._channel(i) if self._marked(i, 'AsyncCollectiveDone') else None

  def _marked(self, i: Instruction, mark: str) -> bool:
    """Whether the computation that a fusion calls holds the mark of an asynchronous collective."""
    inside = self.program.computations.get(i.attribute('calls'), {})
    return any(f'"{mark}"' in j.rest for j in inside.values())

  def _channel(self, i: Instruction) -> str:
    inside = self.program.computations[i.attribute('calls')]
    return 'channel ' + max(j.attribute('channel_id') for j in inside.values())

  def _sent_inside(self, i: Instruction) -> Collective | None:
    """The collective in the computation that an instruction calls."""
    inside = self.program.computations.get(i.attribute('calls'), {})
    for j in inside.values():
      kind = j.operation.removesuffix('-start')
      if kind in KINDS:
        return collective_of(kind, j, 1)
    return None

  def _collective(self, i: Instruction) -> Collective | None:
    """The collective that an instruction executes from begin to end."""
    if i.operation in KINDS:
      return collective_of(i.operation, i, 1)
    if i.attribute('calls').startswith('all-reduce-scatter'):
      among = self._sent_inside(i)
      assert among is not None
      return collective_of('reduce-scatter', i, 1)._replace(devices=among.devices)
    return None

  def _computation(self, i: Instruction) -> tuple[str, float, float, float, float]:
    """(kind, seconds, of these with HBM busy, FLOPs, bytes) of an instruction."""
    flops, moved = flops_of(self.program, i), bytes_moved(self.program, i)
    traffic = moved / self._hbm
    if i.operation == 'custom-call':
      if i.attribute('custom_call_target') != 'tpu_custom_call':
        return 'memory', 0.0, 0.0, 0.0, 0.0  # reserves memory, or marks a place
      work, computed = kernel_time(i, self.chip)
      return 'kernel', max(computed, traffic), traffic, work, moved
    found = _CYCLES.search(i.rest)
    cycles = int(found.group(1)) / self._clock if found else 0.0
    if flops.products:
      if 'async_collective_fusion' in i.attribute('calls'):
        traffic = moved = 0.0  # it passes on what the collective writes
      return 'product', max(cycles, traffic), traffic, flops.products, moved
    return 'memory', traffic or cycles, traffic, 0.0, moved

  @property
  def _clock(self) -> float:
    assert self.chip.clock_hz is not None
    return self.chip.clock_hz


class _Queues:
  """Transfers and collectives that are under way, in one queue per memory or set of links, each
  with the seconds that it still takes."""

  def __init__(self):
    self._running: dict[str, list[list]] = {}

  def start(self, name: str, queue: str, seconds: float, size: float) -> None:
    self._running.setdefault(queue, []).append([name, seconds, seconds, size])

  def advance(self, seconds: float, hbm_busy: float) -> None:
    """Let time pass, of which a part leaves no room for transfers."""
    for queue, running in self._running.items():
      left = max(0.0, seconds - hbm_busy) if queue == 'hbm' else seconds
      for entry in running:
        used = min(left, entry[1])
        entry[1] -= used
        left -= used

  def wait(self, name: str) -> tuple[str, float, float, float] | None:
    """Wait for what was started under a name: (queue, seconds waited, seconds hidden, bytes); None
    if nothing was."""
    for queue, running in self._running.items():
      for at, entry in enumerate(running):
        if entry[0] == name:
          waited = sum(e[1] for e in running[: at + 1])
          _, _, whole, size = entry
          del running[: at + 1]
          self.advance(waited, 0.0)
          return queue, waited, max(0.0, whole - waited), size
    return None
