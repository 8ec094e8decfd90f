"""The recurrence of RWKV-6 (and of RWKV-5, whose decays are constant): linear attention whose
matrix state decays row by row.

  y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
  S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T

(Peng et al. 2024, "Eagle and Finch", equations 16 to 21); and the same with y_t = r_t^T S_t (gated
linear attention; Yang et al. 2024, equation 3), which is (exp(log_decay_t) r_t)^T S_{t-1} + (r_t .
k_t) v_t. The chunked implementation turns it into matrix products. What token i contributes to a
later token t of its chunk is weighted by exp of the sum of the log decays between them
(`ops/pair_weights.py`), which no decay overflows.

Everything is fp32, the products included; y is returned in the dtype of v.

Dims: B batch, T time, H heads, K key, V value, C chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxformer.ops.chunks import scan_chunks, scan_steps
from jaxformer.ops.documents import count_starts
from jaxformer.ops.implementation import Operation
from jaxformer.ops.kernels.wkv6 import wkv6_pallas
from jaxformer.ops.pair_weights import pair_weights
from jaxformer.ops.sequence_parallel import (
  local_length,
  multiply_add,
  over_time,
  reset_masks,
  sums_after,
)
from jaxformer.sharding import platform

CHUNK = 64  # a power of 2
_SHORT = 4  # up to so many tokens the recurrence itself is the fastest implementation

_TOKEN, _STATE = ('batch', 'time', 'heads', None), ('batch', 'heads', None, None)


def wkv6(
  r: Float[Array, 'B T H K'],
  k: Float[Array, 'B T H K'],
  v: Float[Array, 'B T H V'],
  log_decay: Float[Array, '#B #T H K'],
  u_HK: Float[Array, 'H K'] | None,
  state: Float[Array, 'B H K V'] | None,
  starts_BT: Bool[Array, 'B T'],
  *,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H K V']]:
  """y and the state after the last token.

  Args:
    log_decay: at most 0, however negative; of size 1 in B and T where all tokens have the same
      decay (RWKV-5).
    u_HK: None where y_t reads the state after token t.
    state: None for zeros. Fp32 whatever the other dtypes, like the state returned.
    starts_BT: where a packed document starts: the state is zero before that token.
    chunk: tokens per chunk, a power of 2.
  """
  (B, T, H, K), V = r.shape, v.shape[-1]
  chosen = WKV6.choose(local_length(T))
  inputs = r, k, v, jnp.broadcast_to(log_decay, r.shape), u_HK
  if chosen != 'pallas':
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
  S = jnp.zeros((B, H, K, V), jnp.float32) if state is None else state.astype(jnp.float32)
  sharded = over_time(
    lambda S, *inputs: WKV6[chosen](S, *inputs, chunk=chunk),
    _STATE,
    (*(_TOKEN,) * 4, ('heads', None), _TOKEN[:2]),
    _TOKEN,
    _summarize,
    mapped=chosen == 'pallas',
  )
  y, S = sharded(S, *inputs, starts_BT)
  return y.astype(v.dtype), S


def _summarize(r, k, v, log_decay, u_HK, starts_BT):
  """By what a part multiplies the rows of the state, and the state in which it ends from zeros."""
  log = log_decay.astype(jnp.float32)
  survives_B, kept_BT = reset_masks(starts_BT)
  kept = jnp.where(kept_BT[..., None, None], k.astype(jnp.float32) * jnp.exp(sums_after(log)), 0.0)
  decay = jnp.where(survives_B[:, None, None], jnp.exp(jnp.sum(log, axis=1)), 0.0)
  own = _product('BTHK,BTHV->BHKV', kept, v.astype(jnp.float32))
  return (decay[..., None], own), multiply_add


def wkv6_naive(S_BHKV, r, k, v, log_decay, u_HK, starts_BT, chunk=CHUNK):
  """The recurrence, one token after another, in fp32."""

  def step(S_BHKV, r, k, v, decay):
    kv_BHKV = k[..., None] * v[..., None, :]
    after_BHKV = decay[..., None] * S_BHKV + kv_BHKV
    read_BHKV = after_BHKV if u_HK is None else S_BHKV + u_HK[None, :, :, None] * kv_BHKV
    return after_BHKV, jnp.sum(r[..., None] * read_BHKV, axis=-2)

  return scan_steps(step, S_BHKV, (r, k, v, jnp.exp(log_decay)), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------


def _chunked(S, r, k, v, log_decay, u_HK, starts_BT, chunk=CHUNK):
  """Remaining tokens are padded to a power of 2: a token without key and without decay leaves the
  state as it is."""
  own = r * k if u_HK is None else r * u_HK[None, None] * k
  inputs = _before(r, log_decay, u_HK), k, v, starts_BT, log_decay
  y, S = scan_chunks(_chunk, S, inputs, chunk, lambda rest: 1 << (rest - 1).bit_length())
  return y + jnp.sum(own, axis=-1, keepdims=True) * v, S


def _before(r, log_decay, u_HK):
  """What reads the state before a token in place of r."""
  if u_HK is not None:
    return r
  return (r.astype(jnp.float32) * jnp.exp(log_decay.astype(jnp.float32))).astype(r.dtype)


def _chunk(S_BHKV, r, k, v, starts_BC, log_decay):
  """(state, y) after a chunk `[B, C, H, K]`, without what a token contributes to itself."""
  r, k, v, log_decay = (jnp.swapaxes(x, 1, 2) for x in (r, k, v, log_decay))  # B H C K
  (weights,), before, after, total = pair_weights((r,), k, log_decay, _product)
  segments_BC: Int[Array, 'B C'] = count_starts(starts_BC)
  same = segments_BC[:, None, :, None] == segments_BC[:, None, None, :]
  # tokens that read the incoming state, and tokens that contribute to the outgoing one
  first = (segments_BC == 0)[:, None, :, None]
  last = (segments_BC == segments_BC[:, -1:])[:, None, :, None]
  y = _product('BHtc,BHcV->BHtV', jnp.where(same, weights, 0.0), v)
  y = y + _product('BHtK,BHKV->BHtV', jnp.where(first, r * jnp.exp(before), 0.0), S_BHKV)
  new = _product('BHcK,BHcV->BHKV', jnp.where(last, k * jnp.exp(after), 0.0), v)
  kept = jnp.where(first[:, :, -1:], jnp.exp(jnp.swapaxes(total, -1, -2)) * S_BHKV, 0.0)
  return kept + new, jnp.swapaxes(y, 1, 2)


def _pallas(S, r, k, v, log_decay, u_HK, starts_BT, chunk=CHUNK):
  if u_HK is not None:
    return wkv6_pallas(S, r, k, v, log_decay, u_HK, starts_BT, chunk=chunk)
  u, before = jnp.zeros(k.shape[2:], jnp.float32), _before(r, log_decay, u_HK)
  y, S = wkv6_pallas(S, before, k, v, log_decay, u, starts_BT, chunk=chunk)
  own = jnp.sum(r.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
  return (y.astype(jnp.float32) + own * v.astype(jnp.float32)).astype(v.dtype), S


def _product(letters: str, a, b):
  return jnp.einsum(letters, a, b, precision=lax.Precision.HIGHEST)


def _order(T: int) -> tuple[str, ...]:
  if platform() == 'tpu':
    return ('pallas',) if T > 1 else ('naive',)
  return ('naive',) if T <= _SHORT else ('chunked',)


WKV6 = Operation(
  'wkv6',
  {
    'naive': wkv6_naive,
    'chunked': _chunked,
    # a kernel for TPUs; elsewhere it is interpreted, which is slow
    'pallas': _pallas,
  },
  _order,
)
