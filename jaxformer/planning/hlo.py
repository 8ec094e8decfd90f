"""Parser of HLO text, the printed form of a compiled program: computations, instructions, and how
often loops run.

XLA offers no structured view of a compiled TPU program from Python, and its `cost_analysis` counts
the body of a loop once. An instruction is one line,

    %name = <shape> operation(%operand, ...), attributes

with shapes such as `bf16[8,128]{1,0:T(8,128)}`, those of a tuple in parentheses."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

SHAPE = re.compile(r'\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$')
_NAME = re.compile(r'%?([\w.\-]+)$')


class Instruction(NamedTuple):
  """One line of a computation."""

  shape: str
  operation: str
  rest: str  # operands and attributes

  @property
  def operands(self) -> list[str]:
    """Names of the operands, without the shapes that may precede them."""
    depth, end = 1, 0
    while depth and end < len(self.rest):
      depth += {'(': 1, ')': -1}.get(self.rest[end], 0)
      end += 1
    inside = re.sub(r'/\*.*?\*/|\{[^}]*\}|\[[^]]*\]', '', self.rest[: end - 1])
    return [m.group(1) if (m := _NAME.search(o.strip())) else '' for o in inside.split(',')]

  def attribute(self, name: str) -> str:
    """The value of an attribute; '' if there is none."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found.group(1) if found else ''

  @property
  def called(self) -> str:
    """The computation that a fusion, a call or an asynchronous start executes; '' for others."""
    return self.attribute('calls') or (
      self.attribute('to_apply') if self.operation == 'call' else ''
    )

  @property
  def branches(self) -> list[str]:
    """The computations of a conditional."""
    found = re.search(r'branch_computations=\{([^}]*)\}', self.rest)
    names = (
      found.group(1).split(',')
      if found
      else [self.attribute('true_computation'), self.attribute('false_computation')]
    )
    return [b.strip().lstrip('%') for b in names]


class Program:
  """The computations of a program in HLO text: name -> instruction by name."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, self._roots = '', {}
    lines: dict[str, Instruction] = {}
    name = ''
    for line in text.splitlines():
      if head := _COMPUTATION.match(line):
        name = head.group(2)
        lines = self.computations[name] = {}
        self.entry = name if head.group(1) else self.entry
      elif instruction := _INSTRUCTION.match(line):
        lines[instruction.group(1)] = Instruction(*instruction.groups()[1:])
        if line.lstrip().startswith('ROOT '):
          self._roots[name] = instruction.group(1)

  def iterations(self, name: str, loop: Instruction) -> int:
    """How often a while loop of computation `name` runs: as XLA notes it, else by the constants of
    `for (i = first; i < last; i += step)`. An unknown `first` counts as 0; if another is unknown,
    the loop counts as one iteration."""
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
    return self.computations[name].get(self._roots.get(name, ''))

  def _constant(self, computation: str, name: str) -> int | None:
    """The value of a constant, looked up through copies; None for another instruction."""
    i = self.computations[computation].get(name)
    while i is not None and i.operation in ('copy', 'bitcast', 'convert'):
      i = self.computations[computation].get(i.operands[0])
    return _value(i)

  def _step(self, body: str, after: Instruction, index: int) -> int | None:
    """What one iteration adds to the counter, element `index` of the loop's state."""
    new = self.computations[body].get(after.operands[index]) if after.operation == 'tuple' else None
    if new is None or new.operation != 'add':
      return None
    values = [v for o in new.operands if (v := self._constant(body, o))]
    return values[0] if len(values) == 1 else None


def _value(i: Instruction | None) -> int | None:
  found = re.match(r'(-?\d+)\)', i.rest) if i is not None and i.operation == 'constant' else None
  return int(found.group(1)) if found else None


def array_bytes(dtype: str, dims: str) -> int:
  """Size of an array that HLO writes as `dtype[dims]`, such as `bf16[8,128]`."""
  bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
  return math.prod(int(d) for d in dims.split(',') if d) * max(bits, 8) // 8


def text_of(compiled: jax.stages.Compiled | str) -> str:
  """The HLO text of a compiled program."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  assert text is not None  # CPU, GPU and TPU all print their programs
  return text
