"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens.

Two routes with one meaning, both with VJPs of their own:

- `rows` takes a few tokens against the whole vocabulary and forms the gradient right away, in the
  forward pass: three matrix products a token instead of four, at the price of an fp32 accumulator
  of the size of W. For CPUs and small vocabularies.
- `vocabulary` (`loss_vocabulary.py`) takes all tokens against a slice of the vocabulary with a
  running logsumexp, and computes the slice's logits again in the backward pass: each slice of dW is
  written once, so there is no accumulator for it, and one reduction a slice on a mesh. For large
  vocabularies and divided weights.

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
from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.loss_vocabulary import vocabulary_logsumexp, vocabulary_loss
from jaxformer.task_type import IGNORE

_ROWS = {'cpu': 512}  # tokens at a time; a CPU wants their logits in its cache
_ACCUMULATOR_BYTES = 2**26  # the largest fp32 dW that an accelerator accumulates


class LossSums(NamedTuple):
  """Sums over the counted targets of a batch. Divide by `count` (after summing over microbatches)
  for means.

  Attributes:
    loss: what is minimised: cross-entropy with smoothed targets plus the z-loss, in nats.
    nll: cross-entropy alone, in nats. For reporting: no gradient flows through it.
    count: number of counted targets, fp32.
  """

  loss: Float[Array, '']
  nll: Float[Array, '']
  count: Float[Array, '']


def cross_entropy_naive(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  bias_V: Float[Array, ' V'] | None = None,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
) -> LossSums:
  """sum_i [logsumexp(l_i) - sum_v q_iv l_i[v] + z_loss logsumexp(l_i)^2] over targets y_i !=
  IGNORE, with l_i = x_i W + b in fp32 (the z-loss of PaLM, section 5; `softcap` c makes the logits
  c tanh(l / c)). W is rounded to the dtype of x.

  q_i is 1 at y_i; with `label_smoothing` e it is 1 - e there and e / V everywhere besides (Szegedy
  et al. 2016, section 7)."""
  logits = jnp.einsum('BTD,DV->BTV', x, w_DV.astype(x.dtype), preferred_element_type=jnp.float32)
  if bias_V is not None:
    logits = logits + bias_V.astype(jnp.float32)[None, None]
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  counted = targets_BT != IGNORE
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
  nll = jnp.where(counted, lse - picked, 0.0)
  smooth = jnp.where(counted, label_smoothing * (picked - logits.mean(-1)), 0.0)
  extra = smooth + jnp.where(counted, z_loss * jnp.square(lse), 0.0)
  return LossSums(
    (nll + extra).sum(), lax.stop_gradient(nll.sum()), counted.sum().astype(jnp.float32)
  )


def _order(
  x: Float[Array | jax.ShapeDtypeStruct, 'B T D'], w_DV: Float[Array | jax.ShapeDtypeStruct, 'D V']
) -> tuple[str, ...]:
  """On several devices `rows` would reduce dW once per chunk."""
  (B, T, _), (D, V) = x.shape, w_DV.shape
  if sharding.shards('batch', B) * sharding.shards('time', T) * sharding.shards('vocab', V) > 1:
    return ('vocabulary',)
  rows = sharding.platform() == 'cpu' or 4 * D * V <= _ACCUMULATOR_BYTES
  return ('rows',) if rows else ('vocabulary',)


