"""What a compiled program sends between devices, from its HLO text: each collective, with the
rounds of the loops around it."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# "%name = <shape> operation(%operand, ...), attributes"; shapes as "bf16[8,128]{1,0:T(8,128)}",
# those of a tuple in parentheses
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$')
SHAPE = re.compile(r'\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]')
_DEVICES = re.compile(
  r'(?:replica_groups|source_target_pairs)=('
  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
  r'mesh\[[^]]*\](?:, device_ids=\([^ ]*\))? \{[^}]*\}|'
  r'\{(?:\{[^}]*\},?)*\}|'  # {{0,1},{2,3}}
  r'\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?)'
)  # [2,4]<=[4,2]T(1,0)
_NAME = re.compile(r'%?([\w.\-]+)$')


class Traffic(NamedTuple):
  """Operations of one kind in one run of a program, and the bytes of their results on one
  device."""

  count: int
  bytes: int


class Collective(NamedTuple):
  """One collective operation of a program.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    shapes: of its results on one device, as 'bf16[8,128]'.
    bytes: of all of them.
    times: how often a run of the program executes it.
    source: where in the traced program it comes from, as 'jit(step)/jvp()/while/body/...'.
    devices: groups of devices, by their place in the mesh, that exchange among themselves
      (`planning.groups` reads it).
  """

  kind: str
  shapes: tuple[str, ...]
  bytes: int
  times: int
  source: str
  devices: str = ''


def collectives(compiled: jax.stages.Compiled | str) -> dict[str, Traffic]:
  """Kind of collective -> how many, and bytes of their results on a device, in one run of a
  compiled program (or of its text)."""
  found: dict[str, Traffic] = {}
  for c in list_collectives(compiled):
    count, size = found.get(c.kind, Traffic(0, 0))
    found[c.kind] = Traffic(count + c.times, size + c.times * c.bytes)
  return found


def list_collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
  """Every collective of a compiled program (or of its text), those in a loop with the number of its
  rounds.

  A loop whose rounds the text does not tell counts as one round, and a counter whose first value it
  does not tell begins at 0; of the branches of a conditional each counts."""
  program = Program(text_of(compiled))
  return program.collectives(program.entry, 1)


class Instruction(NamedTuple):
  """One line of a computation."""

  shape: str
  operation: str
  rest: str  # operands and attributes

  @property
  def operands(self) -> list[str]:
    """Their names. (A shape in front of a name, and commas in it, fall away.)"""
    depth, end = 1, 0
    while depth and end < len(self.rest):
      depth += {'(': 1, ')': -1}.get(self.rest[end], 0)
      end += 1
    inside = re.sub(r'/\*.*?\*/|\{[^}]*\}|\[[^]]*\]', '', self.rest[: end - 1])
    return [m.group(1) if (m := _NAME.search(o.strip())) else '' for o in inside.split(',')]

  def attribute(self, name: str) -> str:
    """Its value, '' where there is none."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found.group(1) if found else ''

  @property
  def called(self) -> str:
    """The computation that a fusion, a call or an asynchronous start runs; '' for others."""
    return self.attribute('calls') or (
      self.attribute('to_apply') if self.operation == 'call' else ''
    )

  @property
  def branches(self) -> list[str]:
    """Of a conditional."""
    found = re.search(r'branch_computations=\{([^}]*)\}', self.rest)
    names = (
      found.group(1).split(',')
      if found
      else [self.attribute('true_computation'), self.attribute('false_computation')]
    )
    return [b.strip().lstrip('%') for b in names]


