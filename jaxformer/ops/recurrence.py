"""Gated recurrences: the LSTM and two variants of the GRU.

The fast implementation takes the products with the input out of the loop over time, as one product
for all positions; only the product with the hidden state remains inside. Its backward pass collects
the gradients of the gates and multiplies them with the hidden states once, after the loop, instead
of adding an H x 4H matrix at every step, which also means one all-reduce over a mesh instead of one
per step.

Gates have an axis of their own (`w_DGH`), so that a mesh shards units and not gates. State and
gates are computed in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import reset, scan_steps
from jaxformer.ops.implementation import Operation
from jaxformer.ops.sequence_parallel import over_time, time_axes
from jaxformer.sharding import platform

# The loops are sharded over the rows of the batch only: with the units sharded too, every step
# would wait for the hidden state of the other shards.
_TIMES, _ROWS = ('time', 'batch', None, None), ('batch', None)
States = tuple[Array, ...]  # (h,) of a GRU, (h, c) of an LSTM


def _unroll() -> int:
  """Steps per iteration of the loop. On a CPU the loop costs nothing beside the products, and
  longer bodies are slower."""
  return 1 if platform() == 'cpu' else 4


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def product(x: Array, w: Array) -> Array:
  """x W, accumulated in fp32: [..., G, H] of a W [D, G, H], for every gate, [..., H] of a
  matrix."""
  x = x.astype(w.dtype)
  # plain matrices (ops.linear)
  if platform() == 'cpu' and not (x.ndim == 3 and time_axes(x.shape[0])):
    rows = _matmul(x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1))
    return rows.reshape(*x.shape[:-1], *w.shape[1:])
  return jnp.tensordot(x, w, 1, preferred_element_type=jnp.float32)


def _product_transposed(y_BGH, w_DGH):
  """y W^T, summed over the gates, [B, D], accumulated in fp32."""
  y = y_BGH.astype(w_DGH.dtype)
  if platform() == 'cpu':
    return _matmul(y.reshape(y.shape[0], -1), w_DGH.reshape(w_DGH.shape[0], -1).T)
  return jnp.einsum('BGH,DGH->BD', y, w_DGH, preferred_element_type=jnp.float32)


def _weight_gradient(x_TBD, dy_TBGH, w_DGH):
  """sum_{t, b} x^T dy: the gradient of W, as one product."""
  x, dy = x_TBD.astype(w_DGH.dtype), dy_TBGH.astype(w_DGH.dtype)
  if platform() == 'cpu':
    dw = _matmul(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, w_DGH[0].size)).reshape(w_DGH.shape)
  else:
    dw = jnp.einsum('TBD,TBGH->DGH', x, dy, preferred_element_type=jnp.float32)
  return dw.astype(w_DGH.dtype)


def input_gates(x_BTD: Array, w_DGH: Array, b_GH: Array | None) -> Array:
  """x W + b at all positions, [T, B, G, H], in the dtype of x. Time leads, as the loop reads it."""
  gates = product(jnp.swapaxes(x_BTD, 0, 1), w_DGH)
  return (gates if b_GH is None else gates + b_GH.astype(jnp.float32)[None, None]).astype(
    x_BTD.dtype
  )


def _before(first_BH, all_TBH, starts_TB):
  """The value before each step, [T, B, H] or with more axes: zeros where a document starts."""
  before = jnp.concatenate([first_BH[None].astype(all_TBH.dtype), all_TBH[:-1]])
  starts = starts_TB.reshape(*starts_TB.shape, *(1,) * (before.ndim - 2))
  return jnp.where(starts, jnp.zeros((), all_TBH.dtype), before)


# ---- cells -------------------------------------------------------------------------------------


class Cell(NamedTuple):
  """One step of a recurrence, and its gradient.

  Attributes:
    step: (weights, products with the input [B, G, H], states) -> (states, residuals).
    gradient: (weights, h before the step, residuals, gradients of the states after it) -> (gradient
      of the gates, that of the products with h where it differs, gradients of the states before).
    weight_gradients: (weights, h before each step, gradients of all gates, those of the products
      with h, residuals) -> gradients of the weights.
  """

  step: Callable[..., Any]
  gradient: Callable[..., Any]
  weight_gradients: Callable[..., Any]


def fp32(tree):
  """A pytree in fp32."""
  return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def _unstack(act_BGH):
  return fp32(tuple(act_BGH[:, n] for n in range(act_BGH.shape[1])))


def lstm_cell(
  gates_BGH: Float[Array, 'B 4 H'], c_BH: Float[Array, 'B H']
) -> tuple[Float[Array, 'B H'], Float[Array, 'B H'], States]:
  """(h_t, c_t, activated gates) from x_t W + h_{t-1} U + b and c_{t-1}."""
  i, f, g, o = (gates_BGH[:, n] for n in range(4))
  i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
  c = f * c_BH + i * g
  return o * jnp.tanh(c), c, (i, f, g, o)


def _lstm_step(weights, gates, states):
  (u_HGH,), (h, c) = weights, states
  h, new, act = lstm_cell(gates.astype(jnp.float32) + product(h, u_HGH), c)
  return (h, new), (jnp.stack(act, axis=1).astype(gates.dtype), c)


def _lstm_gradient(weights, _, residuals, dstates):
  (u_HGH,), (act, c), (dh, dc) = weights, residuals, dstates
  i, f, g, o = _unstack(act)
  tanh_c = jnp.tanh(f * c + i * g)
  dc = dc + dh * o * (1 - tanh_c * tanh_c)
  dgates = jnp.stack(
    [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)],
    axis=1,
  )
  return dgates, None, (_product_transposed(dgates, u_HGH), dc * f)


LSTM_CELL = Cell(
  _lstm_step, _lstm_gradient, lambda weights, h, d, *_: (_weight_gradient(h, d, *weights),)
)


def _gru_step(weights, gates, states):
  (u_HGH,), (h,), dtype = weights, states, gates.dtype
  gates = gates.astype(jnp.float32)
  rz = jax.nn.sigmoid(gates[:, :2] + product(h, u_HGH[:, :2]))
  r, z = rz[:, 0], rz[:, 1]
  n = jnp.tanh(gates[:, 2] + product(r * h, u_HGH[:, 2:])[:, 0])
  return (z * h + (1 - z) * n,), (jnp.stack([r, z, n], axis=1).astype(dtype),)


def _gru_gradient(weights, h, residuals, dstates):
  (u_HGH,), (dh,) = weights, dstates
  r, z, n = _unstack(*residuals)
  dn = dh * (1 - z) * (1 - n * n)
  drh = _product_transposed(dn[:, None], u_HGH[:, 2:])
  drz = jnp.stack([drh * h * r * (1 - r), dh * (h - n) * z * (1 - z)], axis=1)
  dgates = jnp.concatenate([drz, dn[:, None]], axis=1)
  return dgates, None, (dh * z + drh * r + _product_transposed(drz, u_HGH[:, :2]),)


def _gru_weights(weights, h_TBH, d_TBGH, _, residuals):
  (u_HGH,), (act_TBGH,) = weights, residuals
  gates = _weight_gradient(h_TBH, d_TBGH[:, :, :2], u_HGH[:, :2])
  candidate = _weight_gradient(h_TBH * act_TBGH[:, :, 0], d_TBGH[:, :, 2:], u_HGH[:, 2:])
  return (jnp.concatenate([gates, candidate], axis=1),)


GRU_CELL = Cell(_gru_step, _gru_gradient, _gru_weights)


def _gru_after_step(weights, gates, states):
  (u_HGH, b_H), (h,), dtype = weights, states, gates.dtype
  gates, hidden = gates.astype(jnp.float32), product(h, u_HGH)
  rz = jax.nn.sigmoid(gates[:, :2] + hidden[:, :2])
  r, z, m = rz[:, 0], rz[:, 1], hidden[:, 2] + b_H[None]
  n = jnp.tanh(gates[:, 2] + r * m)
  return (z * h + (1 - z) * n,), (jnp.stack([r, z, n], axis=1).astype(dtype), m.astype(dtype))


def _gru_after_gradient(weights, h, residuals, dstates):
  (dh,), (act, m) = dstates, residuals
  (r, z, n), m = _unstack(act), fp32(m)
  dn = dh * (1 - z) * (1 - n * n)
  drz = (dn * m * r * (1 - r), dh * (h - n) * z * (1 - z))
  hidden = jnp.stack([*drz, dn * r], axis=1)
  dh = dh * z + _product_transposed(hidden, weights[0])
  return jnp.stack([*drz, dn], axis=1), hidden, (dh,)


def _gru_after_weights(weights, h_TBH, _, hidden_TBGH, residuals):
  db = hidden_TBGH[:, :, 2].astype(jnp.float32).sum((0, 1))
  return _weight_gradient(h_TBH, hidden_TBGH, weights[0]), db


GRU_AFTER_CELL = Cell(_gru_after_step, _gru_after_gradient, _gru_after_weights)


# ---- the loop ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_cells(cell, gates_TBGH, weights, states, starts_TB):
  """(all h, last states) from the products with the input."""
  return _forward(cell, gates_TBGH, weights, states, starts_TB)[0]


def _forward(cell, gates_TBGH, weights, states, starts_TB):
  def step(states, now):
    gates, starts_B = now
    states, residuals = cell.step(weights, gates, reset(starts_B, states))
    return states, (states[0].astype(gates.dtype), residuals)

  last, (y, residuals) = jax.lax.scan(step, states, (gates_TBGH, starts_TB), unroll=_unroll())
  return (y, last), (weights, states[0], starts_TB, y, residuals)


def _backward(cell, saved, cotangents):
  weights, h_BH, starts_TB, y_TBH, residuals = saved
  (dy_TBH, dlast), h_TBH = cotangents, _before(h_BH, y_TBH, starts_TB)

  def step(dstates, now):
    dy, h, residuals, starts_B = now
    dstates = (dstates[0] + dy.astype(jnp.float32), *dstates[1:])
    *d, dstates = cell.gradient(weights, h.astype(jnp.float32), residuals, dstates)
    return reset(starts_B, dstates), jax.tree.map(lambda a: a.astype(y_TBH.dtype), d)

  by_time = (dy_TBH, h_TBH, residuals, starts_TB)
  dstates, d = jax.lax.scan(step, dlast, by_time, reverse=True, unroll=_unroll())
  return d[0], cell.weight_gradients(weights, h_TBH, *d, residuals), dstates, None


scan_cells.defvjp(_forward, _backward)


def _scan(cell, x_BTD, w_DGH, b_GH, weights, states, starts_BT):
  def run(states, gates, weights, starts_TB):
    return scan_cells(cell, gates, weights, states, starts_TB)

  sharded = over_time(run, _ROWS, (_TIMES, None, _TIMES[:2]), _TIMES[:3], mapped=True)
  gates = input_gates(x_BTD, w_DGH, b_GH)
  y_TBH, states = sharded(fp32(states), gates, weights, starts_BT.T)
  return jnp.swapaxes(y_TBH, 0, 1), states


def _scan_naive(step, x_BTD, states, starts_BT):
  """`step(x, *states) -> states`, one token after another."""

  def body(states, x):
    states = step(x, *states)
    return states, states[0]

  y_BTH, last = scan_steps(body, fp32(states), (fp32(x_BTD),), starts_BT)
  return y_BTH.astype(x_BTD.dtype), last


# ---- LSTM --------------------------------------------------------------------------------------


def lstm(
  x_BTD: Float[Array, 'B T D'],
  w_DGH: Float[Array, 'D 4 H'],
  u_HGH: Float[Array, 'H 4 H'],
  b_GH: Float[Array, '4 H'] | None,
  h_BH: Float[Array, 'B H'],
  c_BH: Float[Array, 'B H'],
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H'], tuple[Float[Array, 'B H'], Float[Array, 'B H']]]:
  """The LSTM with a forget gate (Hochreiter and Schmidhuber 1997; Gers et al. 2000; as in Graves
  2013, without peepholes).

    i, f, o = sigmoid(x_t W + h_{t-1} U + b),  g = tanh(x_t W + h_{t-1} U + b)
    c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)

  The order of the gates is i, f, g, o. h and c are zero before a token where `starts_BT`. Returns
  all h_t in the dtype of x, and (h_T, c_T) in fp32."""
  return LSTM[LSTM.choose()](x_BTD, w_DGH, u_HGH, b_GH, h_BH, c_BH, starts_BT)


def lstm_naive(x_BTD, w_DGH, u_HGH, b_GH, h_BH, c_BH, starts_BT):
  """`lstm`, one token after another."""
  w, u = fp32((w_DGH, u_HGH))
  b = jnp.zeros(w.shape[1:]) if b_GH is None else b_GH.astype(jnp.float32)

  def step(x, h, c):
    i, f, g, o = (x @ w[:, n] + h @ u[:, n] + b[n][None] for n in range(4))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c

  return _scan_naive(step, x_BTD, (h_BH, c_BH), starts_BT)


def _lstm_scan(x_BTD, w_DGH, u_HGH, b_GH, h_BH, c_BH, starts_BT):
  return _scan(LSTM_CELL, x_BTD, w_DGH, b_GH, (u_HGH,), (h_BH, c_BH), starts_BT)


LSTM = Operation('lstm', {'naive': lstm_naive, 'scan': _lstm_scan}, lambda: ('scan',))


# ---- GRU ---------------------------------------------------------------------------------------


def gru(
  x_BTD: Float[Array, 'B T D'],
  w_DGH: Float[Array, 'D 3 H'],
  u_HGH: Float[Array, 'H 3 H'],
  b_GH: Float[Array, '3 H'] | None,
  h_BH: Float[Array, 'B H'],
  starts_BT: Bool[Array, 'B T'],
  *,
  after: bool = False,
  b_after_H: Float[Array, ' H'] | None = None,
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B H']]:
  """The gated recurrent unit (Cho et al. 2014, eq. 5 to 8), gates in the order r, z, n.

    r, z = sigmoid(x_t W + h_{t-1} U + b)
    n = tanh(x_t W_n + b_n + (r h_{t-1}) U_n)            as published
    n = tanh(x_t W_n + b_n + r (h_{t-1} U_n + b_after))  with `after` (cuDNN): all products with
                                                         h_{t-1} are then one
    h_t = z h_{t-1} + (1 - z) n

  Bahdanau et al. 2014 write 1 - z for z, which is the same with the weights of z negated. h is zero
  before a token where `starts_BT`. Returns all h_t in the dtype of x, and h_T in fp32."""
  compute = GRU[GRU.choose()]
  y, (h,) = compute(x_BTD, w_DGH, u_HGH, b_GH, h_BH, starts_BT, after=after, b_after_H=b_after_H)
  return y, h


def gru_naive(x_BTD, w_DGH, u_HGH, b_GH, h_BH, starts_BT, *, after=False, b_after_H=None):
  """`gru`, one token after another; the last state as a tuple."""
  w, u = fp32((w_DGH, u_HGH))
  b = jnp.zeros(w.shape[1:]) if b_GH is None else b_GH.astype(jnp.float32)
  b_after = jnp.zeros(w.shape[2:]) if b_after_H is None else b_after_H.astype(jnp.float32)

  def step(x, h):
    r = jax.nn.sigmoid(x @ w[:, 0] + h @ u[:, 0] + b[0][None])
    z = jax.nn.sigmoid(x @ w[:, 1] + h @ u[:, 1] + b[1][None])
    gated = r * (h @ u[:, 2] + b_after[None]) if after else (r * h) @ u[:, 2]
    return (z * h + (1 - z) * jnp.tanh(x @ w[:, 2] + b[2][None] + gated),)

  return _scan_naive(step, x_BTD, (h_BH,), starts_BT)


def _gru_scan(x_BTD, w_DGH, u_HGH, b_GH, h_BH, starts_BT, *, after=False, b_after_H=None):
  cell, weights = GRU_CELL, (u_HGH,)
  if after:
    b_after = jnp.zeros(h_BH.shape[1:]) if b_after_H is None else b_after_H.astype(jnp.float32)
    cell, weights = GRU_AFTER_CELL, (u_HGH, b_after)
  return _scan(cell, x_BTD, w_DGH, b_GH, weights, (h_BH,), starts_BT)


GRU = Operation('gru', {'naive': gru_naive, 'scan': _gru_scan}, lambda: ('scan',))