def cross_entropy(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  bias_V: Float[Array, ' V'] | None = None,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  transposed: bool = False,
  chunk: int | None = None,
) -> LossSums:
  """`cross_entropy_naive` in chunks.

  Products are in the dtype of x, with fp32 accumulation: pass the fp32 W with a bf16 x, each slice
  is cast as it is used, and its gradient comes back in fp32. Differentiable once, in x, W and the
  bias, through `loss` alone.

  Args:
    label_smoothing: as in the naive form; it takes no `softcap` beside it.
    transposed: W is `table_VD.T`, a tied embedding table; so that a TPU slices it as it is stored
      and keeps no copy of it.
    chunk: tokens (rows) or columns of a shard of W (vocabulary) at a time, None for what suits.
  """
  chosen = CROSS_ENTROPY.choose(x, w_DV)
  if chosen == 'naive':
    return cross_entropy_naive(
      x,
      w_DV,
      targets_BT,
      bias_V=bias_V,
      z_loss=z_loss,
      softcap=softcap,
      label_smoothing=label_smoothing,
    )
  counted = targets_BT != IGNORE
  bias_V = None if bias_V is None else bias_V.astype(jnp.float32)
  if chosen == 'vocabulary':
    loss, nll = vocabulary_loss(
      x,
      w_DV,
      bias_V,
      targets_BT,
      counted,
      z_loss=z_loss,
      softcap=softcap,
      chunk=chunk,
      transposed=transposed,
    )
  else:
    loss, nll = _rows_loss(x, w_DV, bias_V, targets_BT, _Static(z_loss, softcap, _rows(x, chunk)))
  if label_smoothing:
    if softcap is not None:
      raise ValueError('cross_entropy: label_smoothing needs logits without a softcap')
    loss = loss + label_smoothing * _above_mean(x, w_DV, bias_V, targets_BT)
  return LossSums(loss, lax.stop_gradient(nll), counted.sum().astype(jnp.float32))


def _above_mean(x, w_DV, bias_V, targets_BT):
  """sum_i (l_i[y_i] - mean_v l_i[v]) over the counted targets: what smoothing adds, times its
  strength. The mean of logits is one product with the mean of W's columns, so no row of logits is
  needed."""
  w = w_DV.astype(x.dtype)
  columns_BTD = jnp.moveaxis(jnp.take(w, jnp.maximum(targets_BT, 0), axis=1, mode='clip'), 0, -1)
  away_BTD = columns_BTD.astype(jnp.float32) - w.astype(jnp.float32).mean(1)[None, None]
  above = jnp.einsum('BTD,BTD->BT', x.astype(jnp.float32), away_BTD)
  if bias_V is not None:
    above = above + jnp.take(bias_V, jnp.maximum(targets_BT, 0), mode='clip') - bias_V.mean()
  return jnp.where(targets_BT != IGNORE, above, 0.0).sum()


