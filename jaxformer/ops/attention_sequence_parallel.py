"""Attention over sequences whose time axis is sharded (context parallelism, load-balanced
"zigzag").

Keys and values are all-gathered, which grouped queries keep small; queries stay sharded. Under a
causal mask the last shard would have 2 n - 1 times the work of the first. So the sequence counts as
2 n halves of parts, and during attention shard i has the queries of halves i and 2 n - 1 - i: of
the 2 n^2 + n pairs of halves that the mask lets through, each shard has 2 n + 1. Outside, every
shard has its own part of the sequence, as recurrences in the same model need it.

Dims: B batch, T queries of a shard, S all keys, H query heads, G key/value heads, K head dim; n
  shards.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxformer.ops.attention_chunked import attention_chunked
from jaxformer.ops.attention_kernels import splash_part
from jaxformer.ops.masks import Mask
from jaxformer.ops.sequence_parallel import time_axes
from jaxformer.sharding import per_shard, platform

_BLOCK = {'cpu': 256}  # queries and keys at a time; elsewhere 512


def attention_sharded(
  q,
  k,
  v,
  mask: Mask,
  *,
  scale,
  softcap=None,
  slopes_H=None,
  sinks_H=None,
  splash: bool = False,
  interpret: bool = False,
):
  """`attention_naive` of an aligned mask, for queries, keys and values sharded over time. `splash`
  computes the part of each shard by that kernel, else by blocks."""
  axes = time_axes(q.shape[1])

  def shard(q, k, v, segments_BS, slopes_H, sinks_H):
    n, here, T = lax.axis_size(axes), lax.axis_index(axes), q.shape[1]
    k, v = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v))
    balanced = mask.causal and T % 2 == 0 and (mask.window is None or mask.window > T)
    order_nT = _order(n, T, balanced)
    t = jnp.asarray(order_nT)[here]
    segments = None if segments_BS is None else jnp.take(segments_BS, t, axis=1)
    q = to_zigzag(q, axes) if balanced else q
    if splash:
      own = Mask(mask.causal, mask.window, segments)
      options = {'scale': scale, 'softcap': softcap, 'sinks_H': sinks_H, 'interpret': interpret}
      out = splash_part(q, k, v, own, order_nT, here, segments_BS=segments_BS, **options)
    else:
      own = Mask(
        mask.causal, mask.window, segments, segments_BS, t, jnp.arange(n * T, dtype=jnp.int32)
      )
      block = _block(T // 2 if balanced else T)
      options = {'scale': scale, 'softcap': softcap, 'slopes_H': slopes_H, 'sinks_H': sinks_H}
      out = attention_chunked(q, k, v, own, **options, block=block)
    return from_zigzag(out, axes) if balanced else out

  token, keys = ('batch', 'time', 'heads', None), ('batch', 'time', 'kv_heads', None)
  mapped = per_shard(shard, (token, keys, keys, ('batch', None), ('heads',), ('heads',)), token)
  return mapped(q, k, v, mask.segments_BT, slopes_H, sinks_H)


def _order(n: int, T: int, balanced: bool) -> Int[np.ndarray, 'n T']:
  """The positions of the queries of every shard during attention."""
  if not balanced:
    return np.arange(n * T, dtype=np.int32).reshape(n, T)
  halves = np.arange(n * T, dtype=np.int32).reshape(2 * n, T // 2)
  return np.concatenate([halves[:n], halves[n:][::-1]], axis=1)


def _block(size: int) -> int:
  """The largest block that divides `size`, so that no block has queries of two halves, unless that
  is a small one."""
  most = _BLOCK.get(platform(), 512)
  even = next(b for b in range(min(size, most), 0, -1) if size % b == 0)
  return even if even * 4 >= min(size, most) else most


# ---- halves of parts ---------------------------------------------------------------------------


def _workers(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """From the shard that has a half in its part to the one that computes it, for the first and for
  the second halves of parts: two permutations. Half i is computed by shard i, or by shard 2 n - 1 -
  i where there is no shard i."""

  def to(half: int) -> int:
    return min(half, 2 * n - 1 - half)

  return [(i, to(2 * i)) for i in range(n)], [(i, to(2 * i + 1)) for i in range(n)]


def to_zigzag(x: Array, axes: tuple[str, ...]) -> Array:
  """From a shard's part of the sequence to halves i and 2 n - 1 - i, one of them a first half of a
  part and the other a second half."""
  firsts, seconds = _workers(lax.axis_size(axes))
  first, second = (
    lax.ppermute(a, axes, p)
    for a, p in zip(jnp.split(x, 2, axis=1), (firsts, seconds), strict=True)
  )
  even = lax.axis_index(axes) % 2 == 0
  return jnp.concatenate([jnp.where(even, first, second), jnp.where(even, second, first)], axis=1)


def from_zigzag(x: Array, axes: tuple[str, ...]) -> Array:
  """The inverse of `to_zigzag`."""
  low, high = jnp.split(x, 2, axis=1)
  even = lax.axis_index(axes) % 2 == 0
  halves = jnp.where(even, low, high), jnp.where(even, high, low)
  back = ([(to, home) for home, to in p] for p in _workers(lax.axis_size(axes)))
  return jnp.concatenate(
    [lax.ppermute(a, axes, p) for a, p in zip(halves, back, strict=True)], axis=1
  )
