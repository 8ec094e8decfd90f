"""The recurrence of RWKV-7: a matrix-valued state under a generalized delta rule.

Peng et al. 2025 ("RWKV-7 Goose"), section 4.1. For each head, with S a matrix [V, K] that starts
from 0,

  S_t = S_{t-1} (diag(exp(w_t)) + a_t b_t^T) + v_t k_t^T,    y_t = S_t r_t

where the paper's removal key kappa and in-context learning rate eta give a = -kappa and b = eta *
kappa: the value that the state holds under the key kappa is partly removed before v is added under
k. Where a packed document starts, S_{t-1} := 0.

The fast implementation goes chunk by chunk (the WY representation of Bischof and Van Loan 1987, as
Yang et al. 2024 use it for the delta rule, here with a decay per channel). Within a chunk of C
positions that starts from state S, with L_t the sum of w_1 .. w_t and d(t, s) = exp(L_t - L_s),
write u_t = S_{t-1} a_t for the value read under the removal key. Then

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

from jaxformer.ops.chunks import scan_steps, to_chunks
from jaxformer.ops.documents import count_starts
from jaxformer.ops.implementation import Operation
from jaxformer.ops.kernels.wkv7 import wkv7_pallas
from jaxformer.ops.sequence_parallel import local_length, over_time
from jaxformer.sharding import platform

# positions whose intermediate values are in memory together; a gradient keeps the states between
# spans
SPAN = 256
LOWEST_LOG_DECAY = -0.6066  # -exp(-1/2), the bound of the paper, rounded down
SHORT = 8  # fewer positions are computed one by one: a decode, or a few tokens of a prompt
_EXACT = jax.lax.Precision.HIGHEST

_TOKEN, _STATE = ('batch', 'time', 'heads', None), ('batch', 'heads', None, None)


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
  precision = _EXACT if v_BTHV.dtype == jnp.float32 else None
  chosen = WKV7.choose(local_length(T))
  run = functools.partial(WKV7[chosen], precision=precision)
  if chosen != 'pallas':
    inputs = tuple(x.astype(jnp.float32) for x in inputs)

  def summarize(r, w, k, v, a, b, starts):
    """A part takes S to S M + s; both come from one run that starts from the identity below zeros,
    and adds zeros there."""
    (B, T, H, K), V = r.shape, v.shape[-1]
    below = jnp.concatenate([jnp.zeros((V, K)), jnp.eye(K)])
    v = jnp.concatenate([v, jnp.zeros((B, T, H, K), v.dtype)], axis=-1)
    below = jnp.broadcast_to(below[None, None], (B, H, V + K, K))
    return run(below, r, w, k, v, a, b, starts)[1], join

  def join(S_BHVK, part):
    own, M_BHKK = jnp.split(part, (S_BHVK.shape[2],), axis=2)
    return jnp.einsum('BHVI,BHIK->BHVK', S_BHVK, M_BHKK, precision=_EXACT) + own

  sharded = over_time(
    run, _STATE, (*(_TOKEN,) * 6, _TOKEN[:2]), _TOKEN, summarize, mapped=chosen == 'pallas'
  )
  y, state = sharded(state.astype(jnp.float32), *inputs, starts_BT)
  return y.astype(v_BTHV.dtype), state


def wkv7_naive(S_BHVK, r, w, k, v, a, b, starts_BT, *, precision=_EXACT):
  """The recurrence, one position after another, with exact products whatever `precision`."""

  def step(S_BHVK, r, w, k, v, a, b):
    u_BHV = jnp.einsum('BHVK,BHK->BHV', S_BHVK, a, precision=_EXACT)
    S_BHVK = (
      S_BHVK * jnp.exp(w)[:, :, None, :]
      + u_BHV[..., None] * b[:, :, None, :]
      + v[..., None] * k[:, :, None, :]
    )
    return S_BHVK, jnp.einsum('BHVK,BHK->BHV', S_BHVK, r, precision=_EXACT)

  return scan_steps(step, S_BHVK, (r, w, k, v, a, b), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------


def wkv7_chunked(
  S_BHVK, *inputs: Array, chunk: int | None = None, span: int = SPAN, precision=_EXACT
) -> tuple[Array, Array]:
  """Chunk by chunk. A gradient keeps the inputs and the state at every `span` positions, and
  recomputes the rest.

  `chunk` (None: the best size for the platform) is at most 64, where the factors of the decay reach
  exp(19.4). `precision` is that of all products but those that invert the triangular matrix."""
  B, T = inputs[0].shape[:2]
  C = chunk or (16 if platform() == 'cpu' else 32)
  assert C in (1, 2, 4, 8, 16, 32, 64)
  N = min(max(span // C, 1), -(-T // C))  # chunks per span

  def by_span(x):
    x = to_chunks(x, N * C)  # Padding neither decays nor adds to the state.
    x = x.reshape(*x.shape[:2], N, C, *x.shape[3:])
    # [spans, B, H, N, C, ...]; one head for starts
    return jnp.moveaxis(x, 4, 2) if x.ndim > 4 else x[:, :, None]

  spans = tuple(by_span(x) for x in inputs)
  body = jax.checkpoint(functools.partial(_span, precision=precision), prevent_cse=False)
  if len(spans[0]) == 1:
    S_BHVK, y = body(S_BHVK, tuple(x[0] for x in spans))
    y = y[None]
  else:
    S_BHVK, y = jax.lax.scan(body, S_BHVK, spans)
  y = jnp.moveaxis(jnp.moveaxis(y, 0, 2), 1, 4)  # [B, spans, N, C, H, V]
  return y.reshape(B, -1, *y.shape[4:])[:, :T], S_BHVK


def _span(S_BHVK, inputs, *, precision):
  """The state after some chunks, and their outputs `[B, H, N, C, V]`: all chunks at once except the
  states between them."""
  r, w, k, v, a, b, starts = inputs
  C = r.shape[-2]
  dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
  # [B, 1, N, C], 0 for the document in which the chunk starts
  document = count_starts(starts, axis=-1)
  L = jnp.cumsum(w, axis=-2)
  before, end = L - w, L[..., -1:, :]
  middle = jax.lax.stop_gradient(L[..., C // 2 - 1 : C // 2, :])

  # All four kinds of pairs in one product: rows a_1 .. a_C, r_1 .. r_C; columns b_1 .. b_C, k_1 ..
  # k_C.
  rows = jnp.concatenate([a * jnp.exp(before - middle), r * jnp.exp(L - middle)], axis=-2)
  columns = jnp.concatenate([b, k], axis=-2) * jnp.exp(middle - jnp.concatenate([L, L], axis=-2))
  pairs = dot('...tK,...sK->...ts', rows, columns)
  together = document[..., :, None] == document[..., None, :]
  index = jnp.arange(C)
  earlier = together & (index[:, None] > index[None, :])[None, None, None]
  seen = together & (index[:, None] >= index[None, :])[None, None, None]
  mask = jnp.concatenate([jnp.concatenate([m, m], axis=-1) for m in (earlier, seen)], axis=-2)
  pairs = jnp.where(mask, pairs, 0.0)
  ab, ak, rb, rk = pairs[..., :C, :C], pairs[..., :C, C:], pairs[..., C:, :C], pairs[..., C:, C:]

  # a and r as they read the incoming state, b and k as they are left in the outgoing one.
  reads, kept = (document == 0)[..., None], (document == document[..., -1:])[..., None]
  a_in, r_in = jnp.where(reads, a * jnp.exp(before), 0.0), jnp.where(reads, r * jnp.exp(L), 0.0)
  left = jnp.exp(end - L)
  b_out, k_out = jnp.where(kept, b * left, 0.0), jnp.where(kept, k * left, 0.0)
  decay = jnp.where(reads[..., -1:, :], jnp.exp(end), 0.0)  # [B, H, N, 1, K]

  # U = W S^T + G: the values read under the removal keys, as a function of the state.
  inverse = unit_lower_inverse(ab)
  W = dot('...ts,...sK->...tK', inverse, a_in)
  G = dot('...ts,...sV->...tV', inverse, dot('...ts,...sV->...tV', ak, v))
  turned = dot('...sI,...sK->...IK', W, b_out)  # S' = S (diag(decay) + turned) + add
  add = dot(
    '...sV,...sK->...VK', jnp.concatenate([G, v], axis=-2), jnp.concatenate([b_out, k_out], axis=-2)
  )

  def border(S_BHVK, now):
    decay, turned, add = now
    return S_BHVK * decay + dot('BHVI,BHIK->BHVK', S_BHVK, turned) + add, S_BHVK

  last, S_NBHVK = jax.lax.scan(
    border, S_BHVK, tuple(jnp.moveaxis(x, 2, 0) for x in (decay, turned, add))
  )
  read = r_in + dot('...ts,...sK->...tK', rb, W)
  y = dot('BHNtK,NBHVK->BHNtV', read, S_NBHVK)
  return last, y + dot(
    '...ts,...sV->...tV', jnp.concatenate([rb, rk], axis=-1), jnp.concatenate([G, v], axis=-2)
  )


@jax.custom_vjp
def unit_lower_inverse(A: Float[Array, '*B C C']) -> Float[Array, '*B C C']:
  """(I - A)^{-1} for strictly lower triangular A of a power of two of rows, by blocks.

  [[P, 0], [-A', Q]]^{-1} = [[P^{-1}, 0], [Q^{-1} A' P^{-1}, Q^{-1}]]. All factors are inverses
  themselves, which are bounded where the transitions contract; the powers of A that a Neumann
  series adds up are not, and cancel."""
  return _unit_lower_inverse(A)


def _unit_lower_inverse(A):
  C = A.shape[-1]
  if C == 1:
    return jnp.ones_like(A)
  h = C // 2
  P, Q = jnp.moveaxis(
    _unit_lower_inverse(jnp.stack([A[..., :h, :h], A[..., h:, h:]], axis=-3)), -3, 0
  )
  corner = jnp.matmul(jnp.matmul(Q, A[..., h:, :h], precision=_EXACT), P, precision=_EXACT)
  top = jnp.concatenate([P, jnp.zeros_like(P)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([corner, Q], axis=-1)], axis=-2)


def _inverse_forward(A):
  X = _unit_lower_inverse(A)
  return X, X


def _inverse_backward(X, dX):
  # dX = X dA X, so dA = X^T dX X^T below the diagonal.
  Xt = jnp.swapaxes(X, -1, -2)
  return (jnp.tril(jnp.matmul(jnp.matmul(Xt, dX, precision=_EXACT), Xt, precision=_EXACT), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


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
