"""Attention masks by structure, never as a `T x S` array, so that kernels can use them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

MASKED = -1e30  # finite: a row with no key at all gives zeros, not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """A query sees a key of its own segment that is not in its future (`causal`) and fewer than
  `window` positions back.

  Attributes:
    causal: keys after the query are hidden.
    window: how many positions a query sees, itself included; None for all. Without `causal` it is a
      band: |t - s| < window.
    segments_BT: the segment of each query, None for one segment.
    key_segments_BS: the segment of each key; None where keys and queries are the same positions.
    index_T: position of each query, and index_S: of each key, negative for an empty cache slot.
      Both None where keys and queries are the same positions 0..T-1, which the fast
      implementations need.
  """

  causal: bool = dataclasses.field(default=True, metadata={'static': True})
  window: int | None = dataclasses.field(default=None, metadata={'static': True})
  segments_BT: Int[Array, 'B T'] | None = None
  key_segments_BS: Int[Array, 'B S'] | None = None
  index_T: Int[Array, ' T'] | None = None
  index_S: Int[Array, ' S'] | None = None

  @property
  def aligned(self) -> bool:
    """Keys and queries are the same positions."""
    return self.index_T is None and self.index_S is None

  @property
  def axes(self) -> list[tuple[str | None, ...]]:
    """The logical axes of the arrays present, in their order as leaves of the pytree."""
    arrays = self.segments_BT, self.key_segments_BS, self.index_T, self.index_S
    axes = ('batch', 'time'), ('batch', None), ('time',), (None,)
    return [a for x, a in zip(arrays, axes, strict=True) if x is not None]

  def positions(self, T: int, S: int) -> tuple[Int[Array, ' T'], Int[Array, ' S']]:
    """The position of each query and of each key."""
    return (
      jnp.arange(T, dtype=jnp.int32) if self.index_T is None else self.index_T,
      jnp.arange(S, dtype=jnp.int32) if self.index_S is None else self.index_S,
    )

  def keys(self) -> Int[Array, 'B S'] | None:
    """The segment of each key, None for one segment."""
    return self.segments_BT if self.key_segments_BS is None else self.key_segments_BS

  def dense(self, T: int, S: int) -> Bool[Array, '_ T S']:
    """The mask as booleans, `[1 or B, T, S]`: for the naive implementation and for short
    queries."""
    seen = jnp.asarray(visible(*self.positions(T, S), causal=self.causal, window=self.window))[None]
    keys = self.keys()
    if self.segments_BT is not None and keys is not None:
      seen = seen & (self.segments_BT[:, :, None] == keys[:, None, :])
    return seen


def visible(
  t: Int[Array | np.ndarray, ' T'],
  s: Int[Array | np.ndarray, ' S'],
  *,
  causal: bool,
  window: int | None,
) -> Bool[Array | np.ndarray, 'T S']:
  """Whether the query at position t may see the key at position s, apart from segments. From
  numpy arrays a numpy array."""
  row, col = t[:, None], s[None, :]
  seen = (col >= 0) & (row == row)  # the second for its shape
  if causal:
    seen = seen & (col <= row)
  if window is not None:
    seen = seen & (distances(t, s) < window)
  return seen


def distances(t: Any, s: Any) -> Any:
  """|t - s| of every query and key, `[T, S]`. From numpy arrays a numpy array."""
  return abs(t[:, None] - s[None, :])
