"""Attention to keys and values that a low-rank latent holds (DeepSeek-AI 2024, section 2.1).

Of a position s all heads share a latent c_s and a key k_s, which together are its entry of the
cache. Head h scores it with q_th = [a, b] by a . (c_s W_h) + b . k_s, and reads the value c_s W'_h;
[W_h, W'_h] is the head's part of the matrix `up`.

Dims: B batch, T queries, S entries, H heads, R latent rank, P channels of the shared key, N other
channels of a query, V channels of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.ops.attention import attention, attention_naive
from jaxformer.ops.implementation import Operation
from jaxformer.ops.linear import linear
from jaxformer.ops.masks import Mask
from jaxformer.sharding import shard


def _expanded(attend: Callable[..., Array], q, cache, up_RE, mask, *, value_dim, **options):
  """Compute keys and values of all heads, and attend to them by `attend`."""
  (B, _, H, K), (S, R) = q.shape, (cache.shape[1], up_RE.shape[0])
  N = up_RE.shape[1] // H - value_dim
  kv = linear(cache[..., :R], up_RE).reshape(B, S, H, N + value_dim)
  kv = shard(kv, 'batch', 'time' if mask.aligned else None, 'heads', None)
  shared = jnp.broadcast_to(cache[:, :, None, R:], (B, S, H, K - N))
  k, v = jnp.concatenate([kv[..., :N], shared], axis=-1), kv[..., N:]
  return attend(q, k, v, mask, **options)


def latent_attention_naive(
  q: Float[Array, 'B T H K'],
  cache: Float[Array, 'B S C'],
  up_RE: Float[Array, 'R E'],
  mask: Mask,
  *,
  value_dim: int,
  scale: float,
  dropout: float = 0.0,
  dropout_key: Array | None = None,
) -> Float[Array, 'B T H V']:
  """softmax(scale q k^T) v with k_sh = [c_s W_h, k_s] and v_sh = c_s W'_h (DeepSeek-AI 2024, eq.
  13-18), over the entries that `mask` lets through, by `attention_naive`.

  Args:
    q: [a, b], N + P channels.
    cache: [c, k], R + P channels.
    up_RE: [W_h, W'_h] of head after head, E = H (N + V) columns.
    value_dim: V.
  """
  options: dict[str, Any] = {'scale': scale, 'dropout': dropout, 'dropout_key': dropout_key}
  return _expanded(attention_naive, q, cache, up_RE, mask, value_dim=value_dim, **options)


def latent_attention_expanded(q, cache, up_RE, mask: Mask, **options):
  """Keys and values of all heads by one product, then `attention`: for training and for prompts,
  where each is read by many queries."""
  return _expanded(attention, q, cache, up_RE, mask, **options)


def latent_attention_absorbed(q, cache, up_RE, mask: Mask, *, value_dim, **options):
  """a . (c W_h) = (a W_h^T) . c: multi-query attention to the cache itself, whose values are its
  latents, with W_h applied to the queries and W'_h to the results. Nothing is expanded, so that
  decoding reads R + P numbers per entry for all heads (DeepSeek-AI 2024, section 2.1.2)."""
  H, R = q.shape[2], up_RE.shape[0]
  N = up_RE.shape[1] // H - value_dim
  up_RHE = shard(up_RE.reshape(R, H, N + value_dim), None, 'heads', None)
  a_BTHR = jnp.einsum('BTHN,RHN->BTHR', q[..., :N], up_RHE[..., :N])
  q_all = jnp.concatenate([a_BTHR, q[..., N:]], axis=-1)
  # The cache is its own values: a slice of it would be a copy. The last P channels are dropped.
  entries = cache[:, :, None]
  out = attention(q_all, entries, entries, mask, **options)[..., :R]
  return jnp.einsum('BTHR,RHV->BTHV', out, up_RHE[..., N:])


def _order(q, cache, up_RE, mask: Mask, value_dim: int) -> tuple[str, ...]:
  """The one with fewer FLOPs. Per head, expansion costs R (N + V) multiplications per entry, and
  absorption as many per query; a pair of both costs N + P + V expanded, and 2 R + P absorbed."""
  (T, H, K), (S, R) = q.shape[1:], (cache.shape[1], up_RE.shape[0])
  factors = R * up_RE.shape[1] // H
  expanded = S * factors + T * S * (K + value_dim)
  absorbed = T * factors + T * S * (R + cache.shape[2])
  return ('absorbed', 'expanded') if absorbed < expanded else ('expanded', 'absorbed')


LATENT_ATTENTION = Operation(
  'latent_attention',
  {
    # keys and values of all heads, and all logits, in memory
    'naive': latent_attention_naive,
    # keys and values of all heads in memory
    'expanded': latent_attention_expanded,
    # reads the cache alone
    'absorbed': latent_attention_absorbed,
  },
  _order,
)


def latent_attention(
  q: Float[Array, 'B T H K'],
  cache: Float[Array, 'B S C'],
  up_RE: Float[Array, 'R E'],
  mask: Mask,
  *,
  value_dim: int,
  scale: float,
  dropout: float = 0.0,
  dropout_key: Array | None = None,
) -> Float[Array, 'B T H V']:
  """Attention to latents by the form that suits the numbers of queries and entries
  (`LATENT_ATTENTION`); `latent_attention_naive` defines the result. Both forms leave logits and
  weights to `attention`, whose implementations and sequence parallelism apply."""
  chosen = LATENT_ATTENTION.choose(q, cache, up_RE, mask, value_dim=value_dim)
  return LATENT_ATTENTION[chosen](
    q,
    cache,
    up_RE,
    mask,
    value_dim=value_dim,
    scale=scale,
    dropout=dropout,
    dropout_key=dropout_key,
  )
