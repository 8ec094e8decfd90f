"""Scaled dot-product attention behind one function, `attention`, with an implementation for each
kind of machine.

Dims: B batch, T queries, S keys, H query heads, G key/value heads (H = G x group), K head dim, C
  head dim of the values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer import sharding
from jaxformer.ops.attention_chunked import SAVED, attention_chunked, attention_unrolled
from jaxformer.ops.attention_kernels import (
  attention_cudnn,
  attention_splash,
  attention_xla,
  cudnn_unsupported,
  splash_unsupported,
  xla_unsupported,
)
from jaxformer.ops.attention_sequence_parallel import attention_sharded
from jaxformer.ops.implementation import Operation
from jaxformer.ops.masks import MASKED, Mask
from jaxformer.ops.sequence_parallel import sharded, time_axes
from jaxformer.ops.softcap import soft_cap

__all__ = [
  'ATTENTION',
  'MASKED',
  'SAVED',
  'Mask',
  'attention',
  'attention_naive',
  'attention_weights',
]

_Shaped = Array | jax.ShapeDtypeStruct

# up to so many queries (decoding) the logits of the naive implementation are small
_SHORT = 16
_SMALL_BYTES = (
  16 * 2**20
)  # and so they are up to this size, where no kernel of the platform applies
# the longest sequence for unrolled blocks on a CPU; at 2048 chunked is faster
_UNROLLED_T = 1024


def attention_naive(
  q: Float[Array, 'B T H K'],
  k: Float[Array, 'B S G K'],
  v: Float[Array, 'B S G C'],
  mask: Mask,
  *,
  scale: float,
  softcap: float | None = None,
  slopes_H: Float[Array, ' H'] | None = None,
  sinks_H: Float[Array, ' H'] | None = None,
  dropout: float = 0.0,
  dropout_key: Array | None = None,
) -> Float[Array, 'B T H C']:
  """softmax(scale q k^T + bias) v over the keys that `mask` lets through (Vaswani et al. 2017, eq.
  1), logits in fp32. With a key, each weight is dropped at the rate `dropout`, and the others are
  divided by 1 - dropout.

  Query head h uses key/value head h // (H / G). With `softcap` c the logits become c tanh(logits /
  c) (Gemma 2). With ALiBi `slopes_H` m, -m |t - s| is added to the logit of key s for query t
  (Press et al. 2022, section 3). `sinks_H` are the logits of one more key per head, which every
  query sees and whose value is 0: exp(sink) is added to the denominator (OpenAI 2025, gpt-oss)."""
  (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
  p = attention_weights(
    q, k, mask, scale=scale, softcap=softcap, slopes_H=slopes_H, sinks_H=sinks_H
  )
  if dropout and dropout_key is not None:
    p = jnp.where(jax.random.bernoulli(dropout_key, 1 - dropout, p.shape), p / (1 - dropout), 0.0)
  p = p.reshape(B, G, H // G, T, S).astype(v.dtype)
  return jnp.einsum('BGRTS,BSGC->BTGRC', p, v).reshape(B, T, H, v.shape[-1])


def attention_weights(
  q: Float[Array, 'B T H K'],
  k: Float[Array, 'B S G K'],
  mask: Mask,
  *,
  scale: float,
  softcap: float | None = None,
  slopes_H: Float[Array, ' H'] | None = None,
  sinks_H: Float[Array, ' H'] | None = None,
) -> Float[Array, 'B H T S']:
  """The softmax of `attention_naive`, fp32, all of it in memory: for plots, and for layers whose
  attention is small. A query that sees no key has zeros. With `sinks_H` the weights of a query add
  up to less than 1."""
  (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
  q, k = q.reshape(B, T, G, H // G, K), k.astype(q.dtype)
  a = jnp.einsum('BTGRK,BSGK->BGRTS', q, k, preferred_element_type=jnp.float32) * scale
  a, _ = soft_cap(a, softcap)
  if slopes_H is not None:
    t, s = mask.positions(T, S)
    distance = -jnp.abs(t[:, None] - s[None, :]).astype(jnp.float32)
    a = a + slopes_H.reshape(1, G, H // G, 1, 1) * distance[None, None, None]
  seen = mask.dense(T, S)[:, None, None]
  a = jnp.where(seen, a, MASKED)
  if sinks_H is not None:
    sinks = sinks_H.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
    a = jnp.concatenate([a, jnp.broadcast_to(sinks, (*a.shape[:-1], 1))], axis=-1)
  p = jnp.where(seen, jax.nn.softmax(a, axis=-1)[..., :S], 0.0)
  return p.reshape(B, H, T, S)


def _sharded_over_time(q) -> bool:
  return sharding.shards('time', q.shape[1]) > 1


def _on_one_shard_of_time(unsupported):
  """The same reasons, and one where the queries are sharded over time."""

  def reason(q, k, mask, **options) -> str | None:
    if _sharded_over_time(q):
      return 'it needs all queries of a sequence on one device'
    return unsupported(q, k, mask, **options)

  return _without_dropout(reason)


def _without_dropout(unsupported=None):
  """The same reasons, and one where weights are dropped."""

  def reason(q, k, mask, dropout: bool = False, **options) -> str | None:
    if dropout:
      return 'it has no dropout of weights'
    return None if unsupported is None else unsupported(q, k, mask, **options)

  return reason


def _unrolled_unsupported(q, k, mask: Mask, **options) -> str | None:
  return None if mask.aligned else 'it needs keys and queries at the same positions'


def _order(
  q: _Shaped, k: _Shaped, mask: Mask, dropout: bool = False, **options: Any
) -> tuple[str, ...]:
  """Few queries (decoding), or dropout: naive. A TPU: splash, a GPU: cuDNN, where they support the
  case. A CPU: unrolled, where the mask is aligned and the length moderate. Else naive where its
  logits are small, and chunked, which supports every case."""
  if dropout:
    return ('naive',)
  (B, T, H, _), S = q.shape, k.shape[1]
  own_keys = mask.aligned and mask.key_segments_BS is None
  if _sharded_over_time(q) and (own_keys or T > _SHORT):
    return ('splash', 'chunked') if sharding.platform() == 'tpu' and own_keys else ('chunked',)
  if T <= _SHORT:
    return ('naive',)
  general = 'naive' if 4 * B * H * T * S <= _SMALL_BYTES else 'chunked'
  platform = sharding.platform()
  if platform == 'cpu' and max(T, S) > _UNROLLED_T:
    return (general,)
  return {'tpu': 'splash', 'gpu': 'cudnn', 'cpu': 'unrolled'}[platform], general


ATTENTION = Operation(
  'attention',
  {
    # all cases, B H T S logits in memory
    'naive': attention_naive,
    # all cases, memory linear in T and S
    'chunked': attention_chunked,
    # aligned masks; the fastest on a CPU
    'unrolled': attention_unrolled,
    'xla': attention_xla,
    'cudnn': attention_cudnn,
    'splash': attention_splash,
  },
  _order,
  {
    'chunked': _without_dropout(),
    'unrolled': _on_one_shard_of_time(_unrolled_unsupported),
    'xla': _on_one_shard_of_time(xla_unsupported),
    'cudnn': _on_one_shard_of_time(cudnn_unsupported),
    'splash': _without_dropout(splash_unsupported),
  },
)


def attention(
  q: Float[Array, 'B T H K'],
  k: Float[Array, 'B S G K'],
  v: Float[Array, 'B S G C'],
  mask: Mask,
  *,
  scale: float,
  softcap: float | None = None,
  slopes_H: Float[Array, ' H'] | None = None,
  sinks_H: Float[Array, ' H'] | None = None,
  dropout: float = 0.0,
  dropout_key: Array | None = None,
) -> Float[Array, 'B T H C']:
  """Attention by the implementation that suits the machine, the shapes and the mask (`ATTENTION`);
  `attention_naive` defines the result.

  `slopes_H` are constants: no gradient flows to them. A query that sees no key gives zeros.
  Where weights are dropped, all of them are in memory: only the naive implementation can.
  `chunked` and `splash` give output and logsumexp the checkpoint name `SAVED`."""
  if q.shape[2] % k.shape[2]:
    raise ValueError(f'{q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads')
  if slopes_H is not None:
    slopes_H = jax.lax.stop_gradient(slopes_H)
  drops = dropout > 0 and dropout_key is not None
  options: dict[str, Any] = {'softcap': softcap, 'slopes_H': slopes_H, 'sinks_H': sinks_H}
  chosen = ATTENTION.choose(q, k, mask, **options, dropout=drops, v_dim=v.shape[-1])
  options['scale'] = scale
  if chosen == 'naive':
    return attention_naive(q, k, v, mask, **options, dropout=dropout, dropout_key=dropout_key)
  k, v = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
  if time_axes(q.shape[1]):
    # Every shard has all keys that are not the queries' own (an encoder's output).
    if mask.aligned and mask.key_segments_BS is None:
      shared = functools.partial(attention_sharded, splash=chosen == 'splash')
      return shared(q, k, v, mask, **options)
    t, s = mask.positions(q.shape[1], k.shape[1])  # a shard's positions are no longer 0..T-1
    mask = dataclasses.replace(mask, index_T=t, index_S=s, key_segments_BS=mask.keys())

  def local(q, k, v, mask, slopes_H, sinks_H):
    options = {'scale': scale, 'softcap': softcap, 'slopes_H': slopes_H, 'sinks_H': sinks_H}
    return ATTENTION[chosen](q, k, v, mask, **options)

  queries, keys = ('batch', 'time', 'heads', None), ('batch', None, 'kv_heads', None)
  mapped = sharded(local, (queries, keys, keys, mask.axes, ('heads',), ('heads',)), queries)
  return mapped(q, k, v, mask, slopes_H, sinks_H)


def _repeated(x: Float[Array, 'B S G K'], H: int) -> Float[Array, 'B S g K']:
  """Key/value heads repeated until the mesh shards them like the query heads: each shard then has
  the keys of its queries."""
  G, parts = x.shape[2], sharding.shards('heads', H)
  repeats = math.lcm(G, parts) // G
  return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)
