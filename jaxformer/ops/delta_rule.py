"""The delta rule: a matrix-valued state in which a value overwrites what a key held.

For each head, with S a matrix [V, K] that starts from 0, and decays g_t per key channel or one for
all of them,

  S_t = S' + beta_t (v_t - S' k_t) k_t^T,   S' = S_{t-1} diag(exp(g_t)),   y_t = S_t q_t

(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 2.2, without
decay; Yang et al. 2025, "Gated Delta Networks", eq. 10, one decay per head; Kimi Team 2025, "Kimi
Linear", eq. 1, one per channel). Where a packed document starts, S_{t-1} := 0.

The fast implementation goes chunk by chunk (`ops/wy.py`). With u_t = beta_t (v_t - S' k_t), L_t the
sum of g_1 .. g_t within a chunk that starts from state S, and d(t, s) = exp(L_t - L_s),

  u_t = beta_t (v_t - S (exp(L_t) k_t) - sum_{s<t} (k_t . d(t, s) k_s) u_s)
  y_t = S (exp(L_t) q_t) + sum_{s<=t} (q_t . d(t, s) k_s) u_s
  S'  = S diag(exp(L_C)) + sum_s u_s (d(C, s) k_s)^T

Decays have no lower bound, so d(t, s) is no product of two factors about one position, which would
overflow. One decay for all channels multiplies the products of keys, as exp of a sum over the
positions from s to t; a decay per channel is applied block by block (`ops/pair_weights.py`).

Dims: B batch, T time, H heads, K key channels, V value channels, C positions of a chunk, N chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_steps
from jaxformer.ops.implementation import Operation
from jaxformer.ops.pair_weights import pair_weights
from jaxformer.ops.sequence_parallel import local_length, over_time, sums_after
from jaxformer.ops.wy import (
  EXACT,
  SPAN,
  STATE,
  TOKEN,
  Coefficients,
  by_values,
  masks,
  scan_spans,
  summary_of,
)
from jaxformer.sharding import platform

SHORT = 8  # fewer positions are computed one by one: a decode, or a few tokens of a prompt


def delta_rule(
  q_BTHK: Float[Array, 'B T H K'],
  k_BTHK: Float[Array, 'B T H K'],
  v_BTHV: Float[Array, 'B T H V'],
  beta_BTH: Float[Array, 'B T H'],
  log_decay: Float[Array, 'B T H'] | Float[Array, 'B T H K'] | None,
  state_BHVK: Float[Array, 'B H V K'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H V K']]:
  """The recurrence above, in fp32 whatever the dtype of the inputs.

  Args:
    q_BTHK: queries, with which the state is read.
    k_BTHK: keys, of length 1: the transitions contract for beta from 0 to 2.
    v_BTHV: values.
    beta_BTH: by how much a value replaces what its key held.
    log_decay: g, at most 0, however negative: one per head or one per key channel; None for none.
    state_BHVK: the state before the first position; None for zeros.
    starts_BT: where a packed document starts.

  Returns the outputs, in the dtype of `v_BTHV`, and the state after the last position, in fp32.
  """
  B, T, H, K = q_BTHK.shape
  state = jnp.zeros((B, H, v_BTHV.shape[-1], K)) if state_BHVK is None else state_BHVK
  # A constant array of all positions would be added up by XLA while it compiles.
  g = jax.lax.optimization_barrier(jnp.zeros((B, T, H))) if log_decay is None else log_decay
  inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g if g.ndim == 4 else g[..., None]
  # Products of bfloat16 inputs may be rounded like the inputs on hardware that does so; sums and
  # states are fp32 in any case.
  precision = EXACT if v_BTHV.dtype == jnp.float32 else None
  run = functools.partial(DELTA_RULE[DELTA_RULE.choose(local_length(T))], precision=precision)
  sharded = over_time(
    run, STATE, (*(TOKEN,) * len(inputs), TOKEN[:2]), TOKEN, summary_of(run, values=2)
  )
  y, state = sharded(state.astype(jnp.float32), *inputs, starts_BT)
  return y.astype(v_BTHV.dtype), state


def delta_rule_naive(S_BHVK, q, k, v, beta, g, starts_BT, *, precision=EXACT):
  """The recurrence, one position after another, with exact products whatever `precision`."""

  def step(S_BHVK, *inputs):
    q, k, v, beta, g = (x.astype(jnp.float32) for x in inputs)
    S_BHVK = S_BHVK * jnp.exp(g)[:, :, None, :]
    u_BHV = beta * (v - jnp.einsum('BHVK,BHK->BHV', S_BHVK, k, precision=EXACT))
    S_BHVK = S_BHVK + u_BHV[..., None] * k[:, :, None, :]
    return S_BHVK, jnp.einsum('BHVK,BHK->BHV', S_BHVK, q, precision=EXACT)

  return scan_steps(step, S_BHVK, (q, k, v, beta, g), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------


def delta_rule_chunked(
  S_BHVK, *inputs: Array, chunk: int | None = None, span: int = SPAN, precision=EXACT
) -> tuple[Array, Array]:
  """Chunk by chunk. A gradient keeps the inputs and the state at every `span` positions, and
  recomputes the rest.

  `chunk` (None: the best size for the platform) is a power of 2. `precision` is that of all
  products but those that invert the triangular matrix."""
  C = chunk or (16 if platform() == 'cpu' else 64)
  return scan_spans(functools.partial(_span, precision=precision), S_BHVK, inputs, C, span)


def _span(S_BHVK, inputs, *, precision):
  """The state after some chunks, and their outputs `[B, H, N, C, V]`: all chunks at once except the
  states between them."""
  *inputs, starts = inputs
  q, k, v, beta, g = (x.astype(jnp.float32) for x in inputs)  # kept in their dtype for a gradient
  dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  weigh, at = _weigh_heads if g.shape[-1] == 1 else _weigh_channels, masks(starts)
  kk, qk, until, after, total = weigh(q, k, g, dot)
  kk, qk = jnp.where(at.earlier, kk, 0.0), jnp.where(at.seen, qk, 0.0)
  since = jnp.where(at.reads, jnp.exp(until), 0.0)  # since the start of the chunk
  chunks = Coefficients(
    lower=-beta * kk,
    reads=-beta * since * k,
    own=beta * v,
    query=since * q,
    weights=qk,
    out=jnp.where(at.kept, k * jnp.exp(after), 0.0),
    decay=jnp.where(at.reads[..., -1:, :], jnp.exp(total), 0.0),
  )
  return by_values(S_BHVK, chunks, dot)


def _weigh_heads(q, k, g, dot):
  """k_t . d(t, s) k_s and q_t . d(t, s) k_s where s <= t, `[B, H, N, C, C]`; and the sums of g up
  to each position, after it, and in total, for one g per position.

  All are sums over the positions concerned: differences of sums from the start of the chunk lose
  the digits of a small decay after a large one."""
  C, index = k.shape[-2], jnp.arange(k.shape[-2])
  later = (index[:, None] > index[None, :])[None, None, None]
  between = jnp.cumsum(jnp.where(later, g, 0.0), axis=-2)  # of g_{s+1} .. g_t
  pairs = dot('...tK,...sK->...ts', jnp.concatenate([k, q], axis=-2), k)
  kk, qk = pairs[..., :C, :] * jnp.exp(between), pairs[..., C:, :] * jnp.exp(between)
  until = jnp.cumsum(g, axis=-2)
  return kk, qk, until, sums_after(g, axis=3), until[..., -1:, :]


def _weigh_channels(q, k, g, dot):
  """The same for one g per channel, where s < t in the first; sums are `[B, H, N, C, K]`."""
  decayed = jnp.exp(g)
  weights, before, after, total = pair_weights((k * decayed, q * decayed), k, g, dot)
  kk, qk = weights
  same = jnp.eye(k.shape[-2], dtype=bool)[None, None, None]
  qk = jnp.where(same, jnp.sum(q * k, axis=-1, keepdims=True), qk)
  return kk, qk, before + g, after, total


def _order(T: int) -> tuple[str, ...]:
  return ('naive',) if T < SHORT else ('chunked',)


DELTA_RULE = Operation(
  'delta_rule', {'naive': delta_rule_naive, 'chunked': delta_rule_chunked}, _order
)
