"""The recurrence of RWKV-6 (and of RWKV-5, whose decays do not change): linear attention whose
matrix state decays row by row.

  y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
  S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T

(Peng et al. 2024, "Eagle and Finch", equations 16 to 21). The chunked form turns it into matrix
products. What token i gives to a later token t of its chunk is weighted by exp of the sum of the
log decays between them. A chunk is halved again and again: across the middle of a block, that sum
is (middle to t) + (i to middle), so the weights of a level are one matrix product of r and k scaled
by exp of sums that are never positive and never differences. No decay overflows, and none loses
digits to another.

Everything is fp32, the products too; y comes back in the dtype of v.

Dims: B batch, T time, H heads, K key, V value, C chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformer import sharding
from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.kernels.wkv6 import wkv6_pallas, wkv6_tpu
from jaxformer.ops.sequence_parallel import over_time, scaled, sums_after, time_axes, unbroken

CHUNK = 64  # a power of 2
_SHORT = 4  # up to so many tokens the recurrence itself is the fastest form

_State = Float[Array, 'B H K V']
_Log = Float[Array, '#B #T H K']


def wkv6_naive(
  r: Float[Array, 'B T H K'],
  k: Float[Array, 'B T H K'],
  v: Float[Array, 'B T H V'],
  log_decay: _Log,
  u_HK: Float[Array, 'H K'],
  state: _State,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H V'], _State]:
  """The recurrence, one token after the other, in fp32."""

  def step(S_BHKV, now):
    r, k, v, decay, begins_B = now
    S_BHKV = jnp.where(begins_B[:, None, None, None], 0.0, S_BHKV)
    kv_BHKV = k[..., None] * v[..., None, :]
    y_BHV = jnp.sum(r[..., None] * (S_BHKV + u_HK[None, :, :, None] * kv_BHKV), axis=-2)
    return decay[..., None] * S_BHKV + kv_BHKV, y_BHV

  decay = jnp.broadcast_to(jnp.exp(log_decay), r.shape)
  last, y = lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (r, k, v, decay, starts_BT)))
  return jnp.moveaxis(y, 0, 1), last


def wkv6(
  r: Float[Array, 'B T H K'],
  k: Float[Array, 'B T H K'],
  v: Float[Array, 'B T H V'],
  log_decay: _Log,
  u_HK: Float[Array, 'H K'],
  state: _State | None,
  starts_BT: Bool[Array, 'B T'],
  *,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H K V']]:
  """y and the state after the last token.

  Args:
    log_decay: at most 0, however negative; of size 1 in B and T where the decay is the same for all
      tokens (RWKV-5).
    state: None for zeros. Fp32 whatever the rest is, as is the state returned.
    starts_BT: where a packed document begins: the state is zero before that token.
    chunk: tokens at a time, a power of 2.
  """
  (B, T, H, K), V, dtype = r.shape, v.shape[-1], v.dtype
  axes = time_axes(T)
  chosen = WKV6.choose(T // sharding.shards('time', T))
  interpret = sharding.platform() != 'tpu'
  if chosen == 'pallas' and not axes:
    return wkv6_tpu(r, k, v, log_decay, u_HK, state, starts_BT, interpret=interpret, chunk=chunk)

  def run(S, r, k, v, log_decay, u_HK, starts):
    if chosen == 'pallas':
      return wkv6_pallas(r, k, v, log_decay, u_HK, S, starts, interpret=interpret, chunk=chunk)
    if chosen == 'naive':
      return wkv6_naive(r, k, v, log_decay, u_HK, S, starts)
    return _chunked(r, k, v, log_decay, u_HK, S, starts, chunk)

  if chosen != 'pallas':
    r, k, v, log_decay, u_HK = (x.astype(jnp.float32) for x in (r, k, v, log_decay, u_HK))
  S = jnp.zeros((B, H, K, V), jnp.float32) if state is None else state.astype(jnp.float32)
  token, heads = ('batch', 'time', 'heads', None), ('batch', 'heads', None, None)
  mapped = (
    run
    if not axes
    else sharding.per_shard(
      over_time(run, _summary, scaled, axes),
      (heads, token, token, token, token, ('heads', None), token[:2]),
      token,
      heads,
    )
  )
  y, S = mapped(S, r, k, v, log_decay, u_HK, starts_BT)
  return y.astype(dtype), S


def _order(T: int) -> tuple[str, ...]:
  if sharding.platform() == 'tpu':
    return ('pallas',) if T > 1 else ('naive',)
  return ('naive',) if T <= _SHORT else ('chunked',)


def _summary(r, k, v, log_decay, u_HK, starts_BT):
  """What a part multiplies the rows of the state by, and the state that it ends with from zeros."""
  log = jnp.broadcast_to(log_decay.astype(jnp.float32), k.shape)
  whole, last = unbroken(starts_BT)
  kept = jnp.where(last[..., None, None], k.astype(jnp.float32) * jnp.exp(sums_after(log)), 0.0)
  decay = jnp.where(whole[:, None, None], jnp.exp(jnp.sum(log, axis=1)), 0.0)
  return decay[..., None], _product('BTHK,BTHV->BHKV', kept, v.astype(jnp.float32))


# ---- the chunked form --------------------------------------------------------------------------


def _chunked(r, k, v, log_decay, u_HK, S, starts_BT, chunk: int):
  """Whole chunks in a scan that keeps the states at their borders alone for the backward pass, then
  what is left."""
  T = r.shape[1]
  n, rest = divmod(T, chunk)
  static = log_decay.shape[1] == 1
  body, ys = jax.checkpoint(_chunk, prevent_cse=False), []
  if n:

    def cut(x):
      return jnp.moveaxis(x[:, : n * chunk].reshape(x.shape[0], n, chunk, *x.shape[2:]), 1, 0)

    scanned = tuple(cut(x) for x in (r, k, v, starts_BT)), None if static else cut(log_decay)
    fixed = jnp.broadcast_to(log_decay, (1, chunk, *log_decay.shape[2:])) if static else None

    def step(S, now):
      (r, k, v, starts), decays = now
      return body(S, r, k, v, fixed if static else decays, starts)

    S, y = lax.scan(step, S, scanned)
    ys.append(jnp.moveaxis(y, 0, 1).reshape(v.shape[0], n * chunk, *v.shape[2:]))
  if rest:
    # Tokens without key and without decay leave the state as it is.
    size = 1 << (rest - 1).bit_length()

    def pad(x):
      return jnp.pad(x[:, n * chunk :], ((0, 0), (0, size - rest)) + ((0, 0),) * (x.ndim - 2))

    decays = jnp.broadcast_to(log_decay, (log_decay.shape[0], T, *log_decay.shape[2:]))
    S, y = body(S, pad(r), pad(k), pad(v), pad(decays), pad(starts_BT))
    ys.append(y[:, :rest])
  y = ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=1)
  return y + jnp.sum(r * u_HK[None, None] * k, axis=-1, keepdims=True) * v, S


def _chunk(S_BHKV, r, k, v, log_decay, starts_BC):
  """(state, y) after a chunk `[B, C, H, K]`, without what a token gives to itself."""
  r, k, v, log_decay = (jnp.swapaxes(x, 1, 2) for x in (r, k, v, log_decay))  # B H C K
  weights, before, after, total = _weights(r, k, log_decay)
  segments_BC: Int[Array, 'B C'] = jnp.cumsum(starts_BC, axis=1, dtype=jnp.int32)
  same = segments_BC[:, None, :, None] == segments_BC[:, None, None, :]
  # continues from the incoming state
  first = (segments_BC == 0)[:, None, :, None]
  last = (segments_BC == segments_BC[:, -1:])[:, None, :, None]  # goes on in the outgoing one
  y = _product('BHtc,BHcV->BHtV', jnp.where(same, weights, 0.0), v)
  y = y + _product('BHtK,BHKV->BHtV', jnp.where(first, r * jnp.exp(before), 0.0), S_BHKV)
  new = _product('BHcK,BHcV->BHKV', jnp.where(last, k * jnp.exp(after), 0.0), v)
  kept = jnp.where(first[:, :, -1:], jnp.exp(jnp.swapaxes(total, -1, -2)) * S_BHKV, 0.0)
  return kept + new, jnp.swapaxes(y, 1, 2)


def _weights(r, k, log_decay):
  """What each token of a chunk (`[B, H, C, K]`) takes of each earlier one, `[B, H, C, C]`; and for
  each token and channel the sums of the log decays before it, after it, and in all: `[B, H, C, K]`
  twice and `[B, H, 1, K]`. Blocks grow from 1 token to C."""
  C, K = r.shape[2:]
  # blocks: [B, H, C / m, m, K], here and below
  total = log_decay[..., None, :]
  before = after = jnp.zeros_like(total)
  weights = jnp.zeros((*r.shape[:3], 1, 1), r.dtype)
  m = 1
  while m < C:
    (before1, before2), (after1, after2), (total1, total2), (weights1, weights2) = map(
      _halves, (before, after, total, weights)
    )
    queries, keys = (
      _halves(r.reshape(*r.shape[:2], -1, m, K))[1],
      _halves(k.reshape(*k.shape[:2], -1, m, K))[0],
    )
    across = _product('...tK,...cK->...tc', queries * jnp.exp(before2), keys * jnp.exp(after1))
    weights = jnp.concatenate(
      [
        jnp.concatenate([weights1, jnp.zeros_like(across)], axis=-1),
        jnp.concatenate([across, weights2], axis=-1),
      ],
      axis=-2,
    )
    before = jnp.concatenate([before1, before2 + total1], axis=-2)
    after = jnp.concatenate([after1 + total2, after2], axis=-2)
    total, m = total1 + total2, 2 * m
  return weights[:, :, 0], before[:, :, 0], after[:, :, 0], total[:, :, 0]


def _halves(x):
  """The first and the second block of each pair, of `[B, H, blocks, ...]`."""
  pairs = x.reshape(*x.shape[:2], -1, 2, *x.shape[3:])
  return pairs[:, :, :, 0], pairs[:, :, :, 1]


def _product(letters: str, a, b):
  return jnp.einsum(letters, a, b, precision=lax.Precision.HIGHEST)


WKV6 = Operation(
  'wkv6',
  {
    'naive': Implementation(wkv6_naive),
    'chunked': Implementation(_chunked),
    # a TPU's kernel; elsewhere it is interpreted, which is slow
    'pallas': Implementation(wkv6_pallas),
  },
  _order,
)
