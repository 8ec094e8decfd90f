"""The selective scan of Mamba: a diagonal linear recurrence whose step size, input and output maps
depend on the input.

  h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t

in every channel (Gu and Dao 2023, eq. 2 and algorithm 2). The input map is discretized as dt B
(Euler), as in the authors' code; eq. 4 of the paper has the exact integral.

Dims: B batch, T time, D channels, N state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_chunks, scan_steps
from jaxformer.ops.implementation import Operation
from jaxformer.ops.kernels.selective_scan import selective_scan_pallas
from jaxformer.ops.sequence_parallel import local_length, multiply_add, over_time, reset_masks
from jaxformer.sharding import platform

CHUNK = 64  # steps between two states that the forward pass keeps for the backward pass

_WIDE, _NARROW = ('batch', 'time', 'inner'), ('batch', 'time', None)
_AXES = (_WIDE, _WIDE, ('inner', None), _NARROW, _NARROW, ('inner',), _WIDE[:2])


def selective_scan(
  u_BTD: Float[Array, 'B T D'],
  dt_BTD: Float[Array, 'B T D'],
  A_DN: Float[Array, 'D N'],
  B_BTN: Float[Array, 'B T N'],
  C_BTN: Float[Array, 'B T N'],
  D_D: Float[Array, ' D'],
  h_BDN: Float[Array, 'B D N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D N']]:
  """The recurrence above, in fp32.

  Args:
    u_BTD: inputs.
    dt_BTD: step sizes, positive.
    A_DN: rates, negative.
    B_BTN, C_BTN: input and output maps.
    D_D: weight of the input itself in the output.
    h_BDN: the state before the first token; None for zeros.
    starts_BT: True where the state is reset before the token.

  Returns:
    y, in the dtype of u, and the state after the last token, in fp32.
  """
  if h_BDN is None:
    h_BDN = jnp.zeros((u_BTD.shape[0], *A_DN.shape), jnp.float32)
  run = SELECTIVE_SCAN[SELECTIVE_SCAN.choose(local_length(u_BTD.shape[1]))]

  def summarize(u, dt, A, B, C, D, starts):
    steps_BD = jnp.sum(dt.astype(jnp.float32), axis=1)
    decay = jnp.exp(steps_BD[..., None] * A.astype(jnp.float32)[None])
    zeros = jnp.zeros(decay.shape, jnp.float32)
    survives_B, _ = reset_masks(starts)
    own = run(zeros, u, dt, A, B, C, D, starts)[1]
    return (jnp.where(survives_B[:, None, None], decay, 0.0), own), multiply_add

  sharded = over_time(run, ('batch', 'inner', None), _AXES, _WIDE, summarize, mapped=True)
  h = h_BDN.astype(jnp.float32)
  return sharded(h, u_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, starts_BT)


def selective_scan_step(u_BD, dt_BD, A_DN, B_BN, C_BN, D_D, h_BDN):
  """One token of `selective_scan`: y [B, D], in the dtype of u, and the new state in fp32."""
  u, dt, B, C = (a.astype(jnp.float32) for a in (u_BD, dt_BD, B_BN, C_BN))
  h = (
    jnp.exp(dt[..., None] * A_DN.astype(jnp.float32)[None]) * h_BDN
    + (dt * u)[..., None] * B[:, None]
  )
  y = jnp.sum(h * C[:, None], axis=-1) + D_D.astype(jnp.float32)[None] * u
  return y.astype(u_BD.dtype), h


def selective_scan_naive(h_BDN, u, dt, A_DN, B, C, D_D, starts_BT):
  """The recurrence step by step. Its gradient stores every state."""

  def step(h, u, dt, B, C):
    y, h = selective_scan_step(u, dt, A_DN, B, C, D_D, h)
    return h, y

  return scan_steps(step, h_BDN, (u, dt, B, C), starts_BT)


# ---- chunks ------------------------------------------------------------------------------------
# Inside, time comes first and the channels last: T.., B, N, D. The state's N is narrow, and a TPU
# keeps 128 numbers per row.


def _decay(dt_BD, A_ND, start_B):
  return jnp.exp(dt_BD[:, None] * A_ND[None]) * (1.0 - start_B)[:, None, None]


def _run(h_BND, A_ND, chunk, emit):
  """The recurrence over one chunk: the state after it, and C.h of every step ('y') or the state
  before every step ('h')."""

  def step(h, now):
    u, dt, B, C, start = (a.astype(jnp.float32) for a in now)
    after = _decay(dt, A_ND, start) * h + (dt * u)[:, None] * B[..., None]
    return after, jnp.sum(after * C[..., None], axis=1) if emit == 'y' else h

  return jax.lax.scan(step, h_BND, chunk)


@jax.custom_vjp
def _chunk(h_BND, A_ND, chunk):
  """The state after a chunk and C.h of every step, for `chunk` = (u, dt, B, C, start), time first.
  The gradient keeps only the state before the chunk and recomputes the others."""
  return _run(h_BND, A_ND, chunk, 'y')


def _chunk_backward(saved, cotangents):
  """With g_t = dL/dy_t the adjoint recurrence l_t = C_t g_t + a_{t+1} l_{t+1} of l_t = dL/dh_t
  gives all gradients."""
  h_BND, A_ND, inputs = saved
  tail, dy = cotangents

  def step(carry, now):
    # a_{t+1} l_{t+1}, and the gradient of A so far
    tail, dA = carry
    (u, dt, B, C, start), g, h = (
      jax.tree.map(lambda a: a.astype(jnp.float32), part) for part in now
    )
    a, x = _decay(dt, A_ND, start), dt * u
    l = tail + g[:, None] * C[..., None]
    dC = jnp.sum((a * h + x[:, None] * B[..., None]) * g[:, None], axis=2)
    dB = jnp.sum(l * x[:, None], axis=2)
    dx = jnp.sum(l * B[..., None], axis=1)
    tail = l * a
    through = tail * h  # dL / d(dt A)
    ddt = jnp.sum(through * A_ND[None], axis=1) + dx * u
    gradients = dx * dt, ddt, dB, dC, jnp.zeros_like(start)
    return (tail, dA + jnp.sum(through * dt[:, None], axis=0)), gradients

  states = _run(h_BND, A_ND, inputs, 'h')[1]
  (dh, dA), gradients = jax.lax.scan(
    step, (tail, jnp.zeros_like(A_ND)), (inputs, dy, states), reverse=True
  )
  return dh, dA, jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, inputs)


_chunk.defvjp(lambda *saved: (_chunk(*saved), saved), _chunk_backward)


def selective_scan_chunked(h_BDN, u, dt, A_DN, B, C, D_D, starts_BT):
  """The recurrence step by step, with a gradient that keeps only the states between chunks and
  recomputes those inside them: T / `CHUNK` + `CHUNK` states in memory where the gradient of the
  naive implementation stores T, in several arrays of that size."""
  A_ND = A_DN.astype(jnp.float32).T

  def body(h_BND, *chunk):
    h_BND, y = _chunk(h_BND, A_ND, tuple(jnp.swapaxes(x, 0, 1) for x in chunk))
    return h_BND, jnp.swapaxes(y, 0, 1)

  inputs = (u, dt, B, C, starts_BT.astype(jnp.float32))
  y, h_BND = scan_chunks(body, jnp.swapaxes(h_BDN, 1, 2), inputs, CHUNK)
  y = y + D_D.astype(jnp.float32).reshape(1, 1, -1) * u.astype(jnp.float32)
  return y.astype(u.dtype), jnp.swapaxes(h_BND, 1, 2)


def _order(T: int) -> tuple[str, ...]:
  return ('naive',) if T == 1 else ('pallas',) if platform() == 'tpu' else ('chunked',)


SELECTIVE_SCAN = Operation(
  'selective_scan',
  {
    'naive': selective_scan_naive,
    'chunked': selective_scan_chunked,
    # a kernel for TPUs; elsewhere it is interpreted, which is slow
    'pallas': selective_scan_pallas,
  },
  _order,
)
