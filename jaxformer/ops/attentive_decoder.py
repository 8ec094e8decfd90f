"""A recurrent decoder with additive attention at every step: the attention is keyed on the state
before, so it stands inside the loop over time (Bahdanau et al. 2014; the bottom layer of GNMT, Wu
et al. 2016).

The fast implementation takes the product with the input out of the loop, keeps only the states of
each step and recomputes the rest in the backward pass (the hidden layer of the attention is S times
as large as they are), and shards rows over a mesh, so that gradients of the weights are reduced
over it once and not at every step.

Dims: B batch, T time, S source, D input, C width of the source's vectors, A hidden units of the
  attention, H units, G gates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import reset
from jaxformer.ops.implementation import Operation
from jaxformer.ops.masks import MASKED
from jaxformer.ops.recurrence import (
  GRU_CELL,
  LSTM_CELL,
  States,
  fp32,
  input_gates,
  lstm_cell,
  product,
)
from jaxformer.ops.sequence_parallel import sharded

# logical axes in loops over time: of what each step reads, of states, of a source
STEPS, ROWS = (None, 'batch', None), ('batch', None)
SOURCE = [('batch', None, None), ('batch', None, None), ROWS]
_CELLS = {3: GRU_CELL, 4: LSTM_CELL}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSource:
  """The encoded source that a decoder attends to.

  Attributes:
    keys_BSA: what the decoder's query is compared with, computed once from the vectors.
    values_BSC: the vectors m_s.
    mask_BS: False where there is padding.
  """

  keys_BSA: Float[Array, 'B S A']
  values_BSC: Float[Array, 'B S C']
  mask_BS: Bool[Array, 'B S']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentiveWeights:
  """Weights of the loop: W and b of the input, those of the attention's output and of the state
  before, and those of the attention."""

  w_DGH: Float[Array, 'D G H']
  context_CGH: Float[Array, 'C G H']
  u_HGH: Float[Array, 'H G H']
  b_GH: Float[Array, 'G H'] | None
  query_HA: Float[Array, 'H A']
  v_A: Float[Array, ' A']


def attentive_decoder(
  x_BTD: Float[Array, 'B T D'],
  weights: AttentiveWeights,
  source: AttentionSource,
  states: States,
  first: States,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B T C'], Float[Array, 'B T S'], States]:
  """c_t = attention(h_{t-1});  h_t = cell(x_t, c_t, h_{t-1}), whose products are x_t W + c_t C +
  h_{t-1} U + b.

  Three gates make the GRU of `ops.recurrence.gru` (Cho et al. 2014; Bahdanau et al. 2014, appendix
  A.2.2), four the LSTM of `ops.recurrence.lstm`. Before a token where `starts_BT` the states are
  `first`.

  Returns all h_t and c_t in the dtype of x, the attention weights and the last states in fp32.
  """
  compute = ATTENTIVE_DECODER[ATTENTIVE_DECODER.choose()]
  *outputs, states = compute(x_BTD, weights, source, states, first, starts_BT)
  y, c, a = (jnp.swapaxes(z, 0, 1) for z in outputs)
  return y, c, a, states


def additive_attention(
  h_BH: Float[Array, 'B H'],
  query_HA: Float[Array, 'H A'],
  v_A: Float[Array, ' A'],
  source: AttentionSource,
) -> tuple[Float[Array, 'B C'], Float[Array, 'B S']]:
  """c = sum_s a_s m_s with a = softmax_s(v . tanh(h W + U m_s)) over the tokens of the source
  (Bahdanau et al. 2014, section 3.1 and appendix A.1.2), both fp32."""
  q_BA = product(h_BH, query_HA)
  hidden = jnp.tanh(q_BA[:, None] + source.keys_BSA.astype(jnp.float32))
  return attend(jnp.einsum('BSA,A->BS', hidden, v_A.astype(jnp.float32)), source)


def attend(
  e_BS: Float[Array, 'B S'], source: AttentionSource
) -> tuple[Float[Array, 'B C'], Float[Array, 'B S']]:
  """c = sum_s a_s m_s with a = softmax_s(e) over the tokens of the source, both fp32."""
  seen = source.mask_BS
  a = jnp.where(seen, jax.nn.softmax(jnp.where(seen, e_BS, MASKED), axis=-1), 0.0)
  return jnp.einsum('BS,BSC->BC', a, source.values_BSC.astype(jnp.float32)), a


def attend_naive(e_BS, source: AttentionSource):
  """`attend`, term by term."""
  e = jnp.exp(e_BS - e_BS.max(1, keepdims=True)) * source.mask_BS
  a = e / jnp.maximum(e.sum(1, keepdims=True), 1e-30)
  return (a[:, :, None] * source.values_BSC.astype(jnp.float32)).sum(1), a


def _scan(x_BTD, weights, source, states, first, starts_BT):
  def loop(gates_TBGH, weights, source, states, first, starts_TB):
    (context_CGH, u_HGH, query_HA, v_A), first = weights, fp32(first)
    cell = _CELLS[u_HGH.shape[1]]

    @jax.checkpoint
    def step(states: States, now):
      gates, starts_B = now
      states = reset(starts_B, states, first)
      c, a = additive_attention(states[0], query_HA, v_A, source)
      gates_fp32 = gates.astype(jnp.float32) + product(c, context_CGH)
      states, _ = cell.step((u_HGH,), gates_fp32, states)
      return states, (states[0].astype(gates.dtype), c.astype(gates.dtype), a)

    last, outputs = jax.lax.scan(step, fp32(states), (gates_TBGH, starts_TB))
    return *outputs, last

  in_axes = ((*STEPS, None), None, SOURCE, ROWS, ROWS, STEPS[:2])
  gates = input_gates(x_BTD, weights.w_DGH, weights.b_GH)
  inside = weights.context_CGH, weights.u_HGH, weights.query_HA, weights.v_A
  mapped = sharded(loop, in_axes, STEPS, STEPS, STEPS, ROWS)
  return mapped(gates, inside, source, tuple(states), tuple(first), starts_BT.T)


def attentive_decoder_naive(x_BTD, weights, source, states, first, starts_BT):
  """`attentive_decoder`, one token after another, time first."""
  w, first = fp32(weights), fp32(tuple(first))
  b = jnp.zeros(w.w_DGH.shape[1:]) if w.b_GH is None else w.b_GH

  def step(states: States, now):
    x, starts_B = now
    states = reset(starts_B, states, first)
    h = states[0]
    c, a = attend_naive(jnp.tanh((h @ w.query_HA)[:, None] + source.keys_BSA) @ w.v_A, source)
    gates = jnp.tensordot(x, w.w_DGH, 1) + jnp.tensordot(c, w.context_CGH, 1) + b[None]
    if len(b) == 3:
      r, z = (jax.nn.sigmoid(gates[:, g] + h @ w.u_HGH[:, g]) for g in range(2))
      states = (z * h + (1 - z) * jnp.tanh(gates[:, 2] + (r * h) @ w.u_HGH[:, 2]),)
    else:
      states = lstm_cell(gates + jnp.tensordot(h, w.u_HGH, 1), states[1])[:2]
    return states, (states[0].astype(x_BTD.dtype), c.astype(x_BTD.dtype), a)

  inputs = fp32(jnp.swapaxes(x_BTD, 0, 1)), starts_BT.T
  states, outputs = jax.lax.scan(step, fp32(tuple(states)), inputs)
  return *outputs, states


ATTENTIVE_DECODER = Operation(
  'attentive_decoder', {'naive': attentive_decoder_naive, 'scan': _scan}, lambda: ('scan',)
)
