"""Heads that lie side by side along lanes in TPU kernels of recurrences whose state is a matrix.

Dims: C tokens of a chunk; X: the K of all heads of a group, Y: the V of all. The state is [Y, X],
  block-diagonal over the heads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES = 128


def lanes(size: int) -> int:
  """The lanes of one head: sizes that share or fill vectors of lanes."""
  return max(8, pl.next_power_of_2(size)) if size < LANES else pl.cdiv(size, LANES) * LANES


def pad(x, *sizes: int):
  return jnp.pad(x, [(0, size - old) for old, size in zip(x.shape, sizes, strict=True)])


def dot(a, b, form: str, exact: bool):
  """a b ('nn'), a b^T ('nt') or a^T b ('tn') of matrices, summed in fp32: of fp32 operands if
  `exact`, else of operands rounded to bf16."""
  dims = ((0 if form[0] == 't' else 1,), (1 if form[1] == 't' else 0,))
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  if not exact:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  return jax.lax.dot_general(
    a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def repeated(matrix: np.ndarray, parts: int):
  """A matrix of 0, 1 and -1, side by side, as `sums` reads it."""
  return jnp.asarray(np.concatenate([matrix] * parts, axis=1), jnp.bfloat16)


def sums(matrix, x):
  """matrix x by one product in bf16, at most half the work of one in fp32: a matrix of 0, 1 and -1,
  two or three times side by side (`repeated`), times the highest, the next and the lowest 8 bits of
  x's significands, stacked. Three times is fp32 precision, twice is 16 bits."""
  parts = []
  for _ in range(matrix.shape[1] // x.shape[0]):
    high = jax.lax.bitcast_convert_type(
      jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return jnp.dot(matrix, jnp.concatenate(parts, axis=0), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class HeadsPlan:
  """Static sizes and options of a call.

  Attributes:
    heads: of a group.
    K, V: lanes of a head.
    chunk: tokens whose pairs become products of matrices.
    span: chunks of a block.
    exact: products in fp32, not with operands rounded to bf16.
  """

  heads: int
  K: int
  V: int
  chunk: int
  span: int
  exact: bool
  interpret: bool

  def dot(self, a, b, form: str):
    """`dot` in the precision of the plan."""
    return dot(a, b, form, self.exact)

  def stack(self, x, size: int):
    """[C, lanes] -> [heads C, lanes]: stacked, each with the lanes of one head (of `size`) and
    zeros elsewhere."""
    head = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // size
    return jnp.concatenate([jnp.where(head == h, x, 0.0) for h in range(self.heads)], axis=0)

  def unstack(self, x, size: int):
    """[heads C, lanes] -> [C, lanes]: the inverse of `stack`, from each head's rows its own
    lanes."""
    parts = jnp.split(x, self.heads)
    head = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1) // size
    return sum(jnp.where(head == h, part, 0.0) for h, part in enumerate(parts))

  def diagonal(self):
    """[Y, X]: 1 where row and lane belong to one head."""
    shape = (self.heads * self.V, self.heads * self.K)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row // self.V == lane // self.K).astype(jnp.float32)

  def expand(self, S_VX):
    return jnp.concatenate([S_VX] * self.heads, axis=0) * self.diagonal()

  def compact(self, S_YX):
    return sum(jnp.split(S_YX, self.heads))

  def rows(self, c):
    """The tokens of chunk c of a block."""
    return pl.ds(pl.multiple_of(c * self.chunk, self.chunk), self.chunk)
