"""Input feeding: stacked LSTMs with multiplicative attention on top, whose output the bottom LSTM
reads at the next step (Luong et al. 2015, section 3.3).

So all layers stand in one loop over time. The fast implementation takes the product with the input
out of it, computes one product per layer from the output of the layer below and its own state, and
shards rows over a mesh, so that gradients of the weights are reduced over it once and not at every
step.

Dims: B batch, T time, S source, D input, C width of the source's vectors, L layers, G gates, H
  units, also of the output that is fed back.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.attentive_decoder import (
  ROWS,
  SOURCE,
  STEPS,
  AttentionSource,
  attend,
  attend_naive,
)
from jaxformer.ops.chunks import reset
from jaxformer.ops.implementation import Operation
from jaxformer.ops.recurrence import States, fp32, input_gates, lstm_cell, product
from jaxformer.ops.sequence_parallel import sharded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputFeedingWeights:
  """Weights of the loop.

  Attributes:
    w_DGH: of the bottom layer, for the input.
    below_HGH: of each layer from the bottom up, for the output that is fed back (the bottom one) or
      the output of the layer below.
    u_HGH: of each layer, for its own output of the step before.
    b_GH: of each layer; () for none.
    out_MH: of the attention's output, M = C + H.
  """

  w_DGH: Float[Array, 'D G H']
  below_HGH: tuple[Float[Array, 'H G H'], ...]
  u_HGH: tuple[Float[Array, 'H G H'], ...]
  b_GH: tuple[Float[Array, 'G H'], ...]
  out_MH: Float[Array, 'M H']


def input_feeding(
  x_BTD: Float[Array, 'B T D'],
  weights: InputFeedingWeights,
  source: AttentionSource,
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
    factors_BTN: dropout factors of what each layer reads from below: y_{t-1} and the outputs of all
      layers but the top, side by side, N = L H; None for 1.

  Returns all y_t in the dtype of x, the attention weights and the last states in fp32.
  """
  compute = INPUT_FEEDING[INPUT_FEEDING.choose()]
  factors_TBN = None if factors_BTN is None else jnp.swapaxes(factors_BTN, 0, 1)
  states, first = tuple(states), tuple(first)
  y, a, states = compute(x_BTD, weights, source, states, first, starts_BT.T, factors_TBN)
  return jnp.swapaxes(y, 0, 1), jnp.swapaxes(a, 0, 1), states


def _scan(x_BTD, weights, source, states, first, starts_TB, factors_TBN):
  def loop(gates_TBGH, source, states, first, out_MH, biases, cells, starts_TB, factors_TBN):
    L, first = len(cells), fp32(first)

    def step(states: States, now):
      gates, starts_B, factors_BN = now
      below, *layers = reset(starts_B, states, first)
      others = [gates.astype(jnp.float32)]
      others += [b[None].astype(jnp.float32) for b in biases] or [0.0] * (L - 1)
      for n, factor in enumerate(_factors(factors_BN, L)):
        inputs = jnp.concatenate([below * factor, layers[n]], -1)
        below, layers[L + n], _ = lstm_cell(product(inputs, cells[n]) + others[n], layers[L + n])
        layers[n] = below
      e = jnp.einsum('BH,BSH->BS', below, source.keys_BSA.astype(jnp.float32))
      c, a = attend(e, source)
      y = jnp.tanh(product(jnp.concatenate([c, below], -1), out_MH))
      return (y, *layers), (y.astype(gates.dtype), a)

    inputs = (gates_TBGH, starts_TB, factors_TBN)
    last, (y, a) = jax.lax.scan(step, fp32(states), inputs)
    return y, a, last

  gates = input_gates(x_BTD, weights.w_DGH, weights.b_GH[0] if weights.b_GH else None)
  cells = [jnp.concatenate(pair) for pair in zip(weights.below_HGH, weights.u_HGH, strict=True)]
  in_axes = ((*STEPS, None), SOURCE, ROWS, ROWS, None, None, None, STEPS[:2], STEPS)
  mapped = sharded(loop, in_axes, STEPS, STEPS, ROWS)
  biases = weights.b_GH[1:]
  return mapped(gates, source, states, first, weights.out_MH, biases, cells, starts_TB, factors_TBN)


def _factors(factors_BN, L: int):
  """The dropout factors of what each layer reads from below."""
  return [1.0] * L if factors_BN is None else jnp.split(factors_BN, L, axis=1)


def input_feeding_naive(x_BTD, weights, source, states, first, starts_TB, factors_TBN):
  """`input_feeding`, one token after another, time first."""
  w, first, L = fp32(weights), fp32(first), len(weights.u_HGH)

  def step(states: States, now):
    x, starts_B, factors_BN = now
    below, *layers = reset(starts_B, states, first)
    for n, factor in enumerate(_factors(factors_BN, L)):
      gates = jnp.tensordot(below * factor, w.below_HGH[n], 1)
      gates += jnp.tensordot(layers[n], w.u_HGH[n], 1)
      if w.b_GH:
        gates += w.b_GH[n][None]
      if n == 0:
        gates += jnp.tensordot(x, w.w_DGH, 1)
      below, layers[L + n], _ = lstm_cell(gates, layers[L + n])
      layers[n] = below
    e = jnp.einsum('BH,BSH->BS', below, fp32(source.keys_BSA))
    c, a = attend_naive(e, source)
    y = jnp.tanh(jnp.concatenate([c, below], -1) @ w.out_MH)
    return (y, *layers), (y.astype(x_BTD.dtype), a)

  inputs = (fp32(jnp.swapaxes(x_BTD, 0, 1)), starts_TB, factors_TBN)
  states, (y, a) = jax.lax.scan(step, fp32(states), inputs)
  return y, a, states


INPUT_FEEDING = Operation(
  'input_feeding', {'naive': input_feeding_naive, 'scan': _scan}, lambda: ('scan',)
)
