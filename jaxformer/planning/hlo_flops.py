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

import jax

from jaxformer.planning.hlo import SHAPE, Instruction, Program, text_of

KERNELS = (
  'tpu_custom_call',
  'TopK',
)  # custom calls that compute; the others move or reserve memory


@dataclasses.dataclass(frozen=True)
class CompiledFlops:
  """FLOPs of one run on one device.

  Attributes:
    products: of matrix products and convolutions, 2 per multiply-add.
    kernels: of Pallas kernels, by their own estimates.
    uncounted: operations without a count -> how often they run: 'fft', or the name of a kernel.
  """

  products: float = 0.0
  kernels: float = 0.0
  uncounted: Counter[str] = dataclasses.field(default_factory=Counter)

  @property
  def total(self) -> float:
    return self.products + self.kernels

  def plus(self, other: CompiledFlops, times: int = 1) -> CompiledFlops:
    many = Counter({name: times * n for name, n in other.uncounted.items()})
    return CompiledFlops(
      self.products + times * other.products,
      self.kernels + times * other.kernels,
      self.uncounted + many,
    )


def compiled_flops(compiled: jax.stages.Compiled | str) -> CompiledFlops:
  """The FLOPs of a compiled program, or of its text. The most expensive branch of a conditional
  counts; a loop whose iterations the text does not give counts as one."""
  program = Program(text_of(compiled))

  @functools.cache
  def of(name: str) -> CompiledFlops:
    total = CompiledFlops()
    for own, i in program.computations[name].items():
      if i.operation == 'while':
        total = total.plus(of(i.attribute('body')), program.iterations(name, i))
      elif i.operation == 'conditional':
        total = total.plus(max((of(b) for b in i.branches), key=lambda a: a.total))
      elif i.operation in _COUNTS:
        total = total.plus(_COUNTS[i.operation](own, i, program.computations[name]))
      elif i.called in program.computations:
        total = total.plus(of(i.called))
    return total

  return of(program.entry)


def _dims(i: Instruction | None) -> list[int]:
  found = SHAPE.search(i.shape) if i is not None else None
  return [int(d) for d in found.group(2).split(',') if d] if found else []


def _dot(name: str, i: Instruction, around: dict[str, Instruction]) -> CompiledFlops:
  left = _dims(around.get(i.operands[0]))
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)
  inner = (
    math.prod(left[int(d)] for d in contracted.group(1).split(',') if d)
    if contracted and left
    else 1
  )
  return CompiledFlops(2.0 * math.prod(_dims(i)) * inner)


def _convolution(name: str, i: Instruction, around: dict[str, Instruction]) -> CompiledFlops:
  """Multiplications with padding, or with the zeros between elements of a dilated input, are not
  counted."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest)
  operands = [_dims(around.get(o)) for o in i.operands[:2]]
  if labels is None or not all(operands):
    return CompiledFlops(uncounted=Counter({'convolution': 1}))
  (left, right, result), out = labels.groups(), _dims(i)
  window = {k: v.split('x') for k, v in re.findall(r'(\w+)=([\d_\-x]+)', _window(i))}
  pairs = 1
  for d in (c for c in result if c.isdigit()):

    def at(name: str, default: str, d: str = d) -> str:
      return window[name][int(d)] if name in window else default

    pairs *= _valid(
      operands[0][left.index(d)],
      int(at('size', '1')),
      out[result.index(d)],
      int(at('stride', '1')),
      int(at('pad', '0_0').split('_')[0]),
      int(at('lhs_dilate', '1')),
      int(at('rhs_dilate', '1')),
    )
  # The kernel has the input features of one feature group;
  features = out[result.index('f')] * operands[1][right.index('i')]
  # the result has the batch of one batch group.
  return CompiledFlops(2.0 * features * out[result.index('b')] * pairs)


def _window(i: Instruction) -> str:
  found = re.search(r'window=\{([^}]*)\}', i.rest)
  return found.group(1) if found else ''


@functools.cache
def _valid(
  size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, spread: int
) -> int:
  """How many pairs of an output and a kernel position read an element of the input, along one
  dimension."""
  last = (size - 1) * dilate
  return sum(
    0 <= (at := o * stride + k * spread - pad) <= last and at % dilate == 0
    for k in range(kernel)
    for o in range(out)
  )


def _custom(name: str, i: Instruction, around: dict[str, Instruction]) -> CompiledFlops:
  target = re.search(r'custom_call_target="([^"]*)"', i.rest)
  if target is None or target.group(1) not in KERNELS:
    return CompiledFlops()
  if estimate := re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.rest):
    return CompiledFlops(kernels=float(estimate.group(1)))
  return CompiledFlops(uncounted=Counter({re.sub(r'[.\d]+$', '', name): 1}))


def _fft(name: str, i: Instruction, around: dict[str, Instruction]) -> CompiledFlops:
  return CompiledFlops(uncounted=Counter({'fft': 1}))


_COUNTS = {'dot': _dot, 'convolution': _convolution, 'custom-call': _custom, 'fft': _fft}
