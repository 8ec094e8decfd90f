"""The recurrence of RWKV-7: a matrix-valued state under a generalized delta rule.

Peng et al. 2025 ("RWKV-7 Goose"), section 4.1. For each head, with S a matrix [V, K] that starts
from 0,

  S_t = S_{t-1} (diag(exp(w_t)) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t

where the paper's removal key kappa and in-context learning rate eta give a = -kappa and b = eta *
kappa: the value that the state holds under the key kappa is partly removed before v is added under
k. Where a packed document starts, S_{t-1} := 0.

The fast implementation goes chunk by chunk (`ops/wy.py`, here with a decay per channel). Within a
chunk of C positions that starts from state S, with L_t the sum of w_1 .. w_t and d(t, s) = exp(L_t
- L_s), write u_t = S_{t-1} a_t for the value read under the removal key. Then

  u_t = S (exp(L_{t-1}) a_t) + sum_{s<t} A^ab_ts u_s + A^ak_ts v_s
  y_t = S (exp(L_t) r_t) + sum_{s<=t} A^rb_ts u_s + A^rk_ts v_s
  S'  = S diag(exp(L_C)) + sum_s u_s (d(C, s) b_s)^T + v_s (d(C, s) k_s)^T

  A^ab_ts = a_t . d(t-1, s) b_s,   A^ak_ts = a_t . d(t-1, s) k_s,   A^rb_ts = r_t . d(t, s) b_s,
  A^rk_ts = r_t . d(t, s) k_s

so U = (I - A^ab)^{-1} (...) is the solution of a unit triangular system of C rows, everything else
is matrix products, and only the product of S with one [K, K] matrix per chunk is sequential. d(t,
s) is computed as a product of two factors, one for each side, about the middle of the chunk: with
w >= -0.6065 they stay below exp(0.31 C), far from the limits of fp32, and a product of two accurate
factors is as accurate.

Dims: B batch, T time, H heads, K key channels, V value channels, C positions of a chunk, N chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_steps
from jaxformer.ops.implementation import Operation
from jaxformer.ops.kernels.wkv7 import wkv7_pallas
from jaxformer.ops.sequence_parallel import local_length, over_time
from jaxformer.ops.wy import (
  EXACT,
  SPAN,
  STATE,
  TOKEN,
  Coefficients,
  Given,
  by_transitions,
  masks,
  scan_spans,
  summary_of,
)
from jaxformer.sharding import platform

LOWEST_LOG_DECAY = -0.6066  # -exp(-1/2), the bound of the paper, rounded down
SHORT = 8  # fewer positions are computed one by one: a decode, or a few tokens of a prompt


def wkv7(
  r_BTHK: Float[Array, 'B T H K'],
  log_decay_BTHK: Float[Array, 'B T H K'],
  k_BTHK: Float[Array, 'B T H K'],
  v_BTHV: Float[Array, 'B T H V'],
  a_BTHK: Float[Array, 'B T H K'],
  b_BTHK: Float[Array, 'B T H K'],
  state_BHVK: Float[Array, 'B H V K'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H V K']]:
  """The recurrence above, in fp32 whatever the dtype of the inputs.

  Args:
    r_BTHK: receptance, with which the state is read.
    log_decay_BTHK: w, from -0.6065 (the paper's bound, exp(-exp(-0.5))) to 0.
    k_BTHK, v_BTHV: keys and values that are written.
    a_BTHK, b_BTHK: the removal, -kappa and eta * kappa.
    state_BHVK: the state before the first position; None for zeros.
    starts_BT: where a packed document starts.

  Returns the outputs, in the dtype of `v_BTHV`, and the state after the last position, in fp32.
  """
  B, T, H, K = r_BTHK.shape
  state = jnp.zeros((B, H, v_BTHV.shape[-1], K)) if state_BHVK is None else state_BHVK
  inputs = (r_BTHK, log_decay_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
  # Products of bfloat16 inputs may be rounded like the inputs on hardware that does so; sums and
  # states are fp32 in any case.
  precision = EXACT if v_BTHV.dtype == jnp.float32 else None
  chosen = WKV7.choose(local_length(T))
  run = functools.partial(WKV7[chosen], precision=precision)
  if chosen != 'pallas':
    inputs = tuple(x.astype(jnp.float32) for x in inputs)

  sharded = over_time(
    run,
    STATE,
    (*(TOKEN,) * 6, TOKEN[:2]),
    TOKEN,
    summary_of(run, values=3),
    mapped=chosen == 'pallas',
  )
  y, state = sharded(state.astype(jnp.float32), *inputs, starts_BT)
  return y.astype(v_BTHV.dtype), state


def wkv7_naive(S_BHVK, r, w, k, v, a, b, starts_BT, *, precision=EXACT):
  """The recurrence, one position after another, with exact products whatever `precision`."""

  def step(S_BHVK, r, w, k, v, a, b):
    u_BHV = jnp.einsum('BHVK,BHK->BHV', S_BHVK, a, precision=EXACT)
    S_BHVK = (
      S_BHVK * jnp.exp(w)[:, :, None, :]
      + u_BHV[..., None] * b[:, :, None, :]
      + v[..., None] * k[:, :, None, :]
    )
    return S_BHVK, jnp.einsum('BHVK,BHK->BHV', S_BHVK, r, precision=EXACT)

  return scan_steps(step, S_BHVK, (r, w, k, v, a, b), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------


def wkv7_chunked(
  S_BHVK, *inputs: Array, chunk: int | None = None, span: int = SPAN, precision=EXACT
) -> tuple[Array, Array]:
  """Chunk by chunk. A gradient keeps the inputs and the state at every `span` positions, and
  recomputes the rest.

  `chunk` (None: the best size for the platform) is at most 64, where the factors of the decay reach
  exp(19.4). `precision` is that of all products but those that invert the triangular matrix."""
  C = chunk or (16 if platform() == 'cpu' else 32)
  assert C in (1, 2, 4, 8, 16, 32, 64)
  return scan_spans(functools.partial(_span, precision=precision), S_BHVK, inputs, C, span)


def _span(S_BHVK, inputs, *, precision):
  """The state after some chunks, and their outputs `[B, H, N, C, V]`: all chunks at once except the
  states between them."""
  r, w, k, v, a, b, starts = inputs
  C = r.shape[-2]
  dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  at = masks(starts)
  L = jnp.cumsum(w, axis=-2)
  before, end = L - w, L[..., -1:, :]
  middle = jax.lax.stop_gradient(L[..., C // 2 - 1 : C // 2, :])

  # All four kinds of pairs in one product: rows a_1 .. a_C, r_1 .. r_C; columns b_1 .. b_C, k_1 ..
  # k_C.
  rows = jnp.concatenate([a * jnp.exp(before - middle), r * jnp.exp(L - middle)], axis=-2)
  columns = jnp.concatenate([b, k], axis=-2) * jnp.exp(middle - jnp.concatenate([L, L], axis=-2))
  pairs = dot('...tK,...sK->...ts', rows, columns)
  mask = jnp.concatenate([jnp.concatenate([m, m], axis=-1) for m in (at.earlier, at.seen)], axis=-2)
  pairs = jnp.where(mask, pairs, 0.0)
  ab, ak, rb, rk = pairs[..., :C, :C], pairs[..., :C, C:], pairs[..., C:, :C], pairs[..., C:, C:]

  # a and r as they read the incoming state, b and k as they are left in the outgoing one.
  a_in = jnp.where(at.reads, a * jnp.exp(before), 0.0)
  r_in = jnp.where(at.reads, r * jnp.exp(L), 0.0)
  left = jnp.exp(end - L)
  b_out, k_out = jnp.where(at.kept, b * left, 0.0), jnp.where(at.kept, k * left, 0.0)
  decay = jnp.where(at.reads[..., -1:, :], jnp.exp(end), 0.0)  # [B, H, N, 1, K]

  own = dot('...ts,...sV->...tV', ak, v)
  chunks = Coefficients(ab, a_in, own, r_in, rb, b_out, decay)
  return by_transitions(S_BHVK, chunks, Given(v, rk, k_out), dot)


def _order(T: int) -> tuple[str, ...]:
  if T < SHORT:
    return ('naive',)
  return ('pallas',) if platform() == 'tpu' else ('chunked',)


WKV7 = Operation(
  'wkv7',
  {
    'naive': wkv7_naive,
    'chunked': wkv7_chunked,
    # a kernel for TPUs; elsewhere it is interpreted, which is slow
    'pallas': functools.partial(wkv7_pallas, lowest_log_decay=LOWEST_LOG_DECAY),
  },
  _order,
)
