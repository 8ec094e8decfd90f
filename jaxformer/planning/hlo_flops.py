"""FLOPs of a compiled program on one device, from its HLO text: products and kernels, times the
iterations of the loops around them.

XLA's own count (`cost_analysis`) takes the body of a loop once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np

from jaxformer.planning.hlo import Instruction, Program, numbers

# custom calls that compute; the others move or reserve memory
KERNELS = ('tpu_custom_call', 'TopK')


@dataclasses.dataclass(frozen=True)
class CompiledFlops:
  """FLOPs of one run on one device.

  Attributes:
    products: of matrix products and convolutions, 2 per multiply-add.
    kernels: of Pallas kernels, by their own estimates.
    not_counted: operations without a count -> how often they run: 'fft', or the name of a kernel.
  """

  products: float = 0.0
  kernels: float = 0.0
  not_counted: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def total(self) -> float:
    return self.products + self.kernels

  def plus(self, other: CompiledFlops, times: int = 1) -> CompiledFlops:
    many = Counter({name: times * n for name, n in other.not_counted.items()})
    return CompiledFlops(
      self.products + times * other.products,
      self.kernels + times * other.kernels,
      dict(Counter(self.not_counted) + many),
    )


def compiled_flops(compiled: jax.stages.Compiled | str) -> CompiledFlops:
  """The FLOPs of a compiled program, or of its text. The most expensive branch of a conditional
  counts; a loop whose iterations the text does not give counts as one."""
  program = Program(compiled)
  return _of_computation(program, program.entry)


def flops_of(program: Program, i: Instruction) -> CompiledFlops:
  """The FLOPs of one instruction of a program, with those of the computations that it calls."""
  inside, times = program.calls(i)
  if i.operation in _COUNTS:
    return _COUNTS[i.operation](i)
  if not inside:
    return CompiledFlops()
  branches = [_of_computation(program, name) for name in inside]
  return CompiledFlops().plus(max(branches, key=lambda flops: flops.total), times)


@functools.lru_cache(maxsize=10_000)
def _of_computation(program: Program, name: str) -> CompiledFlops:
  total = CompiledFlops()
  for i in program.computations[name].values():
    total = total.plus(flops_of(program, i))
  return total


def _dims(i: Instruction) -> list[int]:
  return next((dims for _, dims in i.arrays), [])


def _dot(i: Instruction) -> CompiledFlops:
  left, contracted = _dims(i.operand(0)), numbers(i.attribute('lhs_contracting_dims'))
  inner = math.prod(left[d] for d in contracted) if left else 1
  return CompiledFlops(2.0 * math.prod(_dims(i)) * inner)


def _convolution(i: Instruction) -> CompiledFlops:
  """Multiplications with padding, or with the zeros between elements of a dilated input, are not
  counted."""
  labels = re.fullmatch(r'(\w+)_(\w+)->(\w+)', i.attribute('dim_labels'))
  x, kernel, out = _dims(i.operand(0)), _dims(i.operand(1)), _dims(i)
  if labels is None or not x or not kernel:
    return CompiledFlops(not_counted={'convolution': 1})
  left, right, result = labels.groups()
  window = {k: v.split('x') for k, v in re.findall(r'(\w+)=([\d_\-x]+)', i.attribute('window'))}
  pairs = 1
  for d in filter(str.isdigit, result):
    at = {name: int(values[int(d)].split('_')[0]) for name, values in window.items()}
    pairs *= _valid(x[left.index(d)], out[result.index(d)], **at)
  # The kernel has the input features of one feature group;
  features = out[result.index('f')] * kernel[right.index('i')]
  # the result has the batch of one batch group.
  return CompiledFlops(2.0 * features * out[result.index('b')] * pairs)


def _valid(
  length: int,
  out: int,
  *,
  size: int = 1,
  stride: int = 1,
  pad: int = 0,
  lhs_dilate: int = 1,
  rhs_dilate: int = 1,
  **_: int,
) -> int:
  """How many pairs of an output and a kernel position read an element of an input of `length`,
  along one dimension; the other arguments are those of an HLO `window`."""
  read = np.add.outer(np.arange(out) * stride, np.arange(size) * rhs_dilate) - pad
  inside = (read >= 0) & (read <= (length - 1) * lhs_dilate) & (read % lhs_dilate == 0)
  return int(inside.sum())


def declared_flops(kernel: Instruction) -> float | None:
  """The FLOPs that a kernel declares (`pl.CostEstimate`); None if it declares none."""
  estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', kernel.rest)
  return None if estimate is None else float(estimate.group(1))


def _custom(i: Instruction) -> CompiledFlops:
  if i.attribute('custom_call_target') not in KERNELS:
    return CompiledFlops()
  if (declared := declared_flops(i)) is not None:
    return CompiledFlops(kernels=declared)
  return CompiledFlops(not_counted={re.sub(r'[.\d]+$', '', i.name): 1})


_COUNTS = {
  'dot': _dot,
  'convolution': _convolution,
  'custom-call': _custom,
  'fft': lambda i: CompiledFlops(not_counted={'fft': 1}),
}
