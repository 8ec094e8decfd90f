"""Attention masks by structure, never as a `T x S` array, so that kernels can use them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxformer.ops.documents import count_starts

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


def cache_mask(
  length: Int[Array, ''],
  offset_B: Int[Array, ' B'],
  starts_BT: Bool[Array, 'B T'],
  index_S: Int[Array, ' S'],
  window: int | None = None,
) -> Mask:
  """The causal mask of T queries on a cache that contains their keys.

  Args:
    length: number of positions before the queries.
    offset_B: how many of them belong to the document, or chunk, of the first query.
    starts_BT: where documents, or chunks, start among the queries.
    index_S: the position in each slot of the cache; negative for an empty one.
    window: of the mask.
  """
  T, n = starts_BT.shape[1], length
  # Documents are numbered by where they start: the current one is 0, those that start in this call
  # 1, 2, ...
  segments_BT = count_starts(starts_BT)
  new_BS = jnp.take(segments_BT, jnp.clip(index_S - n, 0, T - 1), axis=1)
  old_BS = jnp.where(index_S[None] >= (n - offset_B)[:, None], 0, -1)
  segments_BS = jnp.where((index_S >= n)[None], new_BS, old_BS)
  index_T = n + jnp.arange(T, dtype=jnp.int32)
  return Mask(True, window, segments_BT, segments_BS, index_T, index_S)


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