def token_scores(
  x: Float[Array, 'B T D'],
  w_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  bias_V: Float[Array, ' V'] | None = None,
  softcap: float | None = None,
  transposed: bool = False,
  chunk: int | None = None,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """logsumexp(l_i) - l_i[y_i] of each token in nats, and whether no logit is larger than l_i[y_i];
  0 and False where the target is `IGNORE`. For evaluation, without a gradient."""
  x, w_DV, bias_V = lax.stop_gradient(
    (x, w_DV, None if bias_V is None else bias_V.astype(jnp.float32))
  )
  if TOKEN_SCORES.choose(x, w_DV) == 'vocabulary':
    found = vocabulary_logsumexp(
      x, w_DV, bias_V, targets_BT, softcap=softcap, chunk=chunk, transposed=transposed
    )
  else:
    (B, T, _), static = x.shape, _Static(0.0, softcap, _rows(x, chunk))
    found = lax.map(
      lambda a: _row_logits(*a, w_DV.astype(x.dtype), bias_V, static)[3:],
      _chunks(x, targets_BT, static.chunk),
    )
    found = (
      jnp.moveaxis(a.reshape(-1, B, static.chunk), 0, 1).reshape(B, -1)[:, :T] for a in found
    )
  lse, picked, top = found
  counted = targets_BT != IGNORE
  return jnp.where(counted, lse - picked, 0.0), counted & (picked >= top)


# ---- tokens in chunks, the gradient formed in the forward pass ---------------------------------


@dataclasses.dataclass(frozen=True)
class _Static:
  z_loss: float
  softcap: float | None
  chunk: int  # positions at a time, of every sequence of the batch


def _rows(x, chunk: int | None) -> int:
  """Positions at a time for a number of tokens at a time; chunks of equal size rather than a short
  last one."""
  B, T, _ = x.shape
  n = max(1, (chunk or _ROWS.get(sharding.platform(), 1024)) // B)
  return -(-T // -(-T // n))


def _chunks(x, targets, n: int):
  """`B T D` -> `chunks, B n, D`, padded with targets that do not count."""
  B, T, D = x.shape
  rest = -T % n
  x = jnp.pad(x, ((0, 0), (0, rest), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, rest)), constant_values=IGNORE)
  return x.reshape(B, -1, n, D).swapaxes(0, 1).reshape(-1, B * n, D), targets.reshape(
    B, -1, n
  ).swapaxes(0, 1).reshape(-1, B * n)


def _row_logits(x, targets, w, bias, static: _Static):
  """exp(l - max), its sum, the soft cap's derivative, logsumexp, the target's logit and the
  largest, of some tokens `[N, D]`."""
  logits, slope = jnp.dot(x, w, preferred_element_type=jnp.float32), None
  if bias is not None:
    logits = logits + bias[None]
  if static.softcap is not None:
    capped = jnp.tanh(logits / static.softcap)
    logits, slope = static.softcap * capped, 1.0 - jnp.square(capped)
  top = logits.max(-1, keepdims=True)
  e = lax.optimization_barrier(jnp.exp(logits - top))
  total = e.sum(-1, keepdims=True)
  picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
  return e, total, slope, (top + jnp.log(total))[:, 0], picked, top[:, 0]


def _row_sums(targets, lse, picked, static):
  counted = targets != IGNORE
  nll = jnp.where(counted, lse - picked, 0.0).sum()
  return nll + jnp.where(counted, static.z_loss * jnp.square(lse), 0.0).sum(), nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rows_loss(x, w, bias, targets, static: _Static):
  """Loss and nll when no gradient is asked for: one matrix product a token."""

  def some(sums, chunk):
    *_, lse, picked, _ = _row_logits(*chunk, w_cast, bias, static)
    return tuple(
      a + b for a, b in zip(sums, _row_sums(chunk[1], lse, picked, static), strict=True)
    ), None

  w_cast = w.astype(x.dtype)
  return lax.scan(some, (jnp.float32(0), jnp.float32(0)), _chunks(x, targets, static.chunk))[0]


def _rows_forward(x, w, bias, targets, static):
  (B, T, D), V, w_cast = x.shape, w.shape[1], w.astype(x.dtype)

  def some(carry, chunk):
    sums, dw, db = carry
    xs, ys = chunk
    e, total, slope, lse, picked, _ = _row_logits(xs, ys, w_cast, bias, static)
    # The gradient of the logits is f (e - hot / f), a row at a time: e is there from the forward
    # pass and changes in one place a row, and the factor goes to the narrow sides of the products.
    # Another pass over the logits costs a tenth of a product.
    counted = (ys != IGNORE).astype(jnp.float32)
    f = counted / total[:, 0] * (1.0 + 2.0 * static.z_loss * lse)
    d = e.at[jnp.arange(len(ys)), jnp.maximum(ys, 0)].add(-counted / jnp.where(f == 0, 1.0, f))
    d = d if slope is None else d * slope
    db = None if db is None else db + f @ d
    d = d.astype(x.dtype)
    dx = (f[:, None] * jnp.dot(d, w_cast.T, preferred_element_type=jnp.float32)).astype(x.dtype)
    # written out, as in `linear`
    left = lax.optimization_barrier((f[:, None] * xs).astype(x.dtype).T)
    dw = dw + jnp.dot(left, d, preferred_element_type=jnp.float32)
    return (
      tuple(a + b for a, b in zip(sums, _row_sums(ys, lse, picked, static), strict=True)),
      dw,
      db,
    ), dx

  start = (
    (jnp.float32(0), jnp.float32(0)),
    jnp.zeros((D, V), jnp.float32),
    None if bias is None else jnp.zeros_like(bias),
  )
  (sums, dw, db), dx = lax.scan(some, start, _chunks(x, targets, static.chunk))
  dx = dx.reshape(-1, B, static.chunk, D).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
  return sums, (dx, dw.astype(w.dtype), db)


def _rows_backward(static, saved, cotangents):
  dx, dw, db = saved
  scale = cotangents[0]
  return (*(None if d is None else (d * scale).astype(d.dtype) for d in (dx, dw, db)), None)


_rows_loss.defvjp(_rows_forward, _rows_backward)


CROSS_ENTROPY = Operation(
  'cross_entropy',
  {
    'naive': Implementation(cross_entropy_naive),
    'rows': Implementation(_rows_loss),
    'vocabulary': Implementation(vocabulary_loss),
  },
  _order,
)
TOKEN_SCORES = Operation(
  'token_scores',
  {'rows': Implementation(_row_logits), 'vocabulary': Implementation(vocabulary_logsumexp)},
  _order,
)
