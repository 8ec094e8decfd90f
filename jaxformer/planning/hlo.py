"""Parser of HLO text, the printed form of a compiled program: computations, instructions, and how
often loops run.

XLA offers no structured view of a compiled TPU program from Python, and its `cost_analysis` counts
the body of a loop once. An instruction is one line,

    %name = <shape> operation(%operand, ...), attributes

with shapes such as `bf16[8,128]{1,0:T(8,128)}`, those of a tuple in parentheses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

_ARRAY = re.compile(r'\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)$')


class Instruction(NamedTuple):
  """One line of a computation. `UNKNOWN`, which has no operands or attributes, stands for one that
  is not in the text.

  Attributes:
    rest: operands and attributes.
    root: whether it gives the result of its computation.
    computation: all instructions of the computation by name.
  """

  name: str = ''
  shape: str = ''
  operation: str = ''
  rest: str = ''
  root: bool = False
  computation: Mapping[str, Instruction] = {}

  @property
  def arrays(self) -> list[tuple[str, list[int]]]:
    """The dtype and the dimensions of each array of the result."""
    return [(dtype, numbers(dims)) for dtype, dims in _ARRAY.findall(self.shape)]

  def operand(self, index: int) -> Instruction:
    """The instruction whose result is read at an index."""
    names = re.findall(r'%([\w.\-]+)', self.rest)  # those in attributes follow the operands
    return self.computation.get(names[index], UNKNOWN) if index < len(names) else UNKNOWN

  def element(self, index: int) -> Instruction:
    """The element of a tuple at an index; `UNKNOWN` of another instruction."""
    return self.operand(index) if self.operation == 'tuple' else UNKNOWN

  def attribute(self, name: str) -> str:
    """The value of an attribute without quotation marks or braces; '' if there is none."""
    found = re.search(rf'\b{name}=(?:"([^"]*)"|\{{([^}}]*)\}}|%?([\w.\->]+))', self.rest)
    return next(v for v in found.groups() if v is not None) if found else ''

  @property
  def constant(self) -> int | None:
    """The value of an integer constant, looked up through copies; None for another instruction."""
    if self.operation in ('copy', 'bitcast', 'convert'):
      return self.operand(0).constant
    found = re.match(r'(-?\d+)\)', self.rest) if self.operation == 'constant' else None
    return int(found.group(1)) if found else None


UNKNOWN = Instruction()


class Program:
  """The computations of a compiled program, or of its text: name -> instruction by name."""

  def __init__(self, compiled: jax.stages.Compiled | str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, lines = '', {}
    for line in text_of(compiled).splitlines():
      if head := _COMPUTATION.match(line):
        lines = self.computations[head.group(2)] = {}
        self.entry = head.group(2) if head.group(1) else self.entry
      elif found := _INSTRUCTION.match(line):
        root, name, *parts = found.groups()
        lines[name] = Instruction(name, *parts, bool(root), lines)

  def calls(self, i: Instruction) -> tuple[list[str], int]:
    """The computations that an instruction executes, and how often: the body of a loop, all
    branches of a conditional, the computation of a fusion, a call or an asynchronous start; [] for
    others."""
    if i.operation == 'while':
      return [i.attribute('body')], self._iterations(i)
    if i.operation == 'conditional':
      names = i.attribute('branch_computations').replace('%', '').split(', ')
      two = [i.attribute('true_computation'), i.attribute('false_computation')]
      return (two if names == [''] else names), 1
    name = i.attribute('to_apply' if i.operation == 'call' else 'calls')
    return [name] if name in self.computations else [], 1

  def _iterations(self, loop: Instruction) -> int:
    """How often a while loop runs: as XLA notes it, else by the constants of `for (i = first; i <
    last; i += step)`. An unknown `first` counts as 0; if another is unknown, the loop counts as one
    iteration."""
    if known := re.search(r'known_trip_count\W+n\W+(\d+)', loop.rest):
      return int(known.group(1))
    test, after = (self._root(loop.attribute(name)) for name in ('condition', 'body'))
    counter, last = test.operand(0), test.operand(1).constant
    if counter.operation != 'get-tuple-element' or test.attribute('direction') != 'LT':
      return 1
    index = int(counter.attribute('index'))
    first, new = loop.operand(0).element(index).constant or 0, after.element(index)
    operands = [new.operand(0), new.operand(1)] if new.operation == 'add' else []
    steps = [i.constant for i in operands if i.constant]  # the other operand is the counter
    if last is None or len(steps) != 1:
      return 1
    return max(0, -(-(last - first) // steps[0]))

  def _root(self, name: str) -> Instruction:
    return next((i for i in self.computations[name].values() if i.root), UNKNOWN)


def numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]


def text_of(compiled: jax.stages.Compiled | str) -> str:
  """The HLO text of a compiled program."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  assert text is not None  # CPU, GPU and TPU all print their programs
  return text
