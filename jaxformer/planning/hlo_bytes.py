"""Bytes that an instruction of a compiled TPU program moves to and from the high-bandwidth memory
(HBM), from its HLO text.

The layout of an array says where it lies and how it is padded: `bf16[4,64]{1,0:T(8,128)(2,1)S(1)}`
is in tiles of 8 x 128 numbers, in memory space 1, the on-chip vector memory (VMEM); without `S`, in
HBM. Only what lies in HBM counts, in whole tiles."""

import functools
import math
import re
from collections.abc import Iterable

from jaxformer.planning.hlo import Instruction, Program, itemsize, numbers

_ARRAY = re.compile(r'\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\](?:\{([^}]*)\})?')
# They read the part of their first operand that their result holds.
_PARTS = ('dynamic-slice', 'slice', 'gather')
# The same bytes under another shape.
_VIEWS = ('bitcast', 'get-tuple-element', 'tuple', 'opt-barrier')


def hbm_bytes(shape: str) -> float:
  """Bytes in HBM of the array or the tuple of arrays of a shape."""
  return float(sum(hbm_bytes_of_each(shape)))


def hbm_bytes_of_each(shape: str) -> list[int]:
  """Bytes in HBM of each array of a shape."""
  return [_bytes(*array) for array in _ARRAY.findall(shape)]


def _bytes(dtype: str, dims: str, layout: str) -> int:
  if re.search(r'S\([1-9]\d*\)', layout):
    return 0
  sizes, tile = numbers(dims), re.search(r'T\(([\d,]+)\)', layout)
  if tile and sizes:
    order = numbers(layout.partition(':')[0])  # minor dimension first
    for dim, n in zip(order, reversed(numbers(tile.group(1))), strict=False):
      sizes[dim] = -(-sizes[dim] // n) * n
  return math.prod(sizes) * itemsize(dtype)


def bytes_moved(program: Program, i: Instruction) -> float:
  """Bytes that one execution of an instruction reads from HBM and writes to it. A fusion reads an
  operand once; one that it slices, as far as the slice; one that it updates in place, not at all,
  and writes the update."""
  inside = program.computations.get(i.attribute('calls'), {})
  if not inside:
    return _alone(i)
  parameters = {_number(p): p for p in inside.values() if p.operation == 'parameter'}
  read = 0.0
  for index, operand in enumerate(i.operands):
    held = hbm_bytes(operand.shape)
    if held and index in parameters:
      read += min(held, _read(program, parameters[index], held))
  return read + _written(i, inside)


def _alone(i: Instruction) -> float:
  """The bytes that an instruction that is no fusion moves."""
  written, operands = hbm_bytes(i.shape), [hbm_bytes(o.shape) for o in i.operands]
  if i.operation in _PARTS:
    return 2 * written
  if i.operation in ('dynamic-update-slice', 'scatter'):
    return 2 * sum(operands[1:])
  return written + sum(operands)


def _read(program: Program, parameter: Instruction, held: float) -> float:
  """Bytes that a fusion reads of a parameter of which `held` bytes lie in HBM."""
  logical = _logical_bytes(parameter.shape)
  total = 0.0
  for use in _uses(parameter):
    inside = program.computations.get(use.attribute('calls'), {})
    if use.operation in _PARTS and use.operand(0).name == parameter.name:
      total += held * _logical_bytes(use.shape) / logical
    elif use.operation == 'dynamic-update-slice' and use.operand(0).name == parameter.name:
      continue
    elif use.operation in _VIEWS:
      total += _read(program, use, held)
    elif inside and use.operation == 'fusion':
      index = [o.name for o in use.operands].index(parameter.name)
      inner = next(p for p in inside.values() if p.operation == 'parameter' and _number(p) == index)
      total += _read(program, inner, held)
    else:
      return held
  return total


def _written(i: Instruction, inside: dict[str, Instruction]) -> float:
  """Bytes that a fusion writes: its result, or the update of an array in place."""
  root = next(r for r in inside.values() if r.root)
  results = root.operands if root.operation == 'tuple' else [root]
  shapes = [m.group(0) for m in _ARRAY.finditer(i.shape)]
  if len(shapes) != len(results):
    return hbm_bytes(i.shape)
  total = 0.0
  for result, shape in zip(results, shapes, strict=True):
    while result.operation in ('bitcast', 'copy') and result.operands:
      result = result.operand(0)
    share = 1.0
    if result.operation == 'dynamic-update-slice':
      share = _logical_bytes(result.operand(1).shape) / _logical_bytes(result.shape)
    total += hbm_bytes(shape) * share
  return total


@functools.lru_cache(maxsize=100_000)
def _logical_bytes(shape: str) -> int:
  """Bytes of the arrays of a shape, wherever they lie and without padding; at least 1."""
  arrays = _ARRAY.findall(shape)
  return max(1, sum(math.prod(numbers(dims)) * itemsize(dtype) for dtype, dims, _ in arrays))


def _uses(value: Instruction) -> Iterable[Instruction]:
  pattern = f'%{value.name}'
  for i in value.computation.values():
    if pattern in i.rest and any(o.name == value.name for o in i.operands):
      yield i


def _number(parameter: Instruction) -> int:
  return numbers(parameter.rest)[0]
