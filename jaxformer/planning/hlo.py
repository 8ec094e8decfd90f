"""Parser of HLO text, the printed form of a compiled program: computations, instructions, and how
often loops run.

XLA offers no structured view of a compiled TPU program from Python, and its `cost_analysis` counts
the body of a loop once. An instruction is one line,

    %name = <shape> operation(%operand, ...), attributes

with shapes such as `bf16[8,128]{1,0:T(8,128)}`, those of a tuple in parentheses."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
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

  @property
  def operands(self) -> list[Instruction]:
    """The instructions whose results are read."""
    names = re.findall(r'%([\w.\-]+)', self.rest.partition(')')[0])
    return [self.computation.get(name, UNKNOWN) for name in names]

  def operand(self, index: int) -> Instruction:
    """The instruction whose result is read at an index."""
    operands = self.operands
    return operands[index] if index < len(operands) else UNKNOWN

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


class Frame(NamedTuple):
  """A place in the Python program that made an instruction."""

  file: str
  line: int
  function: str


class Program:
  """The computations of a compiled program, or of its text: name -> instruction by name."""

  def __init__(self, compiled: jax.stages.Compiled | str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, lines = '', {}
    text = text_of(compiled)
    self._frames = _frame_tables(text)
    for line in _joined(text):
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

  def frames(self, i: Instruction) -> tuple[Frame, ...]:
    """The Python frames that made an instruction, innermost first; those of the computation that it
    calls if it has none."""
    number = i.attribute('stack_frame_id')
    if not number:
      inside = self.computations.get(i.attribute('calls'), {}).values()
      number = next((n for j in inside if (n := j.attribute('stack_frame_id'))), '')
    return self._frames(int(number)) if number else ()

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


def _joined(text: str) -> Iterator[str]:
  """The lines of a text; those that go on with an instruction, as the attributes of kernels do, are
  joined to it."""
  held = ''
  for line in filter(None, text.splitlines()):
    if held and line != '}' and not line.startswith((' ', '%', 'ENTRY')):
      held += line
      continue
    yield held
    held = line
  yield held


def _frame_tables(text: str) -> Callable[[int], tuple[Frame, ...]]:
  """Look-up of the frames of a `stack_frame_id`, from the tables at the head of the text."""
  tables: dict[str, dict[int, str]] = {}
  rows: dict[int, str] = {}
  for line in text.splitlines():
    if line in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
      rows = tables[line] = {}
    elif row := re.match(r'(\d+) (.*)$', line):
      rows[int(row.group(1))] = row.group(2)
    elif line.endswith('{'):
      break
  if 'StackFrames' not in tables:
    return lambda number: ()

  def field(text: str, name: str) -> int:
    found = re.search(rf'\b{name}=(\d+)', text)
    return int(found.group(1)) if found else 0

  # Some versions print the number of a parent one too high, so that a frame is its own parent.
  stack = tables['StackFrames']
  excess = int(any(field(text, 'parent_frame_id') == n for n, text in stack.items()))

  def frames(number: int) -> tuple[Frame, ...]:
    found, seen = [], set()
    while number in stack and number not in seen:
      seen.add(number)
      frame = stack[number]
      place = tables['FileLocations'][field(frame, 'file_location_id')]
      file = tables['FileNames'][field(place, 'file_name_id')].strip('"')
      function = tables['FunctionNames'][field(place, 'function_name_id')].strip('"')
      found.append(Frame(file, field(place, 'line'), function))
      number = field(frame, 'parent_frame_id') - excess
    return tuple(found)

  return functools.cache(frames)


def itemsize(dtype: str) -> int:
  """Bytes of a value of a dtype by its name in HLO; what is smaller than a byte counts as one."""
  return 1 if dtype == 'pred' else max(numbers(dtype)[0] // 8, 1)


def numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]


def text_of(compiled: jax.stages.Compiled | str) -> str:
  """The HLO text of a compiled program."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  assert text is not None  # CPU, GPU and TPU all print their programs
  return text
