"""LSTMs one on the other with multiplicative attention on top, whose output the bottom one reads at
the next step: input feeding.

So all of them stand in one loop over time. The fast form takes the product with the input out of
it, makes one product of what a layer reads of the one below and of its own state, and divides rows
over a mesh, so that gradients of the weights are summed over it once and not at every step.

Dims: B batch, T time, S source, D input, C width of the source's vectors, L layers, G gates, H
  units, also of what is fed back.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.attentive_decoder import Source, States, begun, weighted
from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.recurrence import input_gates, lstm_cell, product
from jaxformer.sharding import per_shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of the loop.

  Attributes:
    w_DGH: of the bottom layer, for the input.
    below_HGH: of each layer from the bottom up, for what is fed back (the bottom one) or the output
      of the layer below.
    u_HGH: of each layer, for its own output of the step before.
    b_GH: of each layer; () for none.
    out_MH: of the attention's output, M = C + H.
  """

  w_DGH: Float[Array, 'D G H']
  below_HGH: tuple[Float[Array, 'H G H'], ...]
  u_HGH: tuple[Float[Array, 'H G H'], ...]
  b_GH: tuple[Float[Array, 'G H'], ...]
  out_MH: Float[Array, 'M H']


def feed(
  x_BTD: Float[Array, 'B T D'],
  weights: Weights,
  source: Source,
  states: States,
  first: States,
  starts_BT: Bool[Array, 'B T'],
  factors_BTN: Float[Array, 'B T N'] | None = None,
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B T S'], States]:
  """h^1_t = LSTM([x_t, y_{t-1}]);  h^l_t = LSTM(h^{l-1}_t);  y_t = tanh([c_t, h^L_t] W), c_t =
  sum_s a_s m_s, where a = softmax_s(h^L_t . key_s) over the tokens of the source (Luong et al.
  2015, eq. 5 and 7, sections 3.1 and 3.3).

  Args:
    states, first: y, then h of all layers from the bottom up, then c of all; of the step before,
      and before a token where `starts_BT`.
    factors_BTN: by which what layers read of below is multiplied (dropout): y_{t-1} and the outputs
      of all layers but the top, side by side, N = L H; None for 1.

  Returns all y_t in the dtype of x, the attention's weights and the last states in fp32.
  """
  if INPUT_FEEDING.choose() == 'naive':
    return feed_naive(x_BTD, weights, source, states, first, starts_BT, factors_BTN)
  L = len(weights.u_HGH)
  gates = input_gates(x_BTD, weights.w_DGH, weights.b_GH[0] if weights.b_GH else None)
  b_KGH = jnp.stack(weights.b_GH[1:]) if len(weights.b_GH) > 1 else None
  cells = [jnp.concatenate(pair) for pair in zip(weights.below_HGH, weights.u_HGH, strict=True)]
  factors_TBN = None if factors_BTN is None else jnp.swapaxes(factors_BTN, 0, 1)
  in_time = (None, 'batch', None)
  loop = per_shard(
    _loop,
    (
      (*in_time, None),
      in_time,
      (None, 'batch'),
      *(('batch', None, None),) * 2,
      *(('batch', None),) * 3,
      None,
      None,
      *(None,) * L,
    ),
    in_time,
    in_time,
    ('batch', None),
  )
  y, a, last = loop(
    gates,
    factors_TBN,
    starts_BT.T,
    source.keys_BSA,
    source.values_BSC,
    source.mask_BS,
    jnp.concatenate(states, -1),
    jnp.concatenate(first, -1),
    weights.out_MH,
    b_KGH,
    *cells,
  )
  return jnp.swapaxes(y, 0, 1), jnp.swapaxes(a, 0, 1), _split(last, 2 * L + 1)


def _split(states: Array, parts: int) -> States:
  """Of states side by side."""
  return tuple(jnp.split(states.astype(jnp.float32), parts, axis=-1))


def _loop(
  gates_TBGH,
  factors_TBN,
  starts_TB,
  keys_BSA,
  values_BSC,
  mask_BS,
  states,
  first,
  out_MH,
  b_KGH,
  *cells,
):
  """The loop over time; states come and leave side by side in one array, so that a mesh divides
  them by one rule."""
  L, source = len(cells), Source(keys_BSA, values_BSC, mask_BS)
  first = _split(first, 2 * L + 1)

  def step(states: States, now):
    gates, starts_B, factors_BN = now
    below, *layers = begun(starts_B, first, states)
    hs, cs = [], []
    for n, w, h, c in zip(range(L), cells, layers[:L], layers[L:], strict=True):
      if factors_BN is not None:
        below = below * factors_BN[:, n * below.shape[-1] : (n + 1) * below.shape[-1]]
      beside = (
        gates.astype(jnp.float32)
        if n == 0
        else 0.0
        if b_KGH is None
        else b_KGH[n - 1][None].astype(jnp.float32)
      )
      below, c = lstm_cell(product(jnp.concatenate([below, h], -1), w) + beside, c)
      hs.append(below)
      cs.append(c)
    read, a = weighted(jnp.einsum('BH,BSH->BS', below, source.keys_BSA.astype(jnp.float32)), source)
    y = jnp.tanh(product(jnp.concatenate([read, below], -1), out_MH))
    return (y, *hs, *cs), (y.astype(gates.dtype), a)

  last, (y, a) = jax.lax.scan(step, _split(states, 2 * L + 1), (gates_TBGH, starts_TB, factors_TBN))
  return y, a, jnp.concatenate(last, -1)


def feed_naive(
  x_BTD: Float[Array, 'B T D'],
  weights: Weights,
  source: Source,
  states: States,
  first: States,
  starts_BT: Bool[Array, 'B T'],
  factors_BTN: Float[Array, 'B T N'] | None = None,
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B T S'], States]:
  """`feed`, one token after the other."""
  w = jax.tree.map(lambda p: p.astype(jnp.float32), weights)
  values, keys = source.values_BSC.astype(jnp.float32), source.keys_BSA.astype(jnp.float32)
  states, first = (tuple(s.astype(jnp.float32) for s in some) for some in (states, first))
  L = len(w.u_HGH)

  def step(states: States, now):
    x, starts_B, factors_BN = now
    y, *layers = begun(starts_B, first, states)
    inputs = [y] if factors_BN is None else [y * factors_BN[:, : y.shape[-1]]]
    for n, (below, u, b) in enumerate(itertools.zip_longest(w.below_HGH, w.u_HGH, w.b_GH)):
      i, f, g, o = (
        inputs[-1] @ below[:, k]
        + layers[n] @ u[:, k]
        + (0.0 if b is None else b[k][None])
        + (x @ w.w_DGH[:, k] if n == 0 else 0.0)
        for k in range(4)
      )
      layers[L + n] = jax.nn.sigmoid(f) * layers[L + n] + jax.nn.sigmoid(i) * jnp.tanh(g)
      layers[n] = jax.nn.sigmoid(o) * jnp.tanh(layers[L + n])
      H = layers[n].shape[-1]
      inputs.append(
        layers[n]
        if factors_BN is None or n == L - 1
        else layers[n] * factors_BN[:, (n + 1) * H : (n + 2) * H]
      )
    e = jnp.einsum('BH,BSH->BS', inputs[-1], keys)
    e = jnp.exp(e - e.max(1, keepdims=True)) * source.mask_BS
    a = e / jnp.maximum(e.sum(1, keepdims=True), 1e-30)
    y = jnp.tanh(jnp.concatenate([(a[:, :, None] * values).sum(1), inputs[-1]], -1) @ w.out_MH)
    return (y, *layers), (y, a)

  in_time = [
    None if z is None else jnp.swapaxes(z, 0, 1)
    for z in (x_BTD.astype(jnp.float32), starts_BT, factors_BTN)
  ]
  states, (y, a) = jax.lax.scan(step, states, tuple(in_time))
  return jnp.swapaxes(y, 0, 1).astype(x_BTD.dtype), jnp.swapaxes(a, 0, 1), states


INPUT_FEEDING = Operation(
  'input_feeding',
  {'naive': Implementation(feed_naive), 'scan': Implementation(_loop)},
  lambda: ('scan',),
)
