"""Gated recurrences: the LSTM and two forms of the GRU.

The fast forms take the products with the input out of the loop over time, as one product for all
positions; inside stays what
has to: the product with the hidden state. Their backward passes collect the gradients of the gates
  and multiply them with the
hidden states once, after the loop, instead of adding an H x 4H matrix at every step, which also
means one sum over a mesh instead of one a step.

Gates are an axis of their own (`w_DGH`), so that a mesh divides units and not gates. State and
gates are computed in fp32."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.sequence_parallel import in_turn, time_axes
from jaxformer.sharding import per_shard, platform

# A mesh divides the loops by rows alone: with the units divided too, every step would wait for the
# hidden state of the others.
_TIMES, _ROWS = ('time', 'batch', None, None), ('batch', None)


def _unroll() -> int:
  """Steps in one iteration of the loop. On a CPU the loop costs nothing beside the products, and
  longer bodies run slower."""
  return 1 if platform() == 'cpu' else 4


def _matmul(a: Array, b: Array) -> Array:
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


def _product_transposed(y_BGH: Array, w_DGH: Array) -> Array:
  """y W^T, summed over the gates, [B, D], accumulated in fp32."""
  y = y_BGH.astype(w_DGH.dtype)
  if platform() == 'cpu':
    return _matmul(y.reshape(y.shape[0], -1), w_DGH.reshape(w_DGH.shape[0], -1).T)
  return jnp.einsum('BGH,DGH->BD', y, w_DGH, preferred_element_type=jnp.float32)


def _weight_gradient(x_TBD: Array, dy_TBGH: Array, w_DGH: Array) -> Array:
  """sum_{t, b} x^T dy: the gradient of W, as one product."""
  x, dy = x_TBD.astype(w_DGH.dtype), dy_TBGH.astype(w_DGH.dtype)
  if platform() == 'cpu':
    dw = _matmul(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, w_DGH[0].size)).reshape(w_DGH.shape)
  else:
    dw = jnp.einsum('TBD,TBGH->DGH', x, dy, preferred_element_type=jnp.float32)
  return dw.astype(w_DGH.dtype)


def input_gates(x_BTD: Array, w_DGH: Array, b_GH: Array | None) -> Array:
  """x W + b at all positions, [T, B, G, H], in the dtype of x: time leads, as the loop reads it."""
  gates = product(jnp.swapaxes(x_BTD, 0, 1), w_DGH)
  return (gates if b_GH is None else gates + b_GH.astype(jnp.float32)[None, None]).astype(
    x_BTD.dtype
  )


def _before(first_BH: Array, all_TBH: Array, starts_TB: Array) -> Array:
  """What stood before each step, [T, B, H]: zeros where a document begins."""
  before = jnp.concatenate([first_BH[None].astype(all_TBH.dtype), all_TBH[:-1]])
  return jnp.where(starts_TB[..., None], jnp.zeros((), all_TBH.dtype), before)


def _kept(starts_B: Array, *states_BH: Array) -> tuple[Array, ...]:
  """States as the step reads them: zeros where a document begins."""
  return tuple(jnp.where(starts_B[:, None], 0.0, s) for s in states_BH)


def _over_time(loop: Any, weights: int, states: int, axes: tuple[str, ...]) -> Any:
  """`loop(gates, *weights, *states, starts) -> (y, *states)` on a mesh, shards of time in turn
  (`ops.sequence_parallel.in_turn`)."""

  def shard(gates_TBGH, *rest):
    kept, first, starts_TB = rest[:weights], rest[weights:-1], rest[-1]

    def run(state, gates_TBGH, starts_TB):
      y_TBH, *last = loop(gates_TBGH, *kept, *state, starts_TB)
      return y_TBH, tuple(last)

    y_TBH, last = in_turn(run, first, (gates_TBGH, starts_TB), axes)
    return y_TBH, *last

  rows = (_ROWS,) * states
  return per_shard(
    shard if axes else loop, (_TIMES, *(None,) * weights, *rows, _TIMES[:2]), _TIMES[:3], *rows
  )


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
  """The LSTM with a forget gate (Hochreiter and Schmidhuber 1997; Gers et al. 2000; in the form of
  Graves 2013 without peepholes).

  i, f, o = sigmoid(x_t W + h_{t-1} U + b),  g = tanh(x_t W + h_{t-1} U + b)   gates in the order i,
  f, g, o c_t = f c_{t-1} + i g,  h_t = o tanh(c_t)

  h and c are zero before a token where `starts_BT`. Returns all h_t in the dtype of x, and (h_T,
  c_T) in fp32."""
  if LSTM.choose() == 'naive':
    return lstm_naive(x_BTD, w_DGH, u_HGH, b_GH, h_BH, c_BH, starts_BT)
  gates = input_gates(x_BTD, w_DGH, b_GH)
  loop = _over_time(_lstm_loop, 1, 2, time_axes(len(gates)))
  y_TBH, h, c = loop(gates, u_HGH, h_BH.astype(jnp.float32), c_BH.astype(jnp.float32), starts_BT.T)
  return jnp.swapaxes(y_TBH, 0, 1), (h, c)


def lstm_naive(
  x_BTD: Float[Array, 'B T D'],
  w_DGH: Float[Array, 'D 4 H'],
  u_HGH: Float[Array, 'H 4 H'],
  b_GH: Float[Array, '4 H'] | None,
  h_BH: Float[Array, 'B H'],
  c_BH: Float[Array, 'B H'],
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H'], tuple[Float[Array, 'B H'], Float[Array, 'B H']]]:
  """`lstm`, one token after the other."""
  w, u = w_DGH.astype(jnp.float32), u_HGH.astype(jnp.float32)
  b = jnp.zeros(w.shape[1:]) if b_GH is None else b_GH.astype(jnp.float32)

  def step(carry, now):
    x, starts_B = now
    h, c = (jnp.where(starts_B[:, None], 0.0, s) for s in carry)
    i, f, g, o = (x @ w[:, n] + h @ u[:, n] + b[n][None] for n in range(4))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  first = (h_BH.astype(jnp.float32), c_BH.astype(jnp.float32))
  last, y_TBH = jax.lax.scan(
    step, first, (jnp.swapaxes(x_BTD, 0, 1).astype(jnp.float32), starts_BT.T)
  )
  return jnp.swapaxes(y_TBH, 0, 1).astype(x_BTD.dtype), last


def _lstm_activations(gates_BGH: Array) -> Array:
  i, f, g, o = (gates_BGH[:, n] for n in range(4))
  return jnp.stack([jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)], axis=1)


def lstm_cell(
  gates_BGH: Float[Array, 'B 4 H'], c_BH: Float[Array, 'B H']
) -> tuple[Float[Array, 'B H'], Float[Array, 'B H']]:
  """(h_t, c_t) from x_t W + h_{t-1} U + b and c_{t-1}: for decoders whose input depends on h_{t-1}
  by other ways too."""
  i, f, g, o = (gates_BGH[:, n] for n in range(4))
  c = jax.nn.sigmoid(f) * c_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _lstm_step(u_HGH: Array, carry: tuple[Array, Array], now: tuple[Array, Array]):
  """One step: the new carry, and (h, activated gates, c before)."""
  gates, starts_B = now
  h, c = _kept(starts_B, *carry)
  act = _lstm_activations(gates.astype(jnp.float32) + product(h, u_HGH))
  new = act[:, 1] * c + act[:, 0] * act[:, 2]
  h = act[:, 3] * jnp.tanh(new)
  return (h, new), (h.astype(gates.dtype), act.astype(gates.dtype), c)


@jax.custom_vjp
def _lstm_loop(
  gates_TBGH: Array, u_HGH: Array, h_BH: Array, c_BH: Array, starts_TB: Array
) -> tuple[Array, Array, Array]:
  """(all h, last h, last c) from the products with the input."""

  def step(carry, now):
    carry, (h, _, _) = _lstm_step(u_HGH, carry, now)
    return carry, h

  (h, c), y_TBH = jax.lax.scan(step, (h_BH, c_BH), (gates_TBGH, starts_TB), unroll=_unroll())
  return y_TBH, h, c


def _lstm_forward(gates_TBGH: Array, u_HGH: Array, h_BH: Array, c_BH: Array, starts_TB: Array):
  (h, c), (y, act, before) = jax.lax.scan(
    functools.partial(_lstm_step, u_HGH), (h_BH, c_BH), (gates_TBGH, starts_TB), unroll=_unroll()
  )
  return (y, h, c), (u_HGH, h_BH, starts_TB, y, act, before)


def _lstm_backward(kept: Any, cotangents: tuple[Array, Array, Array]):
  u_HGH, h_BH, starts_TB, y_TBH, act_TBGH, c_TBH = kept
  dy_TBH, dh_BH, dc_BH = cotangents

  def step(carry, now):
    dh, dc = carry
    dy, act, c, starts_B = now
    dh = dh + dy.astype(jnp.float32)
    i, f, g, o = (act[:, n].astype(jnp.float32) for n in range(4))
    tanh_c = jnp.tanh(f * c + i * g)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dgates = jnp.stack(
      [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)],
      axis=1,
    )
    carry = _kept(starts_B, _product_transposed(dgates, u_HGH), dc * f)
    return carry, dgates.astype(act.dtype)

  (dh, dc), dgates_TBGH = jax.lax.scan(
    step, (dh_BH, dc_BH), (dy_TBH, act_TBGH, c_TBH, starts_TB), reverse=True, unroll=_unroll()
  )
  return (
    dgates_TBGH,
    _weight_gradient(_before(h_BH, y_TBH, starts_TB), dgates_TBGH, u_HGH),
    dh,
    dc,
    None,
  )


_lstm_loop.defvjp(_lstm_forward, _lstm_backward)


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

  r, z = sigmoid(x_t W + h_{t-1} U + b) n = tanh(x_t W_n + b_n + (r h_{t-1}) U_n)            as
  published n = tanh(x_t W_n + b_n + r (h_{t-1} U_n + b_after))  with `after` (cuDNN): all products
  with h_{t-1} are then one h_t = z h_{t-1} + (1 - z) n

  Bahdanau et al. 2014 write 1 - z for z, which is the same with the weights of z negated. h is zero
  before a token where `starts_BT`. Returns all h_t in the dtype of x, and h_T in fp32."""
  if GRU.choose() == 'naive':
    return gru_naive(x_BTD, w_DGH, u_HGH, b_GH, h_BH, starts_BT, after=after, b_after_H=b_after_H)
  gates, h_BH = input_gates(x_BTD, w_DGH, b_GH), h_BH.astype(jnp.float32)
  if after:
    b_after = jnp.zeros(h_BH.shape[1:]) if b_after_H is None else b_after_H.astype(jnp.float32)
    loop = _over_time(_gru_after_loop, 2, 1, time_axes(len(gates)))
    y_TBH, h = loop(gates, u_HGH, b_after, h_BH, starts_BT.T)
  else:
    loop = _over_time(_gru_loop, 1, 1, time_axes(len(gates)))
    y_TBH, h = loop(gates, u_HGH, h_BH, starts_BT.T)
  return jnp.swapaxes(y_TBH, 0, 1), h


