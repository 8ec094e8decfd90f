"""The recurrence of many inputs and many outputs with a diagonal state matrix that does not change
with time (S5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.sequence_parallel import carried, scaled, time_axes, unbroken
from jaxformer.sharding import per_shard


def diagonal_scan(
  v_BTN: Float[Array, 'B T N'],
  log_a_P: Complex[Array, ' P'],
  state_BN: Float[Array, 'B N'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
  *,
  reverse: bool = False,
) -> tuple[Float[Array, 'B T N'], Float[Array, 'B N'] | None]:
  """x_t = exp(log_a) x_{t-1} + v_t for P = N / 2 complex numbers, the real parts of all and then
  the imaginary parts in a real array (Smith et al. 2023, eq. 2, where v_t = Bbar u_t).

  The state is zero before the first token, or `state_BN`, and again where `starts_BT` is True.
  Gives x_BTN and the state after the last token, None where none was given. With `reverse` all is
  read from the end: x_t follows from x_{t+1}, and `starts_BT` says where x_{t+1} is dropped.
  fp32."""
  if axes := time_axes(v_BTN.shape[1]):
    return _over_time(v_BTN, log_a_P, state_BN, starts_BT, axes, reverse)
  if reverse:
    starts = None if starts_BT is None else jnp.flip(starts_BT, 1)
    x_BTN, last = _local(jnp.flip(v_BTN, 1), log_a_P, state_BN, starts)
    return jnp.flip(x_BTN, 1), last
  return _local(v_BTN, log_a_P, state_BN, starts_BT)


def _over_time(v_BTN, log_a_P, state_BN, starts_BT, axes: tuple[str, ...], reverse: bool):
  """On shards of time (`ops.sequence_parallel`): each runs its part from zeros, and then adds what the state
  before it has become."""

  def shard(first_BN, v_BTN, log_re_P, log_im_P, starts_BT):
    log_a, T = jax.lax.complex(log_re_P, log_im_P), v_BTN.shape[1]
    v, starts = (jnp.flip(a, 1) if reverse else a for a in (v_BTN, starts_BT))
    x_BTP = _complex(_local(v, log_a, None, starts)[0])
    age = jnp.arange(1, T + 1, dtype=jnp.float32)[:, None]
    size, angle = jnp.exp(age * log_re_P[None]), age * log_im_P[None]
    power_TP = jax.lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))
    moved = jnp.where(unbroken(starts)[0][:, None], power_TP[-1:], 0.0)
    first, last = carried((moved, x_BTP[:, -1]), _complex(first_BN), scaled, axes, reverse=reverse)
    reached = jnp.cumsum(starts, axis=1) == 0
    x_BTN = _real(x_BTP + jnp.where(reached[..., None], power_TP[None] * first[:, None], 0.0))
    return jnp.flip(x_BTN, 1) if reverse else x_BTN, _real(last)

  (B, T, N), token, state = v_BTN.shape, ('batch', 'time', None), ('batch', None)
  first = jnp.zeros((B, N), jnp.float32) if state_BN is None else state_BN
  starts = jnp.zeros((B, T), bool) if starts_BT is None else starts_BT
  mapped = per_shard(shard, (state, token, (None,), (None,), token[:2]), token, state)
  x_BTN, last = mapped(first, v_BTN, log_a_P.real, log_a_P.imag, starts)
  return x_BTN, None if state_BN is None else last


def _local(v_BTN, log_a_P, state_BN, starts_BT):
  v, x = _complex(v_BTN), None if state_BN is None else _complex(state_BN)
  if DIAGONAL_SCAN.choose() == 'naive':
    x_BTP = scan_naive(v, log_a_P, x, starts_BT)
  else:
    a_BTP = jnp.broadcast_to(jnp.exp(log_a_P)[None, None], v.shape)
    a_BTP = a_BTP if starts_BT is None else jnp.where(starts_BT[..., None], 0.0, a_BTP)
    if x is not None:
      v = v.at[:, 0].add(a_BTP[:, 0] * x)
    x_BTP = _associative(a_BTP, v)
  x_BTN = _real(x_BTP)
  return x_BTN, None if state_BN is None else x_BTN[:, -1]


def scan_naive(
  v_BTP: Complex[Array, 'B T P'],
  log_a_P: Complex[Array, ' P'],
  x_BP: Complex[Array, 'B P'] | None = None,
  starts_BT: Bool[Array, 'B T'] | None = None,
) -> Complex[Array, 'B T P']:
  """One token after the other."""
  B, T, _ = v_BTP.shape
  a_P, first = jnp.exp(log_a_P), jnp.zeros_like(v_BTP[:, 0]) if x_BP is None else x_BP
  starts = jnp.zeros((B, T), bool) if starts_BT is None else starts_BT

  def step(x_BP, now):
    v_BP, starts_B = now
    x_BP = a_P[None] * jnp.where(starts_B[:, None], 0.0, x_BP) + v_BP
    return x_BP, x_BP

  return jnp.swapaxes(jax.lax.scan(step, first, (jnp.swapaxes(v_BTP, 0, 1), starts.T))[1], 0, 1)


@jax.custom_vjp
def _associative(a_BTP: Array, v_BTP: Array) -> Array:
  """x_t = a_t x_{t-1} + v_t as a scan of (a, v) (a', v') = (a a', a' v + v'), in log T steps."""

  def join(first, then):
    return first[0] * then[0], then[0] * first[1] + then[1]

  return jax.lax.associative_scan(join, (a_BTP, v_BTP), axis=1)[1]


def _associative_backward(residuals, g_BTP):
  """The recurrence from the end, with a moved by one: it keeps x alone, where every step of the
  scan would keep its own."""
  a_BTP, x_BTP = residuals
  later = jnp.pad(a_BTP[:, 1:], ((0, 0), (0, 1), (0, 0)))
  dv = _associative(later[:, ::-1], g_BTP[:, ::-1])[:, ::-1]
  return dv * jnp.pad(x_BTP[:, :-1], ((0, 0), (1, 0), (0, 0))), dv


def _associative_forward(a_BTP, v_BTP):
  x_BTP = _associative(a_BTP, v_BTP)
  return x_BTP, (a_BTP, x_BTP)


_associative.defvjp(_associative_forward, _associative_backward)


def _complex(x: Array) -> Array:
  re, im = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jax.lax.complex(re, im)


def _real(z: Array) -> Array:
  return jnp.concatenate([z.real, z.imag], axis=-1)


DIAGONAL_SCAN = Operation(
  'diagonal_scan',
  {'naive': Implementation(scan_naive), 'associative': Implementation(_associative)},
  lambda: ('associative',),
)
