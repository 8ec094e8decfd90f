"""Cross-entropy in slices of the vocabulary: a running logsumexp forward, the slice's logits again
backward.

With l = x W + b, L = logsumexp(l) and y the target: d loss / d l_v = exp(l_v - L) (1 + 2 z L) - [v
= y], for z-loss weight z.

A vocabulary divided over the mesh is given an axis of its own, `s`: a slice takes as many columns
from every shard, the running maximum and sum are kept per shard and joined once after the loop, and
so is dx, so that the loop itself talks to no other shard of the vocabulary. What remains in the
loop on a mesh with divided parameters: a gather of one slice of W, in the dtype of the products,
and a reduction of one slice of dW.

Dims: B batch, T time, D width, s shards of the vocabulary, V vocabulary (of one shard here), C a
  slice of it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from jaxformer.sharding import platform, shard, shard_param, shards

# of one slice on one device, fp32; the backward pass holds it in the dtype of the products
_LOGIT_BYTES = 2**26
_LANES = 128


@dataclasses.dataclass(frozen=True)
class _Static:
  z_loss: float
  softcap: float | None
  chunk: int
  transposed: bool  # W lies in memory as V x D


def _chunk(x, V: int, parts: int) -> int:
  """Columns of a shard at a time: slices of equal size, whole lanes, within `_LOGIT_BYTES`."""
  B, T, _ = x.shape
  tokens = B * T // (shards('batch', B) * shards('time', T))
  most = max(_LANES, _LOGIT_BYTES // (4 * tokens) // _LANES * _LANES)
  columns = V // parts
  return min(columns, -(-columns // -(-columns // most) // _LANES) * _LANES)


def _by_shard(w, bias, parts: int):
  """`D V` -> `D s V` and `V` -> `s V`."""
  D, V = w.shape
  w = shard_param(w.reshape(D, parts, V // parts), 'embed', 'vocab', None)
  return w, None if bias is None else bias.reshape(parts, V // parts)


def _slices(f, carry, V: int, chunk: int):
  """f(carry, start, size) over the columns of a shard, the last slice shorter."""
  n = V // chunk
  carry = lax.fori_loop(0, n, lambda i, c: f(c, i * chunk, chunk), carry)
  return f(carry, n * chunk, V - n * chunk) if V % chunk else carry


def _as_stored(w, transposed: bool):
  """Keeps a slice `D s C` in the layout in which W is stored; the TPU's compiler else may copy all
  of W into the other one."""
  # the partitioner gathers what such a constraint names over the shards
  if platform() != 'tpu' or w.shape[1] > 1:
    return w
  return with_layout_constraint(w, Layout((1, 2, 0) if transposed else (1, 0, 2)))


def _cast(w, dtype):
  """`astype` that stays where it is. The TPU's compiler moves a plain rounding to bf16 out of the
  loop and keeps a copy of W."""
  if w.dtype == dtype or w.dtype.itemsize <= dtype.itemsize:
    return w.astype(dtype)
  kind = jnp.finfo(dtype)
  return lax.reduce_precision(w, kind.nexp, kind.nmant).astype(dtype)


def _logits(x, w, bias, start, size, static: _Static):
  """Logits `B T s C` of the columns from `start` in every shard in fp32, the soft cap's derivative,
  the slice of W."""
  # or all of W is gathered, then sliced
  w = shard_param(lax.dynamic_slice_in_dim(w, start, size, axis=2), 'embed', 'vocab', None)
  # gathered after the cast: half the bytes
  w = shard(_cast(_as_stored(w, static.transposed), x.dtype), None, 'vocab', None)
  logits, slope = jnp.einsum('BTD,DsC->BTsC', x, w, preferred_element_type=jnp.float32), None
  if bias is not None:
    logits = logits + lax.dynamic_slice_in_dim(bias, start, size, axis=1)[None, None]
  if static.softcap is not None:
    capped = jnp.tanh(logits / static.softcap)
    logits, slope = static.softcap * capped, 1.0 - jnp.square(capped)
  return shard(logits, 'batch', 'time', 'vocab', None), slope, w


def _is_target(targets, start, size, parts: int, V: int):
  """`B T s C`: whether a column is the token's target. IGNORE is no column."""
  columns = jnp.arange(parts)[:, None] * V + start + jnp.arange(size)[None]
  return targets[:, :, None, None] == columns[None, None]


