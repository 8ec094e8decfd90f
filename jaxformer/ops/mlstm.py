"""The mLSTM of xLSTM: a matrix memory with exponential gates (Beck et al. 2024, "xLSTM", section
2.3; Beck et al. 2025, "xLSTM 7B"). For each head, with row vectors q, k, v, an input gate exp(i)
and a forget gate exp(log_f),

  C_t = exp(log_f + m_{t-1} - m_t) C_{t-1} + exp(i - m_t) k^T v
  n_t = exp(log_f + m_{t-1} - m_t) n_{t-1} + exp(i - m_t) k
  m_t = max(log_f + m_{t-1}, i)
  h_t = (q C_t) / (max(|q . n_t|, exp(-m_t)) + eps),  q scaled by 1 / sqrt(K)

The maximum m keeps every exponential at most 1. It scales C and n alike and so has no part in h,
except in eps: gradients take it as a constant. State before the first token: zeros, m too.

A part of a sequence takes the state to another one like a sum of exponentials: with G the sum of
log_f over the part, and (C', n', m') what the part makes of nothing,

  m'' = max(G + m, m'),  C'' = exp(G + m - m'') C + exp(m' - m'') C'

Dims: B batch, T time, H heads, K key channels, V value channels, C positions of a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import from_chunks, scan_steps, to_chunks
from jaxformer.ops.implementation import Operation
from jaxformer.ops.sequence_parallel import local_length, over_time, sums_after
from jaxformer.sharding import platform

# positions of a chunk; longer ones cost products, shorter ones states between chunks
CHUNK = {'cpu': 32, 'gpu': 64, 'tpu': 256}
# the logarithm of a decay to zero; finite, so that no 0 x inf arises
_ZERO_DECAY = -1e30
# below it exp(-m) leaves fp32; h is 0 there in either case
_LOWEST_MAXIMUM = -80.0

_TOKEN, _GATE = ('batch', 'time', 'heads', None), ('batch', 'time', 'heads')
# the state's arrays have the same axes, so that all are sharded alike: n is [B, H, K, 1], m is [B,
# H, 1, 1]
_STATE = ('batch', 'heads', None, None)
States = tuple[Array, Array, Array]


def mlstm(
  q_BTHK: Float[Array, 'B T H K'],
  k_BTHK: Float[Array, 'B T H K'],
  v_BTHV: Float[Array, 'B T H V'],
  i_BTH: Float[Array, 'B T H'],
  log_f_BTH: Float[Array, 'B T H'],
  state: States | None,
  starts_BT: Bool[Array, 'B T'],
  *,
  eps: float = 1e-6,
) -> tuple[Float[Array, 'B T H V'], States]:
  """The recurrence above.

  Args:
    q_BTHK: queries, not yet scaled.
    k_BTHK, v_BTHV: keys and values.
    i_BTH: logarithms of the input gates.
    log_f_BTH: logarithms of the forget gates: `log_sigmoid` of a preactivation for sigmoid gates,
      the preactivation itself for exponential ones.
    state: C [B, H, K, V], n [B, H, K] and m [B, H] before the first position; None for zeros.
    starts_BT: where a packed document starts: the state is zeros before such a position.
    eps: added to the denominator.

  Returns:
    h, in the dtype of v, and the state after the last position, in fp32. Products take q, k and v
    in their own dtype and accumulate in fp32.
  """
  (B, T, H, K), V = q_BTHK.shape, v_BTHV.shape[-1]
  run = functools.partial(MLSTM[MLSTM.choose(local_length(T))], eps=eps)
  if state is None:
    state = jnp.zeros((B, H, K, V)), jnp.zeros((B, H, K)), jnp.zeros((B, H))
  C, n, m = (s.astype(jnp.float32) for s in state)
  gates = (i_BTH.astype(jnp.float32), log_f_BTH.astype(jnp.float32))
  axes = (_TOKEN, _TOKEN, _TOKEN, _GATE, _GATE, _GATE[:2])
  sharded = over_time(run, _STATE, axes, _TOKEN, _summarize)
  first = (C, n[..., None], m[..., None, None])
  h, (C, n, m) = sharded(first, q_BTHK, k_BTHK, v_BTHV, *gates, starts_BT)
  return h, (C, n[..., 0], m[..., 0, 0])


def _product(equation: str, *operands: Array) -> Array:
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _maximum(*candidates: Array) -> Array:
  return jax.lax.stop_gradient(functools.reduce(jnp.maximum, candidates))


def _h(numerator: Array, q_n: Array, m: Array, eps: float) -> Array:
  """The output, of arrays that broadcast."""
  floor = jnp.exp(-jnp.maximum(m, _LOWEST_MAXIMUM))
  return numerator / (jnp.maximum(jnp.abs(q_n), floor) + eps)


def mlstm_naive(state: States, q, k, v, i, log_f, starts_BT, *, eps: float):
  """The recurrence, one position after another. Its gradient stores every state."""
  dtype, scale = v.dtype, q.shape[-1] ** -0.5

  def step(state, q, k, v, i, log_f):
    C, n, m = state
    i, log_f = i[..., None, None], log_f[..., None, None]
    after = _maximum(log_f + m, i)
    keep, write = jnp.exp(log_f + m - after), jnp.exp(i - after)
    C = keep * C + write * k[..., None] * v[:, :, None]
    n = keep * n + write * k[..., None]
    q = q[..., None] * scale
    return (C, n, after), _h(jnp.sum(q * C, axis=2), jnp.sum(q * n, axis=2), after[..., 0], eps)

  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  h, state = scan_steps(step, state, (q, k, v, i, log_f), starts_BT)
  return h.astype(dtype), state


# ---- chunks ------------------------------------------------------------------------------------


def _with_borders(i: Array, log_f: Array, starts: Array) -> tuple[Array, Array]:
  """The logarithms of the decays, to zero where a document starts; and of each position the
  candidate for the maximum: i, or that of the zeros before the document."""
  candidate = jnp.where(starts, jnp.maximum(i, log_f), i)
  return jnp.where(starts, _ZERO_DECAY, log_f), candidate


def _chunk(state: States, now: tuple[Array, ...], *, eps: float):
  """One chunk: what its positions see of each other and of the state before it.

  Sums of logarithms are taken over the positions concerned, not as differences of sums from the
  start of the chunk, which lose all digits where much has decayed before."""
  C_BHKV, n_BHK1, m_BH11 = state
  q, k, v, i_BCH, log_f_BCH, starts_BC = now
  dtype, C, scale = v.dtype, q.shape[1], q.shape[-1] ** -0.5
  log, candidate = (
    jnp.swapaxes(x, 1, 2) for x in _with_borders(i_BCH, log_f_BCH, starts_BC[..., None])
  )
  i = jnp.swapaxes(i_BCH, 1, 2)
  t, s = jnp.arange(C).reshape(-1, 1), jnp.arange(C).reshape(1, -1)
  later, seen = (t > s).reshape(1, 1, C, C), (t >= s).reshape(1, 1, C, C)
  # the decay from s to t
  between = jnp.where(seen, jnp.cumsum(jnp.where(later, log[..., None], 0.0), axis=2), _ZERO_DECAY)
  from_state = jnp.cumsum(log, axis=2) + m_BH11[..., 0]
  m = _maximum(from_state, jnp.max(between + candidate[:, :, None], axis=3))
  weight = jnp.exp(between + i[:, :, None] - m[..., None])
  carried = jnp.exp(from_state - m)

  scores = _product('BtHK,BsHK->BHts', q, k) * scale * weight
  q_in = q.astype(jnp.float32) * (jnp.swapaxes(carried, 1, 2) * scale)[..., None]
  numerator = _product('BHts,BsHV->BtHV', scores.astype(dtype), v)
  numerator = numerator + _product('BtHK,BHKV->BtHV', q_in, C_BHKV)
  q_n = jnp.sum(scores, axis=3) + _product('BtHK,BHK->BHt', q_in, n_BHK1[..., 0])
  by_time = (jnp.swapaxes(x, 1, 2)[..., None] for x in (q_n, m))
  h = _h(numerator, *by_time, eps)

  C_own, n_own = _written(k, v, jnp.swapaxes(weight[:, :, -1], 1, 2))
  keep = carried[..., -1, None, None]
  return (keep * C_BHKV + C_own, keep * n_BHK1 + n_own, m[..., -1, None, None]), h.astype(dtype)


def _written(k_BTHK: Array, v_BTHV: Array, weight_BTH: Array) -> tuple[Array, Array]:
  """The sums of k^T v and of k over positions, `[B, H, K, V]` and `[B, H, K, 1]`."""
  weighted = k_BTHK.astype(jnp.float32) * weight_BTH[..., None]
  C = _product('BsHK,BsHV->BHKV', weighted.astype(v_BTHV.dtype), v_BTHV)
  return C, jnp.sum(weighted, axis=1)[..., None]


def mlstm_chunked(state: States, q, k, v, i, log_f, starts_BT, *, eps: float):
  """Chunks as matrix products, the state from chunk to chunk by a scan. The gradient keeps the
  states between chunks and recomputes the rest of each chunk."""
  T = q.shape[1]
  size = min(CHUNK[platform()], T)
  # Padding neither decays nor writes.
  by_chunk = [to_chunks(x, size) for x in (q, k, v)]
  gates = [to_chunks(i, size, fill=_ZERO_DECAY), to_chunks(log_f, size)]
  body = jax.checkpoint(functools.partial(_chunk, eps=eps), prevent_cse=False)
  state, h = jax.lax.scan(body, state, (*by_chunk, *gates, to_chunks(starts_BT, size)))
  return from_chunks(h, T), state


def _summarize(q, k, v, i, log_f, starts_BT):
  """What a part of a sequence makes of a state (see above)."""
  log, candidate = _with_borders(i, log_f, starts_BT[..., None])
  after = sums_after(log)
  m_BH = _maximum(jnp.max(after + candidate, axis=1))
  written = _written(k, v, jnp.exp(after + i - m_BH[:, None]))
  total, m = (x[..., None, None] for x in (jnp.sum(log, axis=1), m_BH))
  return (total, *written, m), _join


def _join(state: States, part: tuple[Array, ...]) -> States:
  (C, n, m), (total, C_own, n_own, m_own) = state, part
  after = _maximum(total + m, m_own)
  keep, add = jnp.exp(total + m - after), jnp.exp(m_own - after)
  return keep * C + add * C_own, keep * n + add * n_own, after


MLSTM = Operation(
  'mlstm',
  {'naive': mlstm_naive, 'chunked': mlstm_chunked},
  lambda T: ('naive',) if T == 1 else ('chunked',),
)
