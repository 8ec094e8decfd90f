"""Cross-entropy in slices of the vocabulary: a running logsumexp forward, recomputed logits of the
slice backward.

With l = x W + b, L = logsumexp(l), y the target and m the argmax: d loss / d l_v = exp(l_v - L) (1
+ 2 z L) - [v = y] + c l_v [v = m], for z-loss weight z and weight c of the largest logit's loss.

A vocabulary that is sharded has an additional axis, `s`: a slice takes as many columns from every
shard, the running maximum and sum are kept per shard and combined once after the loop, and so is
dx, so that the loop itself communicates with no other shard of the vocabulary. On a mesh with
sharded parameters the loop all-gathers one slice of W, in the dtype of the products, and reduces
one slice of dW.

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

from jaxformer.hardware import chip
from jaxformer.ops.softcap import scaled_and_capped
from jaxformer.sharding import device_kind, platform, shard, shard_param, shards
from jaxformer.task_type import IGNORE

# logits of one slice on one device, fp32; the backward pass holds them in the dtype of the products
_LOGIT_BYTES = 2**26
_LANES = 128


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """The static arguments of `ops.loss.cross_entropy`."""

  z_loss: float
  max_logit_loss: float
  logit_scale: float | None
  softcap: float | None
  label_smoothing: float
  chunk: int  # 0: the best size
  transposed: bool  # W lies in memory as V x D


def _chunk(x, V: int, parts: int) -> int:
  """Columns of a shard at a time: slices of equal size, whole lanes, within `_LOGIT_BYTES` unless
  these are too few for the device.

  The sum dx is read and written in fp32 by a product of 2 D C FLOPs per token, C / 4 per byte. It
  waits for the memory if the device has more FLOPs per byte that it reads: 240 on a TPU v5e, 560
  on a v6e."""
  B, T, _ = x.shape
  tokens = B * T // (shards('batch', B) * shards('time', T))
  known = chip(device_kind())
  least = 4 * known.peak() / known.bytes_per_second if known else 0
  most = max(-int(-least // _LANES), _LOGIT_BYTES // (4 * tokens) // _LANES, 1) * _LANES
  columns = V // parts
  return min(columns, -(-columns // -(-columns // most) // _LANES) * _LANES)


def _slices(f, carry, V: int, chunk: int):
  """f(carry, start, size) over the columns of a shard, the last slice shorter."""
  n = V // chunk
  carry = lax.fori_loop(0, n, lambda i, c: f(c, i * chunk, chunk), carry)
  return f(carry, n * chunk, V - n * chunk) if V % chunk else carry


def _as_stored(w, transposed: bool):
  """Keep a slice `D s C` in the layout in which W is stored; the TPU's compiler may otherwise copy
  all of W into the other layout."""
  # the partitioner would all-gather a sharded array under such a constraint
  if platform() != 'tpu' or w.shape[1] > 1:
    return w
  return with_layout_constraint(w, Layout((1, 2, 0) if transposed else (1, 0, 2)))


def _cast(w, dtype):
  """`astype` that stays inside the loop. The TPU's compiler would move a plain rounding to bf16 out
  of it and keep a copy of W."""
  if w.dtype == dtype or w.dtype.itemsize <= dtype.itemsize:
    return w.astype(dtype)
  kind = jnp.finfo(dtype)
  return lax.reduce_precision(w, kind.nexp, kind.nmant).astype(dtype)


def _logits(x, w, bias, start, size, options: LossOptions):
  """Logits `B T s C` of the columns from `start` in every shard in fp32, the derivative of scale
  and soft cap, the slice of W."""
  # otherwise all of W would be all-gathered, then sliced
  w = shard_param(lax.dynamic_slice_in_dim(w, start, size, axis=2), 'embed', 'vocab', None)
  # all-gathered after the cast: half the bytes
  w = shard(_cast(_as_stored(w, options.transposed), x.dtype), None, 'vocab', None)
  logits = jnp.einsum('BTD,DsC->BTsC', x, w, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + lax.dynamic_slice_in_dim(bias, start, size, axis=1)[None, None]
  logits, slope = scaled_and_capped(logits, options.logit_scale, options.softcap)
  return shard(logits, 'batch', 'time', 'vocab', None), slope, w


def _is_target(targets, start, size, parts: int, V: int):
  """`B T s C`: whether a column is the token's target. IGNORE is no column."""
  columns = jnp.arange(parts)[:, None] * V + start + jnp.arange(size)[None]
  return targets[:, :, None, None] == columns[None, None]


def _logsumexp(x, w, bias, targets, options: LossOptions):
  """logsumexp of all logits, the target's logit and the largest, `B T` each, for W by shards `D s
  V`."""
  return _with_argmax(x, w, bias, targets, options)[:3]