class Program:
  """The computations of a program in HLO text."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.roots: dict[str, str] = {}
    self.entry, name = '', ''
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
      if head := _COMPUTATION.match(line):
        lines = self.computations[head.group(2)] = {}
        name = head.group(2)
        self.entry = name if head.group(1) else self.entry
      elif instruction := _INSTRUCTION.match(line):
        lines[instruction.group(1)] = Instruction(*instruction.groups()[1:])
        if line.lstrip().startswith('ROOT '):
          self.roots[name] = instruction.group(1)
    # The TPU's compiler writes an asynchronous collective again into each computation that it
    # overlaps with, under one channel.
    starts = [
      i for name, lines in self.computations.items() if self._starts(name) for i in lines.values()
    ]
    self.started = {i.attribute('channel_id') for i in starts} - {''}

  def collectives(self, name: str, times: int) -> list[Collective]:
    """Those that a run of a computation executes, `times` times."""
    found: list[Collective] = []
    for i in self.computations[name].values():
      kind = i.operation.removesuffix('-start')
      if i.operation == 'while':
        found += self.collectives(i.attribute('body'), times * self.rounds(name, i))
      elif kind in _COLLECTIVES:
        if i.attribute('channel_id') not in self.started or self._starts(name):
          found.append(_collective(kind, i, times))
      elif i.operation == 'conditional':
        found += [c for b in i.branches for c in self.collectives(b, times)]
      elif i.called in self.computations:
        inside = self.collectives(i.called, times)
        # both in one fusion are how the TPU's compiler writes a reduce-scatter
        if i.called.startswith('all-reduce-scatter'):
          inside = [
            _collective('reduce-scatter', i, times)._replace(devices=c.devices) for c in inside[:1]
          ]
        found += inside
    return found

  def _starts(self, name: str) -> bool:
    return any('"AsyncCollectiveStart"' in i.rest for i in self.computations[name].values())

  def rounds(self, name: str, loop: Instruction) -> int:
    """Of a while loop: as XLA notes it, else of `for (i = first; i < last; i += step)` where all
    three are constants."""
    if known := re.search(r'known_trip_count\W+n\W+(\d+)', loop.rest):
      return int(known.group(1))
    condition, body = loop.attribute('condition'), loop.attribute('body')
    test = self._root(condition)
    if test is None or test.operation != 'compare' or test.attribute('direction') != 'LT':
      return 1
    counter, last = (self.computations[condition].get(o) for o in test.operands)
    state, after = self.computations[name].get(loop.operands[0]), self._root(body)
    if (
      counter is None or counter.operation != 'get-tuple-element' or state is None or after is None
    ):
      return 1
    index = int(counter.attribute('index'))
    first = self._constant(name, state.operands[index]) if state.operation == 'tuple' else None
    first, last, step = 0 if first is None else first, _value(last), self._step(body, after, index)
    return 1 if last is None or step is None else max(0, -(-(last - first) // step))

  def _root(self, name: str) -> Instruction | None:
    return self.computations[name].get(self.roots.get(name, ''))

  def _constant(self, computation: str, name: str) -> int | None:
    """The value of an instruction, through copies."""
    i = self.computations[computation].get(name)
    while i is not None and i.operation in ('copy', 'bitcast', 'convert'):
      i = self.computations[computation].get(i.operands[0])
    return _value(i)

  def _step(self, body: str, after: Instruction, index: int) -> int | None:
    """What a round adds to the counter, which is element `index` of the loop's state."""
    new = self.computations[body].get(after.operands[index]) if after.operation == 'tuple' else None
    if new is None or new.operation != 'add':
      return None
    values = [v for o in new.operands if (v := self._constant(body, o))]
    return values[0] if len(values) == 1 else None


def _value(i: Instruction | None) -> int | None:
  found = re.match(r'(-?\d+)\)', i.rest) if i is not None and i.operation == 'constant' else None
  return int(found.group(1)) if found else None


def _collective(kind: str, i: Instruction, times: int) -> Collective:
  arrays = [
    (array_bytes(dtype, dims), f'{dtype}[{dims}]')
    for dtype, dims in SHAPE.findall(re.sub(r'\{.*?\}', '', i.shape))
  ]
  if i.operation.endswith('-start') and kind != 'all-reduce':
    # the start of a gather or a permute carries (operands, results, ...): the result is as large or
    # larger
    arrays = [max(arrays)]
  source = re.search(r'op_name="([^"]*)"', i.rest)
  devices = _DEVICES.search(i.rest)
  return Collective(
    kind,
    tuple(a[1] for a in arrays),
    sum(a[0] for a in arrays),
    times,
    source.group(1) if source else '',
    devices.group(1) if devices else '',
  )


def array_bytes(dtype: str, dims: str) -> int:
  """Of an array as HLO writes it, 'bf16' and '8,128'."""
  bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
  return math.prod(int(d) for d in dims.split(',') if d) * max(bits, 8) // 8


def text_of(compiled: jax.stages.Compiled | str) -> str:
  """The HLO text of a compiled program."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  assert text is not None  # all backends of ours show their programs
  return text
