"""Attention in memory linear in the length, in plain JAX, with custom VJPs (FlashAttention-2, Dao
2023).

The output and one logsumexp per query, L_t = log sum_s exp(a_ts), are saved for the backward pass.
With P = exp(A - L) recomputed block by block and delta_t = sum_C dO_tC O_tC:

  dV = P^T dO,   dA = P * (dO V^T - delta),   dQ = scale dA K,   dK = scale dA^T Q

A sink is a key of its own logit, with a value of 0: L includes it, and nothing else changes.

`chunked` loops over blocks of queries and keys and skips the pairs whose mask is empty; it supports
every case. `unrolled` is for CPUs and lengths of some thousands: a few blocks of queries, each
against only the keys that it can see, with slices known when the program is built.

Dims: B batch, T queries, S keys, G key/value heads, R query heads per key/value head, K head dim, C
head dim of the values. Heads come first inside (`BGRTK`), because XLA's batched matrix products
want the contracted block contiguous, and query heads of a group are rows of one product, so keys
and values are never repeated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxformer.ops.chunks import from_chunks, to_chunks
from jaxformer.ops.masks import MASKED, Mask, distances, visible
from jaxformer.ops.softcap import soft_cap
from jaxformer.sharding import platform

# name of the residuals for remat policies: saving them saves the backward pass a forward pass
SAVED = 'attention'
# a running maximum never falls below, so that exp(MASKED - maximum) is 0 and not 1
_FLOOR = MASKED / 2
# `unrolled` keeps the probabilities for the backward pass up to this size
_KEEP_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class _Static:
  causal: bool
  window: int | None
  scale: float
  softcap: float | None
  block: int


class _Side(NamedTuple):
  """Positions and segments of queries or of keys, which determine bias and mask and carry no
  gradient. Positions are None where they are known when the program is built: 0, 1, ..."""

  positions: Any
  segments: Int[Array, '*blocks B T'] | None


# what determines bias and mask: queries, keys, slopes
_MaskInputs = tuple[_Side, _Side, Float[Array, 'G R'] | None]
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _mask_inputs(mask: Mask, slopes_H, t, s, G: int) -> _MaskInputs:
  slopes = None if slopes_H is None else slopes_H.astype(jnp.float32).reshape(G, -1)
  keys = None if mask.segments_BT is None else mask.keys()
  return _Side(t, mask.segments_BT), _Side(s, keys), slopes


def _logits(q, k, at: _MaskInputs, static: _Static):
  """Masked logits `BGRTS` in fp32, and the derivative of the soft cap (None without one)."""
  rows, cols, slopes = at
  a = _product('BGRTK,BGSK->BGRTS', q, k) * static.scale
  a, slope = soft_cap(a, static.softcap)
  if slopes is not None:
    distance = -distances(rows.positions, cols.positions).astype(np.float32)
    a = a + slopes[None, :, :, None, None] * distance[None, None, None]
  seen = visible(rows.positions, cols.positions, causal=static.causal, window=static.window)[None]
  if rows.segments is not None and cols.segments is not None:
    seen = seen & (rows.segments[:, :, None] == cols.segments[:, None, :])
  elif isinstance(seen, np.ndarray) and seen.all():
    return a, slope
  return jnp.where(seen[:, None, None], a, MASKED), slope


def _sinks(sinks_H, G: int):
  """`H` -> `G R`, fp32."""
  return None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(G, -1)


def _sink_gradients(p_sink, delta):
  """The gradient of the sinks, `G R`, from their probabilities and delta, both `B G R T 1`: with a
  value of 0, dA = -P * delta."""
  return -jnp.sum(p_sink * delta, axis=(0, 3, 4))


def _block_gradients(p, q, k, v, do, delta, slope, scale):
  """dq, dk, dv of one block of queries against one block of keys, fp32, from its probabilities."""
  da = p.astype(jnp.float32) * (_product('BGRTC,BGSC->BGRTS', do, v) - delta)
  if slope is not None:
    da = da * slope
  da, p = (da * scale).astype(k.dtype), p.astype(do.dtype)
  dq = _product('BGRTS,BGSK->BGRTK', da, k)
  dk = _product('BGRTS,BGRTK->BGSK', da, q)
  dv = _product('BGRTS,BGRTC->BGSC', p, do)
  return dq, dk, dv


def _heads_first(x, G: int):
  """`B T H K` -> `B G R T K`."""
  B, T, H, K = x.shape
  return x.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)


def _heads_last(x):
  """`B G R T K` -> `B T H K`."""
  B, G, R, T, K = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _delta(do, out):
  return _product('BGRTC,BGRTC->BGRT', do, out)[..., None]


# ---- blocks of queries and keys in loops -------------------------------------------------------


def _in_blocks(at: _MaskInputs, block: int) -> _MaskInputs:
  def blocks(side: _Side, padding: int) -> _Side:
    segments = None if side.segments is None else to_chunks(side.segments, block, 1, padding)
    return _Side(to_chunks(side.positions, block, 0, -1), segments)

  queries, keys, slopes = at
  return blocks(queries, -1), blocks(keys, -2), slopes


def _ranges(rows: _Side, cols: _Side, static: _Static):
  """For each block of queries the first and one past the last block of keys that it may see, and
  the same for each block of keys. They come from the extremes of positions and segments, so some
  pairs may be visited in vain and none is missed."""
  far = jnp.iinfo(jnp.int32).max // 2
  t, s = rows.positions, cols.positions
  empty = s < 0  # empty cache slots and padding
  last, first = jnp.where(empty, -far, s).max(-1)[None], jnp.where(empty, far, s).min(-1)[None]
  newest, oldest = t.max(-1)[:, None], jnp.where(t < 0, far, t).min(-1)[:, None]
  seen = jnp.broadcast_to(last >= 0, (len(t), len(s)))
  if static.causal:
    seen &= first <= newest
  if static.window is not None:
    seen &= (last > oldest - static.window) & (first < newest + static.window)
  if rows.segments is not None and cols.segments is not None:
    q, k = rows.segments[:, None], cols.segments[None]
    seen &= ((q.max(-1) >= k.min(-1)) & (k.max(-1) >= q.min(-1))).any(-1)

  def span(seen):
    some, n = seen.any(-1), seen.shape[-1]
    return jnp.where(some, seen.argmax(-1), 0), jnp.where(some, n - seen[:, ::-1].argmax(-1), 0)

  return span(seen), span(seen.T)


def _take(blocks, i):
  return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(q, k, v, sinks, at: _MaskInputs, static: _Static):
  return _chunked_forward(q, k, v, sinks, at, static)[0]


def _chunked_forward(q, k, v, sinks, at, static):
  G, dtype, b = k.shape[2], q.dtype, static.block
  rows, cols, slopes = _in_blocks(at, b)
  (lo, hi), _ = _ranges(rows, cols, static)
  # pytrees of arrays with a leading axis of blocks
  queries = to_chunks(_heads_first(q, G), b, 3), rows
  keys = *(to_chunks(x.swapaxes(1, 2), b, 2) for x in (k, v)), cols

  def each_query(_, xs):
    (qi, row), start, stop = xs

    def each_key(j, carry):
      acc, total, top = carry
      kj, vj, col = _take(keys, j)
      a, _ = _logits(qi, kj, (row, col, slopes), static)
      new = jnp.maximum(top, a.max(-1, keepdims=True))
      p, old = jnp.exp(a - new), jnp.exp(top - new)
      pv = _product('BGRTS,BGSC->BGRTC', p.astype(dtype), vj)
      return acc * old + pv, total * old + p.sum(-1, keepdims=True), new

    zero = jnp.zeros((*qi.shape[:-1], 1), jnp.float32)
    outputs = jnp.zeros((*qi.shape[:-1], v.shape[-1]), jnp.float32)
    first = outputs, zero, zero + _FLOOR
    if sinks is not None:
      first = outputs, zero + 1.0, zero + sinks[None, :, :, None, None]
    acc, total, top = lax.fori_loop(start, stop, each_key, first)
    total = jnp.where(total == 0, 1.0, total)
    return None, ((acc / total).astype(dtype), (top + jnp.log(total))[..., 0])

  _, results = lax.scan(each_query, None, (queries, lo, hi))
  out, lse = (from_chunks(x, q.shape[1], 3) for x in results)
  out, lse = checkpoint_name((_heads_last(out), lse), SAVED)
  return out, (q, k, v, sinks, at, out, lse)


def _chunked_backward(static, saved, do):
  q, k, v, sinks, at, out, lse = saved
  G, b = k.shape[2], static.block
  rows, cols, slopes = _in_blocks(at, b)
  _, (lo, hi) = _ranges(rows, cols, static)
  do, out = _heads_first(do, G), _heads_first(out, G)
  lse, delta = lse[..., None], _delta(do, out)
  arrays = _heads_first(q, G), do, lse, delta
  arrays = [to_chunks(x, b, 3) for x in arrays]
  queries = arrays, rows
  keys = *(to_chunks(x.swapaxes(1, 2), b, 2) for x in (k, v)), cols

  def each_key(dq, xs):
    (kj, vj, col), start, stop = xs

    def each_query(i, carry):
      dq, dk, dv = carry
      (qi, doi, lse_i, delta_i), row = _take(queries, i)
      a, slope = _logits(qi, kj, (row, col, slopes), static)
      p = jnp.exp(a - lse_i)
      dqi, dki, dvi = _block_gradients(p, qi, kj, vj, doi, delta_i, slope, static.scale)
      return lax.dynamic_update_index_in_dim(dq, _take(dq, i) + dqi, i, 0), dk + dki, dv + dvi

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (kj, vj))
    dq, dk, dv = lax.fori_loop(start, stop, each_query, (dq, *zeros))
    return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

  dq, dkv = lax.scan(each_key, jnp.zeros(arrays[0].shape, jnp.float32), (keys, lo, hi))
  dq = _heads_last(from_chunks(dq, q.shape[1], 3)).astype(q.dtype)
  dk, dv = (from_chunks(x, k.shape[1], 2).swapaxes(1, 2) for x in dkv)
  if sinks is not None:
    sinks = _sink_gradients(jnp.exp(sinks[None, :, :, None, None] - lse), delta)
  return dq, dk, dv, sinks, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def attention_chunked(
  q, k, v, mask: Mask, *, scale, softcap=None, slopes_H=None, sinks_H=None, block=None
):
  """Attention block by block in both lengths, in memory linear in T and S.

  Differentiable in q, k, v and `sinks_H`; `slopes_H` are constants. Pairs of blocks that cannot see
  each other (the future, beyond the window, other packed documents, empty cache slots) are not
  visited."""
  T, S = q.shape[1], k.shape[1]
  at = _mask_inputs(mask, slopes_H, *mask.positions(T, S), k.shape[2])
  block = min(block or (256 if platform() == 'cpu' else 512), -(-max(T, S) // 8) * 8)
  static = _Static(mask.causal, mask.window, scale, softcap, block)
  return _chunked(q, k, v, _sinks(sinks_H, k.shape[2]), at, static)


# ---- a few blocks of queries, unrolled ---------------------------------------------------------


def _spans(T: int, S: int, static: _Static) -> list[tuple[slice, slice]]:
  """Blocks of queries with the keys that each can see, in whole blocks of keys."""
  spans, b = [], static.block
  for start in range(0, T, b):
    t = np.arange(start, min(T, start + b))
    cols = np.flatnonzero(
      visible(t, np.arange(S), causal=static.causal, window=static.window).any(0)
    )
    lo, hi = (int(cols[0]) // b * b, min(S, (int(cols[-1]) // b + 1) * b)) if len(cols) else (0, 1)
    spans.append((slice(start, start + len(t)), slice(lo, hi)))
  return spans


def _here(at: _MaskInputs, rows: slice, cols: slice) -> _MaskInputs:
  """One block of queries and its keys, positions as numpy."""

  def part(side: _Side, block: slice) -> _Side:
    segments = None if side.segments is None else side.segments[:, block]
    return _Side(np.arange(block.start, block.stop), segments)

  queries, keys, slopes = at
  return part(queries, rows), part(keys, cols), slopes


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _unrolled(q, k, v, sinks, at: _MaskInputs, static: _Static):
  return _unrolled_forward(q, k, v, sinks, at, static)[0]


def _unrolled_forward(q, k, v, sinks, at, static):
  (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
  spans = _spans(T, S, static)
  # Keeping the probabilities saves the backward pass a product and an exp: a seventh of all work,
  # for memory that grows with T^2. With a soft cap its derivative would have to be kept too, so
  # they are recomputed.
  pairs = sum((r.stop - r.start) * (c.stop - c.start) for r, c in spans)
  keep = static.softcap is None and pairs * B * H * q.dtype.itemsize <= _KEEP_BYTES
  qh, kh, vh = _heads_first(q, G), k.swapaxes(1, 2), v.swapaxes(1, 2)
  outs, lses, ps, p_sinks = [], [], [], []
  sink = None if sinks is None else sinks[None, :, :, None, None]
  for rows, cols in spans:
    a, _ = _logits(qh[:, :, :, rows], kh[:, :, cols], _here(at, rows, cols), static)
    top = jnp.maximum(a.max(-1, keepdims=True), _FLOOR if sink is None else sink)
    p = jnp.exp(a - top)
    total = p.sum(-1, keepdims=True)
    if sink is not None:
      total = total + jnp.exp(sink - top)
      p_sinks.append(jnp.exp(sink - top) / total)
    total = jnp.where(total == 0, 1.0, total)
    p = (p / total).astype(v.dtype)
    outs.append(_product('BGRTS,BGSC->BGRTC', p, vh[:, :, cols]).astype(q.dtype))
    ps.append(p if keep else None)
    lses.append(None if keep else top + jnp.log(total))
  out = jnp.concatenate(outs, axis=3)
  p_sink = None if sinks is None else jnp.concatenate(p_sinks, axis=3)
  return _heads_last(out), (qh, kh, vh, p_sink, at, out, lses, ps)


def _unrolled_backward(static, saved, do):
  q, k, v, p_sink, at, out, lses, ps = saved
  (B, G, _, T, K), S, b = q.shape, k.shape[2], static.block
  do = _heads_first(do, G)
  delta = _delta(do, out)
  dqs = []
  dks, dvs = (
    [jnp.zeros((B, G, min(b, S - j), size), jnp.float32) for j in range(0, S, b)]
    for size in (K, v.shape[-1])
  )
  for (rows, cols), lse, p in zip(_spans(T, S, static), lses, ps, strict=True):
    qi, kj, slope = q[:, :, :, rows], k[:, :, cols], None
    if p is None:
      a, slope = _logits(qi, kj, _here(at, rows, cols), static)
      p = jnp.exp(a - lse)
    dq, dk, dv = _block_gradients(
      p, qi, kj, v[:, :, cols], do[:, :, :, rows], delta[:, :, :, rows], slope, static.scale
    )
    dqs.append(dq.astype(q.dtype))
    # block by block, as adding to a slice would copy the complete array
    for j in range(cols.start // b, -(-cols.stop // b)):
      here = slice(j * b - cols.start, min((j + 1) * b, S) - cols.start)
      dks[j], dvs[j] = dks[j] + dk[:, :, here], dvs[j] + dv[:, :, here]
  dk, dv = (jnp.concatenate(x, axis=2).swapaxes(1, 2) for x in (dks, dvs))
  dq = _heads_last(jnp.concatenate(dqs, axis=3))
  dsinks = None if p_sink is None else _sink_gradients(p_sink, delta)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None


_unrolled.defvjp(_unrolled_forward, _unrolled_backward)


def attention_unrolled(
  q, k, v, mask: Mask, *, scale, softcap=None, slopes_H=None, sinks_H=None, block=None
):
  """Attention in about eight blocks of queries, each against only the keys that it can see, for an
  aligned mask. Half the work of the naive implementation under a causal mask; temporaries of one
  block, B H T S / 8 numbers."""
  at = _mask_inputs(mask, slopes_H, None, None, k.shape[2])
  block = block or max(64, -(-q.shape[1] // 512) * 64)
  static = _Static(mask.causal, mask.window, scale, softcap, block)
  return _unrolled(q, k, v, _sinks(sinks_H, k.shape[2]), at, static)
