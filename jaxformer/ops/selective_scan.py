"""The selective scan of Mamba: a diagonal linear recurrence whose step size, input and output maps
depend on the input.

Dims: B batch, T time, D channels, N state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.kernels.selective_scan import selective_scan_pallas
from jaxformer.ops.sequence_parallel import over_time, scaled, time_axes, unbroken
from jaxformer.sharding import per_shard, platform, shards

CHUNK = 64  # steps between two states that the forward pass keeps for the backward pass


def selective_scan_step(
  u_BD: Float[Array, 'B D'],
  dt_BD: Float[Array, 'B D'],
  A_DN: Float[Array, 'D N'],
  B_BN: Float[Array, 'B N'],
  C_BN: Float[Array, 'B N'],
  D_D: Float[Array, ' D'],
  h_BDN: Float[Array, 'B D N'],
) -> tuple[Float[Array, 'B D'], Float[Array, 'B D N']]:
  """One token of `selective_scan`."""
  u, dt, B, C = (a.astype(jnp.float32) for a in (u_BD, dt_BD, B_BN, C_BN))
  h = (
    jnp.exp(dt[..., None] * A_DN.astype(jnp.float32)[None]) * h_BDN
    + (dt * u)[..., None] * B[:, None]
  )
  y = jnp.sum(h * C[:, None], axis=-1) + D_D.astype(jnp.float32)[None] * u
  return y.astype(u_BD.dtype), h


def selective_scan_naive(
  u_BTD: Float[Array, 'B T D'],
  dt_BTD: Float[Array, 'B T D'],
  A_DN: Float[Array, 'D N'],
  B_BTN: Float[Array, 'B T N'],
  C_BTN: Float[Array, 'B T N'],
  D_D: Float[Array, ' D'],
  h_BDN: Float[Array, 'B D N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D N']]:
  """The recurrence step by step. Its gradient stores every state."""
  first = (
    jnp.zeros((u_BTD.shape[0], *A_DN.shape), jnp.float32)
    if h_BDN is None
    else h_BDN.astype(jnp.float32)
  )

  def step(h, now):
    u, dt, B, C, start = now
    y, h = selective_scan_step(u, dt, A_DN, B, C, D_D, jnp.where(start[:, None, None], 0.0, h))
    return h, y

  by_time = tuple(jnp.swapaxes(a, 0, 1) for a in (u_BTD, dt_BTD, B_BTN, C_BTN, starts_BT))
  h, y = jax.lax.scan(step, first, by_time)
  return jnp.swapaxes(y, 0, 1), h


# ---- chunked -----------------------------------------------------------------------------------
# Inside, time comes first and the channels last: T.., B, N, D. The state's N is narrow, and a TPU
# keeps 128 numbers a row.


def _decay(dt_BD: Array, A_ND: Array, start_B: Array) -> Array:
  return jnp.exp(dt_BD[:, None] * A_ND[None]) * (1.0 - start_B)[:, None, None]


def _run(h_BND: Array, chunk: tuple[Array, ...], A_ND: Array, emit: str) -> tuple[Array, Array]:
  """The recurrence over one chunk: the state after it, and C.h of every step ('y') or the state
  before every step ('h')."""

  def step(h, now):
    u, dt, B, C, start = (a.astype(jnp.float32) for a in now)
    after = _decay(dt, A_ND, start) * h + (dt * u)[:, None] * B[..., None]
    return after, jnp.sum(after * C[..., None], axis=1) if emit == 'y' else h

  return jax.lax.scan(step, h_BND, chunk)


@jax.custom_vjp
def _chunked(chunks: tuple[Array, ...], A_ND: Array, h_BND: Array) -> tuple[Array, Array]:
  """C.h of every step and the state after the last, for `chunks` = (u, dt, B, C, start), each
  [chunk, step, ...]."""
  return _chunked_forward(chunks, A_ND, h_BND)[0]


def _chunked_forward(chunks, A_ND, h_BND):
  def chunk(h, now):
    after, y = _run(h, now, A_ND, 'y')
    return after, (y, h)

  last, (y, before) = jax.lax.scan(chunk, h_BND, chunks)
  return (y, last), (chunks, A_ND, before)


def _chunked_backward(kept, cotangents):
  """Chunk after chunk from the last: its states once more from the one before it, then with g_t =
  dL/dy_t the adjoint recurrence l_t = C_t g_t + a_{t+1} l_{t+1} of l_t = dL/dh_t, from which all
  gradients follow."""
  chunks, A_ND, before = kept
  dy, dh = cotangents

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
    return (tail, dA + jnp.sum(through * dt[:, None], axis=0)), (dx * dt, ddt, dB, dC)

  def chunk(carry, now):
    inputs, g, first = now
    states = _run(first, inputs, A_ND, 'h')[1]
    carry, gradients = jax.lax.scan(step, carry, (inputs, g, states), reverse=True)
    return carry, tuple(d.astype(a.dtype) for d, a in zip(gradients, inputs, strict=False))

  (dh, dA), gradients = jax.lax.scan(
    chunk, (dh, jnp.zeros_like(A_ND)), (chunks, dy, before), reverse=True
  )
  return (*gradients, jnp.zeros_like(chunks[4])), dA, dh


_chunked.defvjp(_chunked_forward, _chunked_backward)


def selective_scan_chunked(
  u_BTD: Float[Array, 'B T D'],
  dt_BTD: Float[Array, 'B T D'],
  A_DN: Float[Array, 'D N'],
  B_BTN: Float[Array, 'B T N'],
  C_BTN: Float[Array, 'B T N'],
  D_D: Float[Array, ' D'],
  h_BDN: Float[Array, 'B D N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D N']]:
  """The recurrence step by step, with a gradient that keeps the states between chunks alone and
  computes those inside them again: T / `CHUNK` + `CHUNK` states in memory where the naive form's
  gradient stores T, and more than one array of that size."""
  (batch, T, channels), N = u_BTD.shape, A_DN.shape[1]
  length = min(CHUNK, T)
  padding = -T % length  # with a step size of 0 the state stays as it is

  def chunks(a):
    a = jnp.pad(jnp.swapaxes(a, 0, 1), ((0, padding), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, length, *a.shape[1:])

  h = (
    jnp.zeros((batch, N, channels), jnp.float32)
    if h_BDN is None
    else jnp.swapaxes(h_BDN.astype(jnp.float32), 1, 2)
  )
  inputs = (u_BTD, dt_BTD, B_BTN, C_BTN, starts_BT.astype(jnp.float32))
  y, h = _chunked(tuple(chunks(a) for a in inputs), A_DN.astype(jnp.float32).T, h)
  y = jnp.swapaxes(y.reshape(-1, batch, channels)[:T], 0, 1) + D_D.astype(jnp.float32).reshape(
    1, 1, -1
  ) * u_BTD.astype(jnp.float32)
  return y.astype(u_BTD.dtype), jnp.swapaxes(h, 1, 2)


# ---- the choice --------------------------------------------------------------------------------


def _pallas(*arguments):
  """Our own kernel for TPUs; elsewhere it is interpreted, which is slow."""
  return selective_scan_pallas(*arguments, interpret=platform() != 'tpu')


def _order(T: int) -> tuple[str, ...]:
  return ('naive',) if T == 1 else ('pallas',) if platform() == 'tpu' else ('chunked',)


SELECTIVE_SCAN = Operation(
  'selective_scan',
  {
    'naive': Implementation(selective_scan_naive),
    'chunked': Implementation(selective_scan_chunked),
    'pallas': Implementation(_pallas),
  },
  _order,
)


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
  """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t, in every channel (Gu and
  Dao 2023, eq. 2 and algorithm 2).

  The input map is discretised as dt B (Euler), as in the authors' code; eq. 4 of the paper has the
  exact integral.

  Args:
    u_BTD: inputs.
    dt_BTD: step sizes, positive.
    A_DN: rates, negative.
    B_BTN, C_BTN: input and output maps.
    D_D: what of the input passes by.
    h_BDN: the state before the first token; None for zeros.
    starts_BT: True where the state is reset before the token.

  Returns:
    y, like u, and the state after the last token, in fp32, in which all is computed.
  """
  (batch, T, channels), axes = u_BTD.shape, time_axes(u_BTD.shape[1])
  chosen = SELECTIVE_SCAN.choose(T // shards('time', T))

  def run(h, u, dt, A, B, C, D, starts):
    return SELECTIVE_SCAN[chosen](u, dt, A, B, C, D, h, starts)

  def summary(u, dt, A, B, C, D, starts):
    decay = jnp.exp(
      jnp.sum(dt.astype(jnp.float32), axis=1)[..., None] * A.astype(jnp.float32)[None]
    )
    return jnp.where(unbroken(starts)[0][:, None, None], decay, 0.0), run(
      None, u, dt, A, B, C, D, starts
    )[1]

  if axes and h_BDN is None:
    h_BDN = jnp.zeros((batch, channels, A_DN.shape[1]), jnp.float32)
  wide, narrow, state = (
    ('batch', 'time', 'inner'),
    ('batch', 'time', None),
    ('batch', 'inner', None),
  )
  mapped = per_shard(
    over_time(run, summary, scaled, axes),
    (state, wide, wide, ('inner', None), narrow, narrow, ('inner',), ('batch', 'time')),
    wide,
    state,
  )
  y, h = mapped(h_BDN, u_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, starts_BT)
  return y, h
