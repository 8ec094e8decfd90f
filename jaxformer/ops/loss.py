"""Cross-entropy over a large vocabulary without the logits of all tokens in memory.

Two implementations beside the naive one, both with custom VJPs:

- `rows` takes a few tokens against all of the vocabulary and computes the gradient right away, in
  the forward pass: three matrix products per token instead of four, at the price of an fp32
  accumulator of the size of W. For CPUs and small vocabularies.
- `vocabulary` (`loss_vocabulary.py`) takes all tokens against a slice of the vocabulary with a
  running logsumexp, and recomputes the slice's logits in the backward pass: each slice of dW is
  written once, so there is no accumulator for it, and one reduction per slice on a mesh. For large
  vocabularies and sharded weights.

Dims: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformer import sharding
from jaxformer.ops.chunks import to_chunks
from jaxformer.ops.implementation import Operation
from jaxformer.ops.loss_vocabulary import (
  LossOptions,
  loss_sums,
  vocabulary_logsumexp,
  vocabulary_loss,
)
from jaxformer.ops.softcap import scaled_and_capped
from jaxformer.task_type import IGNORE

_ROWS = {'cpu': 512}  # tokens at a time; a CPU wants their logits in its cache
_ACCUMULATOR_BYTES = 2**26  # the largest fp32 dW that an accelerator accumulates


class LossSums(NamedTuple):
  """Sums over the counted targets of a batch. Divide by `count` (after summing over microbatches)
  for means.

  Attributes:
    loss: the objective: cross-entropy with smoothed targets plus the losses of the logits' size,
      in nats.
    nll: cross-entropy alone, in nats. For reporting: no gradient flows through it.
    count: number of counted targets, fp32.
  """

  loss: Float[Array, '']
  nll: Float[Array, '']
  count: Float[Array, '']


def cross_entropy(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  bias_V: Float[Array, ' V'] | None = None,
  z_loss: float = 0.0,
  max_logit_loss: float = 0.0,
  logit_scale: float | None = None,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  transposed: bool = False,
  chunk: int | None = None,
) -> LossSums:
  """sum_i [logsumexp(l_i) - sum_v q_iv l_i[v] + z_loss logsumexp(l_i)^2 + max_logit_loss / 2 max_v
  l_i[v]^2] over targets y_i != IGNORE, with l_i = x_i W + b in fp32 (the z-loss of PaLM, section 5;
  the loss of the largest logit of RWKV, `L2Wrap` in its code; the logits are multiplied by
  `logit_scale` first, and `softcap` c makes them c tanh(l / c)).

  q_i is 1 at y_i; with `label_smoothing` e it is 1 - e there, plus e / V everywhere (Szegedy et al.
  2016, section 7).

  Products are in the dtype of x, with fp32 accumulation: pass the fp32 W with a bf16 x, each slice
  is cast as it is used, and its gradient is fp32. Differentiable once, in x, W and the bias,
  through `loss` alone.

  Args:
    label_smoothing: cannot be combined with `softcap`.
    transposed: W is `table_VD.T`, a tied embedding table; a TPU then slices it as it is stored and
      keeps no copy of it.
    chunk: tokens (rows) or columns of a shard of W (vocabulary) at a time; None for the best size.
  """
  compute = CROSS_ENTROPY[CROSS_ENTROPY.choose(x, w_DV)]
  if label_smoothing and softcap is not None:
    raise ValueError('cross_entropy: label_smoothing needs logits without a softcap')
  bias_V = None if bias_V is None else bias_V.astype(jnp.float32)
  options = LossOptions(
    z_loss, max_logit_loss, logit_scale, softcap, label_smoothing, chunk or 0, transposed
  )
  loss, nll = compute(x, w_DV, bias_V, targets_BT, options)
  count = (targets_BT != IGNORE).sum().astype(jnp.float32)
  return LossSums(loss, lax.stop_gradient(nll), count)


def token_scores(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  bias_V: Float[Array, ' V'] | None = None,
  logit_scale: float | None = None,
  softcap: float | None = None,
  transposed: bool = False,
  chunk: int | None = None,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """logsumexp(l_i) - l_i[y_i] of each token in nats, and whether no logit is larger than l_i[y_i];
  0 and False where the target is `IGNORE`. For evaluation, without a gradient."""
  compute = TOKEN_SCORES[TOKEN_SCORES.choose(x, w_DV)]
  bias_V = None if bias_V is None else bias_V.astype(jnp.float32)
  options = LossOptions(0.0, 0.0, logit_scale, softcap, 0.0, chunk or 0, transposed)
  arrays = lax.stop_gradient((x, w_DV, bias_V))
  lse, picked, top = compute(*arrays, targets_BT, options)
  counted = targets_BT != IGNORE
  return jnp.where(counted, lse - picked, 0.0), counted & (picked >= top)


def _naive(x, w_DV, bias_V, targets_BT, options: LossOptions):
  """All logits in memory; W is rounded to the dtype of x."""
  logits = jnp.einsum('BTD,DV->BTV', x, w_DV.astype(x.dtype), preferred_element_type=jnp.float32)
  logits = logits if bias_V is None else logits + bias_V[None, None]
  logits, _ = scaled_and_capped(logits, options.logit_scale, options.softcap)
  counted = targets_BT != IGNORE
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
  nll = jnp.where(counted, lse - picked, 0.0)
  smooth = jnp.where(counted, options.label_smoothing * (picked - logits.mean(-1)), 0.0)
  size = options.z_loss * jnp.square(lse)
  size = size + 0.5 * options.max_logit_loss * jnp.square(logits.max(-1))
  extra = smooth + jnp.where(counted, size, 0.0)
  return (nll + extra).sum(), nll.sum()


def _smoothed(sums):
  """`sums`, an implementation, with smoothed targets."""

  def compute(x, w_DV, bias_V, targets_BT, options: LossOptions):
    loss, nll = sums(x, w_DV, bias_V, targets_BT, options)
    if options.label_smoothing:
      above = _above_mean(x, w_DV, bias_V, targets_BT)
      above = above if options.logit_scale is None else options.logit_scale * above
      loss = loss + options.label_smoothing * above
    return loss, nll

  return compute


def _above_mean(x, w_DV, bias_V, targets_BT):
  """sum_i (l_i[y_i] - mean_v l_i[v]) over the counted targets: the term of smoothing, divided by
  its strength and by the scale of the logits. The mean of logits is one product with the mean of
  W's columns, so no row of logits is needed."""
  w = w_DV.astype(x.dtype)
  columns_BTD = jnp.moveaxis(jnp.take(w, jnp.maximum(targets_BT, 0), axis=1, mode='clip'), 0, -1)
  away_BTD = columns_BTD.astype(jnp.float32) - w.astype(jnp.float32).mean(1)[None, None]
  above = jnp.einsum('BTD,BTD->BT', x.astype(jnp.float32), away_BTD)
  if bias_V is not None:
    above = above + jnp.take(bias_V, jnp.maximum(targets_BT, 0), mode='clip') - bias_V.mean()
  return jnp.where(targets_BT != IGNORE, above, 0.0).sum()


