"""What a traced program computes, counted from its jaxpr: nothing is compiled, and no loop is
counted once for all its rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BINARY = {'add', 'sub', 'mul', 'div', 'max', 'min', 'add_any'}
_UNKNOWN = {
  'conv_general_dilated',
  'fft',
  'pallas_call',
  'ragged_dot',
  'ragged_dot_general',
  'while',
}
_SUMS = {'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'cumsum', 'cummax', 'cumprod'}


class Flops(NamedTuple):
  """
  Attributes:
    products: of contractions, 2 a multiplication and its addition.
    elementwise: sums, products, quotients, maxima and reductions, 1 a number. Functions such as exp
      count as none, as in XLA.
  """

  products: float
  elementwise: float

  @property
  def total(self) -> float:
    return self.products + self.elementwise

  def plus(self, other: Flops, times: float = 1.0) -> Flops:
    return Flops(
      self.products + times * other.products, self.elementwise + times * other.elementwise
    )


def traced_flops(f: Callable[..., Any], *args: Any) -> Flops:
  """The FLOPs of `f(*args)`, where arguments may be shapes alone. Rounds of scans are multiplied,
  complex numbers count as the real operations that they take, of the branches of a conditional the
  last counts. Raises `ValueError` for what it cannot count: loops of unknown length, convolutions,
  Fourier transforms, kernels."""
  return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: Any) -> Flops:
  total = Flops(0.0, 0.0)
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'scan':
      total = total.plus(_count(params['jaxpr'].jaxpr), params['length'])
    elif name in _UNKNOWN:
      raise ValueError(f'the FLOPs of {name} do not follow from the program')
    elif name == 'cond':
      total = total.plus(_count(params['branches'][-1].jaxpr))
    elif name == 'dot_general':
      total = total.plus(Flops(_dot(eqn), 0.0))
    elif (
      inner := next((params[k] for k in ('jaxpr', 'call_jaxpr') if k in params), None)
    ) is not None:
      total = total.plus(_count(getattr(inner, 'jaxpr', inner)))
    elif name in _BINARY:
      total = total.plus(
        Flops(0.0, math.prod(eqn.outvars[0].aval.shape) * _real(eqn, 6 if name == 'mul' else 2))
      )
    elif name in _SUMS:
      total = total.plus(Flops(0.0, math.prod(eqn.invars[0].aval.shape) * _real(eqn, 2)))
  return total


def _dot(eqn: Any) -> float:
  (left, _), _ = eqn.params['dimension_numbers']
  contracted = math.prod(eqn.invars[0].aval.shape[i] for i in left)
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * contracted * _real(eqn, 4)


def _real(eqn: Any, times: int) -> int:
  """How many real operations one of these is."""
  return times if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) else 1