def gru_naive(
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
  """`gru`, one token after the other."""
  w, u = w_DGH.astype(jnp.float32), u_HGH.astype(jnp.float32)
  b = jnp.zeros(w.shape[1:]) if b_GH is None else b_GH.astype(jnp.float32)
  b_after = jnp.zeros(w.shape[2:]) if b_after_H is None else b_after_H.astype(jnp.float32)

  def step(h, now):
    x, starts_B = now
    h = jnp.where(starts_B[:, None], 0.0, h)
    r = jax.nn.sigmoid(x @ w[:, 0] + h @ u[:, 0] + b[0][None])
    z = jax.nn.sigmoid(x @ w[:, 1] + h @ u[:, 1] + b[1][None])
    gated = r * (h @ u[:, 2] + b_after[None]) if after else (r * h) @ u[:, 2]
    h = z * h + (1 - z) * jnp.tanh(x @ w[:, 2] + b[2][None] + gated)
    return h, h

  inputs = (jnp.swapaxes(x_BTD, 0, 1).astype(jnp.float32), starts_BT.T)
  last, y_TBH = jax.lax.scan(step, h_BH.astype(jnp.float32), inputs)
  return jnp.swapaxes(y_TBH, 0, 1).astype(x_BTD.dtype), last


def _gru_scan(step: Any, gates_TBGH: Array, h_BH: Array, starts_TB: Array):
  """(last h, (all h, what else `step` keeps)); `step(h, gates)` gives the activated gates, and what
  it keeps."""

  def run(h, now):
    gates, starts_B = now
    (h,) = _kept(starts_B, h)
    r, z, n, kept = step(h, gates.astype(jnp.float32))
    h = z * h + (1 - z) * n
    act = jnp.stack([r, z, n], axis=1).astype(gates.dtype)
    return h, (h.astype(gates.dtype), act, jax.tree.map(lambda k: k.astype(gates.dtype), kept))

  return jax.lax.scan(run, h_BH, (gates_TBGH, starts_TB), unroll=_unroll())


def _gru_step(u_HGH: Array):
  gates_of, candidate_of = u_HGH[:, :2], u_HGH[:, 2:]

  def step(h, gates):
    rz = jax.nn.sigmoid(gates[:, :2] + product(h, gates_of))
    r, z = rz[:, 0], rz[:, 1]
    return r, z, jnp.tanh(gates[:, 2] + product(r * h, candidate_of)[:, 0]), ()

  return step


def _gru_after_step(u_HGH: Array, b_H: Array):
  def step(h, gates):
    hidden = product(h, u_HGH)
    rz = jax.nn.sigmoid(gates[:, :2] + hidden[:, :2])
    r, z, m = rz[:, 0], rz[:, 1], hidden[:, 2] + b_H[None]
    return r, z, jnp.tanh(gates[:, 2] + r * m), m

  return step


@jax.custom_vjp
def _gru_loop(
  gates_TBGH: Array, u_HGH: Array, h_BH: Array, starts_TB: Array
) -> tuple[Array, Array]:
  h, (y_TBH, _, _) = _gru_scan(_gru_step(u_HGH), gates_TBGH, h_BH, starts_TB)
  return y_TBH, h


def _gru_forward(gates_TBGH: Array, u_HGH: Array, h_BH: Array, starts_TB: Array):
  h, (y_TBH, act, _) = _gru_scan(_gru_step(u_HGH), gates_TBGH, h_BH, starts_TB)
  return (y_TBH, h), (u_HGH, h_BH, starts_TB, y_TBH, act)


def _gru_backward(kept: Any, cotangents: tuple[Array, Array]):
  u_HGH, h_BH, starts_TB, y_TBH, act_TBGH = kept
  gates_of, candidate_of = u_HGH[:, :2], u_HGH[:, 2:]
  before_TBH = _before(h_BH, y_TBH, starts_TB)

  def step(dh, now):
    dy, act, h, starts_B = now
    dh, h = dh + dy.astype(jnp.float32), h.astype(jnp.float32)
    r, z, n = (act[:, i].astype(jnp.float32) for i in range(3))
    dn = dh * (1 - z) * (1 - n * n)
    drh = _product_transposed(dn[:, None], candidate_of)
    drz = jnp.stack([drh * h * r * (1 - r), dh * (h - n) * z * (1 - z)], axis=1)
    (dh,) = _kept(starts_B, dh * z + drh * r + _product_transposed(drz, gates_of))
    return dh, jnp.concatenate([drz, dn[:, None]], axis=1).astype(act.dtype)

  dh, d_TBGH = jax.lax.scan(
    step,
    cotangents[1],
    (cotangents[0], act_TBGH, before_TBH, starts_TB),
    reverse=True,
    unroll=_unroll(),
  )
  du = jnp.concatenate(
    [
      _weight_gradient(before_TBH, d_TBGH[:, :, :2], gates_of),
      _weight_gradient(before_TBH * act_TBGH[:, :, 0], d_TBGH[:, :, 2:], candidate_of),
    ],
    axis=1,
  )
  return d_TBGH, du, dh, None


_gru_loop.defvjp(_gru_forward, _gru_backward)


@jax.custom_vjp
def _gru_after_loop(
  gates_TBGH: Array, u_HGH: Array, b_H: Array, h_BH: Array, starts_TB: Array
) -> tuple[Array, Array]:
  h, (y_TBH, _, _) = _gru_scan(_gru_after_step(u_HGH, b_H), gates_TBGH, h_BH, starts_TB)
  return y_TBH, h


def _gru_after_forward(gates_TBGH: Array, u_HGH: Array, b_H: Array, h_BH: Array, starts_TB: Array):
  h, (y_TBH, act, m) = _gru_scan(_gru_after_step(u_HGH, b_H), gates_TBGH, h_BH, starts_TB)
  return (y_TBH, h), (u_HGH, h_BH, starts_TB, y_TBH, act, m)


def _gru_after_backward(kept: Any, cotangents: tuple[Array, Array]):
  u_HGH, h_BH, starts_TB, y_TBH, act_TBGH, m_TBH = kept
  before_TBH = _before(h_BH, y_TBH, starts_TB)

  def step(dh, now):
    dy, act, m, h, starts_B = now
    dh, h, m = dh + dy.astype(jnp.float32), h.astype(jnp.float32), m.astype(jnp.float32)
    r, z, n = (act[:, i].astype(jnp.float32) for i in range(3))
    dn = dh * (1 - z) * (1 - n * n)
    drz = (dn * m * r * (1 - r), dh * (h - n) * z * (1 - z))
    hidden = jnp.stack([*drz, dn * r], axis=1)
    (dh,) = _kept(starts_B, dh * z + _product_transposed(hidden, u_HGH))
    return dh, (jnp.stack([*drz, dn], axis=1).astype(act.dtype), hidden.astype(act.dtype))

  dh, (d_TBGH, hidden_TBGH) = jax.lax.scan(
    step,
    cotangents[1],
    (cotangents[0], act_TBGH, m_TBH, before_TBH, starts_TB),
    reverse=True,
    unroll=_unroll(),
  )
  db = hidden_TBGH[:, :, 2].astype(jnp.float32).sum((0, 1))
  return d_TBGH, _weight_gradient(before_TBH, hidden_TBGH, u_HGH), db, dh, None


_gru_after_loop.defvjp(_gru_after_forward, _gru_after_backward)


LSTM = Operation(
  'lstm',
  {'naive': Implementation(lstm_naive), 'scan': Implementation(_lstm_loop)},
  lambda: ('scan',),
)
GRU = Operation(
  'gru', {'naive': Implementation(gru_naive), 'scan': Implementation(_gru_loop)}, lambda: ('scan',)
)
