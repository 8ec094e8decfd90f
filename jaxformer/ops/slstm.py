"""The sLSTM of xLSTM: a scalar memory per unit with exponential gates, and recurrent weights within
each head (Beck et al. 2024, "xLSTM", section 2.2). For each head, with a row vector h and
preactivations a = x W + h_{t-1} U + b of the gates i, f, z, o,

  c_t = f' c_{t-1} + i' tanh(a_z)
  n_t = f' n_{t-1} + i'
  h_t = sigmoid(a_o) c_t / n_t

where the gates exp(a_i) and sigmoid(a_f) are computed relative to a maximum of their logarithms,

  m_t = max(log sigmoid(a_f) + m_{t-1}, a_i)
  i' = exp(a_i - m_t),  f' = exp(log sigmoid(a_f) + m_{t-1} - m_t)

It scales c and n alike and so has no part in h: gradients take it as a constant. The state before
the first token is zeros, and nothing is remembered of it: a maximum counts only where n > 0. So n
is at least 1 from the first token on, and the quotient needs no eps.

The recurrence is not linear in h: positions follow one another, and sequences whose time is sharded
pass as a pipeline. Heads are independent of each other, and may be sharded.

Dims: B batch, T time, H heads, K channels of a head, and an axis of the four gates i, f, z, o.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_steps
from jaxformer.ops.implementation import Operation
from jaxformer.ops.recurrence import Cell, scan_cells
from jaxformer.ops.sequence_parallel import over_time

States = tuple[Array, Array, Array, Array]  # h, c, n, m
_LOWEST = -1e30  # the maximum before the first token; finite, so that no 0 x inf arises

_STATE = ('batch', 'heads', None)
_GATES = ('time', 'batch', 'heads', None, None)


def slstm(
  gates_BTHGK: Float[Array, 'B T H 4 K'],
  u_HKGK: Float[Array, 'H K 4 K'],
  states: States,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H K'], States]:
  """The recurrence above.

  Args:
    gates_BTHGK: x W + b, in the order i, f, z, o.
    u_HKGK: U of each head.
    states: h, c, n and m before the first position, [B, H, K] each.
    starts_BT: where a packed document starts: the state is zeros before such a position.

  Returns:
    All h_t in the dtype of the gates, and the states after the last position, in fp32.
  """
  run = SLSTM[SLSTM.choose()]
  h, c, n, m = (s.astype(jnp.float32) for s in states)
  return run(gates_BTHGK, u_HKGK, (h, c, n, m), starts_BT)


def slstm_naive(gates_BTHGK, u_HKGK, states: States, starts_BT):
  """The recurrence, one position after another."""
  dtype, u = gates_BTHGK.dtype, u_HKGK.astype(jnp.float32)

  def step(states, gates):
    h, c, n, m = states
    recurrent = jnp.einsum('BHK,HKGJ->BHGJ', h, u)
    i, f, z, o = (gates[:, :, g] + recurrent[:, :, g] for g in range(4))
    before = jax.nn.log_sigmoid(f) + jnp.where(n > 0, m, _LOWEST)
    m = jax.lax.stop_gradient(jnp.maximum(before, i))
    write, keep = jnp.exp(i - m), jnp.exp(before - m)
    c = keep * c + write * jnp.tanh(z)
    n = keep * n + write
    h = jax.nn.sigmoid(o) * c / n
    return (h, c, n, m), h

  h, states = scan_steps(step, states, (gates_BTHGK.astype(jnp.float32),), starts_BT)
  return h.astype(dtype), states


# ---- with the gradients of the weights after the loop ------------------------------------------


def _product(equation: str, *operands: Array) -> Array:
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _step(weights, gates, states):
  (u,), (h, c, n, m) = weights, states
  recurrent = _product('BHK,HKGJ->BHGJ', h.astype(u.dtype), u)
  i, f, z, o = (gates[:, :, g].astype(jnp.float32) + recurrent[:, :, g] for g in range(4))
  before = jax.nn.log_sigmoid(f) + jnp.where(n > 0, m, _LOWEST)
  m = jnp.maximum(before, i)
  write, keep, z, o = jnp.exp(i - m), jnp.exp(before - m), jnp.tanh(z), jax.nn.sigmoid(o)
  activated = jnp.stack([write, keep, z, o, jax.nn.sigmoid(-f)], axis=2).astype(gates.dtype)
  residuals = (activated, c, n)
  c, n = keep * c + write * z, keep * n + write
  return (o * c / n, c, n, m), residuals


def _gradient(weights, h, residuals, dstates):
  # m after the step is a constant; m before it is the scale of c and n before it
  (u,), (activated, c_before, n_before), (dh, dc, dn, _) = weights, residuals, dstates
  write, keep, z, o, not_f = (activated[:, :, g].astype(jnp.float32) for g in range(5))
  c, n = keep * c_before + write * z, keep * n_before + write
  mean = c / n
  dc = dc + dh * o / n
  dn = dn - dh * o * mean / n
  dm = keep * (dc * c_before + dn * n_before)
  dgates = jnp.stack(
    [write * (dc * z + dn), dm * not_f, dc * write * (1 - z * z), dh * mean * o * (1 - o)], axis=2
  )
  dh = _product('BHGJ,HKGJ->BHK', dgates.astype(u.dtype), u)
  return dgates, None, (dh, dc * keep, dn * keep, dm)


def _weight_gradients(weights, h_TBHK, d_TBHGK, _, residuals):
  (u,) = weights
  du = _product('TBHK,TBHGJ->HKGJ', h_TBHK.astype(u.dtype), d_TBHGK.astype(u.dtype))
  return (du.astype(u.dtype),)


SLSTM_CELL = Cell(_step, _gradient, _weight_gradients)


def slstm_scan(gates_BTHGK, u_HKGK, states: States, starts_BT):
  """One step after another, with the products of the gradient of U as one after the loop."""

  def run(states, gates, weights, starts_TB):
    return scan_cells(SLSTM_CELL, gates, weights, states, starts_TB)

  axes = (_GATES, ('heads', None, None, None), _GATES[:2])
  sharded = over_time(run, _STATE, axes, _GATES[:4], mapped=True)
  h_TBHK, states = sharded(states, jnp.swapaxes(gates_BTHGK, 0, 1), (u_HKGK,), starts_BT.T)
  return jnp.swapaxes(h_TBHK, 0, 1), states


SLSTM = Operation('slstm', {'naive': slstm_naive, 'scan': slstm_scan}, lambda: ('scan',))