def _with_argmax(x, w, bias, targets, options: LossOptions):
  """The same, and the column of the largest logit, if its loss needs it, else zeros."""
  (B, T, _), (_, parts, V) = x.shape, w.shape

  def some(carry, start, size):
    top, total, picked, which = carry
    logits, _, _ = _logits(x, w, bias, start, size, options)
    new = jnp.maximum(top, logits.max(-1))
    if options.max_logit_loss:
      here = jnp.arange(parts)[None, None] * V + start + jnp.argmax(logits, axis=-1)
      which = jnp.where(new > top, here.astype(jnp.int32), which)
    total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
    picked = picked + jnp.where(_is_target(targets, start, size, parts, V), logits, 0.0).sum(-1)
    return new, total, picked, which

  zero = shard(jnp.zeros((B, T, parts), jnp.float32), 'batch', 'time', 'vocab')
  start = jnp.full_like(zero, -jnp.inf), zero, zero, zero.astype(jnp.int32)
  top, total, picked, which = _slices(some, start, V, options.chunk)
  largest = top.max(-1)
  which = jnp.where(top == largest[..., None], which, 0).max(-1)
  return jax.nn.logsumexp(top + jnp.log(total), axis=-1), picked.sum(-1), largest, which


def loss_sums(targets, lse, picked, top, options: LossOptions):
  """Loss with those of the logits' size, and nll, summed over the counted tokens, from the
  logsumexp of each token's logits, its target's logit and the largest."""
  counted = targets != IGNORE
  nll = jnp.where(counted, lse - picked, 0.0).sum()
  size = options.z_loss * jnp.square(lse)
  if options.max_logit_loss:
    size = size + 0.5 * options.max_logit_loss * jnp.square(top)
  return nll + jnp.where(counted, size, 0.0).sum(), nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x, w, bias, targets, options: LossOptions):
  """`loss_sums`; a gradient flows through the first alone."""
  return _forward(x, w, bias, targets, options)[0]


def _forward(x, w, bias, targets, options):
  lse, picked, top, which = _with_argmax(x, w, bias, targets, options)
  sums = loss_sums(targets, lse, picked, top, options)
  largest = (top, which) if options.max_logit_loss else None
  return sums, (x, w, bias, targets, targets != IGNORE, lse, largest)


def _backward(options, saved, cotangents):
  x, w, bias, targets, counted, lse, largest = saved
  (B, T, D), (_, parts, V) = x.shape, w.shape
  weight = jnp.where(counted, cotangents[0], 0.0)
  factor = weight * (1.0 + 2.0 * options.z_loss * lse)
  lse, weight, factor = (a[:, :, None, None] for a in (lse, weight, factor))

  def some(carry, start, size):
    dx, dw, db = carry
    logits, slope, ws = _logits(x, w, bias, start, size, options)
    is_target = _is_target(targets, start, size, parts, V)
    d = jnp.exp(logits - lse) * factor - jnp.where(is_target, weight, 0.0)
    if largest is not None:
      top, which = largest
      is_top = _is_target(which, start, size, parts, V)
      pull = options.max_logit_loss * top[:, :, None, None] * weight
      d = d + jnp.where(is_top, pull, 0.0)
    d = d if slope is None else d * slope
    if db is not None:
      db = lax.dynamic_update_slice_in_dim(db, d.sum((0, 1)), start, axis=1)
    d = shard(d.astype(x.dtype), 'batch', 'time', 'vocab', None)
    # accumulated, and reduced over a mesh, in the dtype of W
    dws = jnp.einsum('BTD,BTsC->DsC', x, d, preferred_element_type=w.dtype)
    dws = shard_param(dws, 'embed', 'vocab', None)
    dw = lax.dynamic_update_slice_in_dim(dw, dws, start, axis=2)
    dx = dx + jnp.einsum('BTsC,DsC->sBTD', d, ws, preferred_element_type=jnp.float32)
    return shard(dx, 'vocab', 'batch', 'time', None), dw, db

  dx = shard(jnp.zeros((parts, B, T, D), jnp.float32), 'vocab', 'batch', 'time', None)
  dw = shard_param(jnp.zeros(w.shape, w.dtype), 'embed', 'vocab', None)
  start = dx, dw, jax.tree.map(jnp.zeros_like, bias)  # it may be None
  dx, dw, db = _slices(some, start, V, options.chunk)
  return dx.sum(0).astype(x.dtype), dw, db, None


_loss.defvjp(_forward, _backward)


def _by_shard(compute):
  """`compute` with W and the bias by shards, `D V` -> `D s V` and `V` -> `s V`, and with options
  that have a chunk."""

  def of_all(x, w_DV, bias_V, targets_BT, options: LossOptions):
    D, V = w_DV.shape
    parts = shards('vocab', V)
    w = shard_param(w_DV.reshape(D, parts, V // parts), 'embed', 'vocab', None)
    bias = None if bias_V is None else bias_V.reshape(parts, V // parts)
    options = dataclasses.replace(options, chunk=options.chunk or _chunk(x, V, parts))
    return compute(x, w, bias, targets_BT, options)

  return of_all


vocabulary_loss, vocabulary_logsumexp = _by_shard(_loss), _by_shard(_logsumexp)