def _logsumexp(x, w, bias, targets, static: _Static):
  """logsumexp of all logits, the target's logit and the largest, `B T` each, for W by shards `D s
  V`."""
  (B, T, _), (_, parts, V) = x.shape, w.shape

  def some(carry, start, size):
    top, total, picked = carry
    logits, _, _ = _logits(x, w, bias, start, size, static)
    new = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
    picked = picked + jnp.where(_is_target(targets, start, size, parts, V), logits, 0.0).sum(-1)
    return new, total, picked

  zero = shard(jnp.zeros((B, T, parts), jnp.float32), 'batch', 'time', 'vocab')
  top, total, picked = _slices(some, (jnp.full_like(zero, -jnp.inf), zero, zero), V, static.chunk)
  return jax.nn.logsumexp(top + jnp.log(total), axis=-1), picked.sum(-1), top.max(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _loss(x, w, bias, targets, counted, static: _Static):
  return _forward(x, w, bias, targets, counted, static)[0]


def _forward(x, w, bias, targets, counted, static):
  lse, picked, _ = _logsumexp(x, w, bias, targets, static)
  nll = jnp.where(counted, lse - picked, 0.0).sum()
  loss = nll + jnp.where(counted, static.z_loss * jnp.square(lse), 0.0).sum()
  return (loss, nll), (x, w, bias, targets, counted, lse)


def _backward(static, saved, cotangents):
  x, w, bias, targets, counted, lse = saved
  (B, T, D), (_, parts, V) = x.shape, w.shape
  weight = jnp.where(counted, cotangents[0], 0.0)
  factor = weight * (1.0 + 2.0 * static.z_loss * lse)
  lse, weight, factor = (a[:, :, None, None] for a in (lse, weight, factor))

  def some(carry, start, size):
    dx, dw, db = carry
    logits, slope, ws = _logits(x, w, bias, start, size, static)
    d = jnp.exp(logits - lse) * factor - jnp.where(
      _is_target(targets, start, size, parts, V), weight, 0.0
    )
    d = d if slope is None else d * slope
    if db is not None:
      db = lax.dynamic_update_slice_in_dim(db, d.sum((0, 1)), start, axis=1)
    d = shard(d.astype(x.dtype), 'batch', 'time', 'vocab', None)
    # and so are the parts that a mesh adds up
    dws = jnp.einsum('BTD,BTsC->DsC', x, d, preferred_element_type=w.dtype)
    dws = shard_param(dws, 'embed', 'vocab', None)
    dw = lax.dynamic_update_slice_in_dim(dw, dws, start, axis=2)
    dx = dx + jnp.einsum('BTsC,DsC->sBTD', d, ws, preferred_element_type=jnp.float32)
    return shard(dx, 'vocab', 'batch', 'time', None), dw, db

  dx = shard(jnp.zeros((parts, B, T, D), jnp.float32), 'vocab', 'batch', 'time', None)
  dw = shard_param(jnp.zeros(w.shape, w.dtype), 'embed', 'vocab', None)
  dx, dw, db = _slices(
    some, (dx, dw, None if bias is None else jnp.zeros_like(bias)), V, static.chunk
  )
  return dx.sum(0).astype(x.dtype), dw, db, None, None


_loss.defvjp(_forward, _backward)


def vocabulary_loss(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  bias_V: Float[Array, ' V'] | None,
  targets_BT: Int[Array, 'B T'],
  counted_BT: Bool[Array, 'B T'],
  *,
  z_loss: float,
  softcap: float | None,
  chunk: int | None = None,
  transposed: bool = False,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Loss with z-loss, and nll, summed over the counted tokens. A gradient flows through the first
  alone."""
  parts = shards('vocab', w_DV.shape[1])
  static = _Static(z_loss, softcap, chunk or _chunk(x, w_DV.shape[1], parts), transposed)
  return _loss(x, *_by_shard(w_DV, bias_V, parts), targets_BT, counted_BT, static)


def vocabulary_logsumexp(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  bias_V: Float[Array, ' V'] | None,
  targets_BT: Int[Array, 'B T'],
  *,
  softcap: float | None,
  chunk: int | None = None,
  transposed: bool = False,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T'], Float[Array, 'B T']]:
  """logsumexp of each token's logits, its target's logit, and the largest."""
  parts = shards('vocab', w_DV.shape[1])
  static = _Static(0.0, softcap, chunk or _chunk(x, w_DV.shape[1], parts), transposed)
  return _logsumexp(x, *_by_shard(w_DV, bias_V, parts), targets_BT, static)