# ---- tokens in chunks, the gradient computed in the forward pass -------------------------------


def _in_rows(x, options: LossOptions) -> LossOptions:
  """Positions of every sequence at a time, from tokens at a time; chunks of equal size rather than
  a short last one."""
  B, T, _ = x.shape
  n = max(1, (options.chunk or _ROWS.get(sharding.platform(), 1024)) // B)
  return dataclasses.replace(options, chunk=-(-T // -(-T // n)))


def _rows(x, w_DV, bias_V, targets_BT, options: LossOptions):
  return _rows_loss(x, w_DV, bias_V, targets_BT, _in_rows(x, options))


def _rows_logsumexp(x, w_DV, bias_V, targets_BT, options: LossOptions):
  """logsumexp of each token's logits, its target's logit, and the largest."""
  (B, T, _), options, w = x.shape, _in_rows(x, options), w_DV.astype(x.dtype)
  found = lax.map(
    lambda a: _row_logits(*a, w, bias_V, options)[3:], _chunks(x, targets_BT, options.chunk)
  )
  return (jnp.moveaxis(a.reshape(-1, B, options.chunk), 0, 1).reshape(B, -1)[:, :T] for a in found)


def _chunks(x, targets, n: int):
  """`B T D` -> `chunks, B n, D`, padded with targets that do not count."""
  x, targets = to_chunks(x, n), to_chunks(targets, n, fill=IGNORE)
  return x.reshape(len(x), -1, x.shape[-1]), targets.reshape(len(targets), -1)


def _row_logits(x, targets, w, bias, options: LossOptions):
  """exp(l - max), its sum, the derivative of scale and soft cap, logsumexp, the target's logit and
  the largest, of some tokens `[N, D]`."""
  logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias[None]
  logits, slope = scaled_and_capped(logits, options.logit_scale, options.softcap)
  top = logits.max(-1, keepdims=True)
  e = lax.optimization_barrier(jnp.exp(logits - top))
  total = e.sum(-1, keepdims=True)
  picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
  return e, total, slope, (top + jnp.log(total))[:, 0], picked, top[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rows_loss(x, w, bias, targets, options: LossOptions):
  """Loss and nll without a gradient: one matrix product per token."""
  w_cast, zero = w.astype(x.dtype), jnp.float32(0)

  def some(sums, chunk):
    found = _row_logits(*chunk, w_cast, bias, options)[3:]
    return jax.tree.map(jnp.add, sums, loss_sums(chunk[1], *found, options)), None

  return lax.scan(some, (zero, zero), _chunks(x, targets, options.chunk))[0]


def _rows_forward(x, w, bias, targets, options):
  (B, T, D), V, w_cast = x.shape, w.shape[1], w.astype(x.dtype)

  def some(carry, chunk):
    sums, dw, db = carry
    xs, ys = chunk
    e, total, slope, lse, picked, top = _row_logits(xs, ys, w_cast, bias, options)
    # The gradient of the logits is f (e - hot / f) per row: e is known from the forward pass and
    # changes in one column per row, and the factor goes to the narrow sides of the products.
    # Another pass over the logits would cost a tenth of a product.
    counted = (ys != IGNORE).astype(jnp.float32)
    f = counted / total[:, 0] * (1.0 + 2.0 * options.z_loss * lse)
    per_f = counted / jnp.where(f == 0, 1.0, f)
    d = e.at[jnp.arange(len(ys)), jnp.maximum(ys, 0)].add(-per_f)
    if options.max_logit_loss:
      at_top = jnp.arange(len(ys)), jnp.argmax(e, axis=-1)
      d = d.at[at_top].add(options.max_logit_loss * top * per_f)
    d = d if slope is None else d * slope
    db = None if db is None else db + f @ d
    d = d.astype(x.dtype)
    dx = (f[:, None] * jnp.dot(d, w_cast.T, preferred_element_type=jnp.float32)).astype(x.dtype)
    # the transpose is written out, as in `linear`
    left = lax.optimization_barrier((f[:, None] * xs).astype(x.dtype).T)
    dw = dw + jnp.dot(left, d, preferred_element_type=jnp.float32)
    sums = jax.tree.map(jnp.add, sums, loss_sums(ys, lse, picked, top, options))
    return (sums, dw, db), dx

  zero = jnp.float32(0)  # tree.map: a bias may be None
  start = (zero, zero), jnp.zeros((D, V), jnp.float32), jax.tree.map(jnp.zeros_like, bias)
  (sums, dw, db), dx = lax.scan(some, start, _chunks(x, targets, options.chunk))
  dx = dx.reshape(-1, B, options.chunk, D).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
  return sums, (dx, dw.astype(w.dtype), db)


def _rows_backward(options, saved, cotangents):
  return *jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), saved), None


_rows_loss.defvjp(_rows_forward, _rows_backward)


# ---- the choice --------------------------------------------------------------------------------


def _order(x: Array | jax.ShapeDtypeStruct, w_DV: Array | jax.ShapeDtypeStruct) -> tuple[str, ...]:
  """On several devices `rows` would reduce dW once per chunk."""
  (B, T, _), (D, V) = x.shape, w_DV.shape
  if sharding.shards('batch', B) * sharding.shards('time', T) * sharding.shards('vocab', V) > 1:
    return ('vocabulary',)
  rows = sharding.platform() == 'cpu' or 4 * D * V <= _ACCUMULATOR_BYTES
  return ('rows',) if rows else ('vocabulary',)


CROSS_ENTROPY = Operation(
  'cross_entropy',
  {'naive': _naive, 'rows': _smoothed(_rows), 'vocabulary': _smoothed(vocabulary_loss)},
  _order,
)
TOKEN_SCORES = Operation(
  'token_scores', {'rows': _rows_logsumexp, 'vocabulary': vocabulary_logsumexp}, _order
)
