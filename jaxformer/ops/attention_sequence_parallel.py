"""Attention over sequences that a mesh divides in time.

Keys and values are gathered, which grouped queries keep small; queries stay divided. Under a causal
mask the last shard would have 2 n - 1 times the work of the first. So the sequence counts as 2 n
halves of parts, and for the time of the attention alone shard i takes the queries of halves i and 2
n - 1 - i: of the 2 n^2 + n pairs of halves that the mask lets through, each shard has 2 n + 1.
Outside, every shard has its part of the sequence in its place, as recurrences in the same model
need it.

Dims: B batch, T queries of a shard, S all keys, H query heads, G key/value heads, K head dim; n
  shards.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxformer.ops.attention_chunked import attention_chunked
from jaxformer.ops.masks import Mask
from jaxformer.sharding import per_shard, platform

_BLOCK = {'cpu': 256}  # queries and keys at a time; elsewhere 512


def attention_over_time(
  q: Float[Array, 'B T H K'],
  k: Float[Array, 'B T G K'],
  v: Float[Array, 'B T G K'],
  mask: Mask,
  axes: tuple[str, ...],
  *,
  scale: float,
  softcap: float | None = None,
  slopes_H: Float[Array, ' H'] | None = None,
) -> Float[Array, 'B T H K']:
  """`attention_naive` of an aligned mask, for queries, keys and values that `axes` of the mesh
  divide in time."""

  def shard(q, k, v, segments_BS, slopes_H):
    n, here, T = lax.axis_size(axes), lax.axis_index(axes), q.shape[1]
    k, v = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v))
    balanced = mask.causal and T % 2 == 0 and (mask.window is None or mask.window > T)
    half = jnp.arange(T // 2, dtype=jnp.int32)
    t = (
      jnp.concatenate([here * (T // 2) + half, (2 * n - 1 - here) * (T // 2) + half])
      if balanced
      else _part(here, T)
    )
    segments = None if segments_BS is None else jnp.take(segments_BS, t, axis=1)
    local = Mask(mask.causal, mask.window, segments, segments_BS, t, _part(0, n * T))
    out = attention_chunked(
      halves_to_work(q, axes) if balanced else q,
      k,
      v,
      local,
      scale=scale,
      softcap=softcap,
      slopes_H=slopes_H,
      block=_block(T // 2 if balanced else T),
    )
    return halves_back(out, axes) if balanced else out

  token, keys = ('batch', 'time', 'heads', None), ('batch', 'time', 'kv_heads', None)
  mapped = per_shard(shard, (token, keys, keys, ('batch', None), ('heads',)), token)
  return mapped(q, k, v, mask.segments_BT, slopes_H)


def _part(number: Array | int, T: int) -> Int[Array, ' T']:
  return number * T + jnp.arange(T, dtype=jnp.int32)


def _block(size: int) -> int:
  """The largest block that cuts `size` evenly, so that no block has queries of two halves, unless
  that is a small one."""
  most = _BLOCK.get(platform(), 512)
  even = next(b for b in range(min(size, most), 0, -1) if size % b == 0)
  return even if even * 4 >= min(size, most) else most


# ---- halves of parts ---------------------------------------------------------------------------


def _workers(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """From the shard that has a half in its part to the one that works on it, for the first and for
  the second halves of parts: two permutations. A half is worked on by the shard of its own number,
  counted from the end where there is none."""

  def to(half: int) -> int:
    return min(half, 2 * n - 1 - half)

  return [(i, to(2 * i)) for i in range(n)], [(i, to(2 * i + 1)) for i in range(n)]


def halves_to_work(x: Float[Array, 'B T H K'], axes: tuple[str, ...]) -> Float[Array, 'B T H K']:
  """From a shard's part of the sequence to the halves i and 2 n - 1 - i, of which one is a first
  half and one a second."""
  firsts, seconds = _workers(lax.axis_size(axes))
  first, second = (
    lax.ppermute(a, axes, p)
    for a, p in zip(jnp.split(x, 2, axis=1), (firsts, seconds), strict=True)
  )
  even = lax.axis_index(axes) % 2 == 0
  return jnp.concatenate([jnp.where(even, first, second), jnp.where(even, second, first)], axis=1)


def halves_back(x: Float[Array, 'B T H K'], axes: tuple[str, ...]) -> Float[Array, 'B T H K']:
  """The inverse of `halves_to_work`."""
  low, high = jnp.split(x, 2, axis=1)
  even = lax.axis_index(axes) % 2 == 0
  halves = jnp.where(even, low, high), jnp.where(even, high, low)
  back = ([(to, home) for home, to in p] for p in _workers(lax.axis_size(axes)))
  return jnp.concatenate(
    [lax.ppermute(a, axes, p) for a, p in zip(halves, back, strict=True)], axis=1
  )
