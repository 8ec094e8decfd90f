"""A recurrence that searches the source at every step: additive attention keyed on the state
before, inside the loop.

The fast form takes the product with the input out of the loop, forgets what a step computes but its
states, which the backward pass computes again (the hidden layer of the attention is S times as
large as they are), and divides rows over a mesh, so that gradients of the weights are summed over
it once and not at every step.

Dims: B batch, T time, S source, D input, C width of the source's vectors, A hidden units of the
  attention, H units, G gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.masks import MASKED
from jaxformer.ops.recurrence import input_gates, lstm_cell, product
from jaxformer.sharding import per_shard

States = tuple[Array, ...]  # (h,) of a GRU, (h, c) of an LSTM


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
  """What is searched.

  Attributes:
    keys_BSA: what is compared, made of every vector m_s once.
    values_BSC: the vectors.
    mask_BS: False where there is padding.
  """

  keys_BSA: Float[Array, 'B S A']
  values_BSC: Float[Array, 'B S C']
  mask_BS: Bool[Array, 'B S']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of the loop: W and b of the input, those of what was read and of the state before, and of the
  attention."""

  w_DGH: Float[Array, 'D G H']
  context_CGH: Float[Array, 'C G H']
  u_HGH: Float[Array, 'H G H']
  b_GH: Float[Array, 'G H'] | None
  query_HA: Float[Array, 'H A']
  v_A: Float[Array, ' A']


def additive_attention(
  h_BH: Float[Array, 'B H'], query_HA: Float[Array, 'H A'], v_A: Float[Array, ' A'], source: Source
) -> tuple[Float[Array, 'B C'], Float[Array, 'B S']]:
  """c = sum_s a_s m_s with a = softmax_s(v . tanh(h W + U m_s)) over the tokens of the source
  (Bahdanau et al. 2014, section 3.1 and appendix A.1.2), both fp32."""
  q_BA = product(h_BH, query_HA)
  hidden = jnp.tanh(q_BA[:, None] + source.keys_BSA.astype(jnp.float32))
  return weighted(jnp.einsum('BSA,A->BS', hidden, v_A.astype(jnp.float32)), source)


def weighted(
  e_BS: Float[Array, 'B S'], source: Source
) -> tuple[Float[Array, 'B C'], Float[Array, 'B S']]:
  """c = sum_s a_s m_s with a = softmax_s(e) over the tokens of the source, both fp32."""
  seen = source.mask_BS
  a = jnp.where(seen, jax.nn.softmax(jnp.where(seen, e_BS, MASKED), axis=-1), 0.0)
  return jnp.einsum('BS,BSC->BC', a, source.values_BSC.astype(jnp.float32)), a


def search(
  x_BTD: Float[Array, 'B T D'],
  weights: Weights,
  source: Source,
  states: States,
  first: States,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B T C'], Float[Array, 'B T S'], States]:
  """c_t = attention(h_{t-1});  h_t = cell(x_t, c_t, h_{t-1}), whose products are x_t W + c_t C +
  h_{t-1} U + b.

  Three gates make the GRU of `ops.recurrence.gru` (Cho et al. 2014; Bahdanau et al. 2014, appendix
  A.2.2), four the LSTM of `ops.recurrence.lstm`. Before a token where `starts_BT` the states are
  `first`.

  Returns all h_t and c_t in the dtype of x, the attention's weights and the last states in fp32.
  """
  if ATTENTIVE_DECODER.choose() == 'naive':
    return search_naive(x_BTD, weights, source, states, first, starts_BT)
  gates = input_gates(x_BTD, weights.w_DGH, weights.b_GH)
  loop = per_shard(
    _loop,
    (
      (None, 'batch', None, None),
      *(None,) * 4,
      *(('batch', None, None),) * 2,
      *(('batch', None),) * 3,
      (None, 'batch'),
    ),
    *((None, 'batch', None),) * 3,
    (None, 'batch', None),
  )
  y, c, a, last = loop(
    gates,
    weights.context_CGH,
    weights.u_HGH,
    weights.query_HA,
    weights.v_A,
    source.keys_BSA,
    source.values_BSC,
    source.mask_BS,
    jnp.concatenate(states, -1),
    jnp.concatenate(first, -1),
    starts_BT.T,
  )
  y, c, a = (jnp.swapaxes(z, 0, 1) for z in (y, c, a))
  return y, c, a, tuple(last)


def _loop(
  gates_TBGH,
  context_CGH,
  u_HGH,
  query_HA,
  v_A,
  keys_BSA,
  values_BSC,
  mask_BS,
  states,
  first,
  starts_TB,
):
  """The loop over time; states come side by side in one array and leave stacked, so that a mesh
  divides them by one rule."""
  H, source = u_HGH.shape[-1], Source(keys_BSA, values_BSC, mask_BS)
  cell, split = (
    _CELLS[u_HGH.shape[1]],
    lambda s: tuple(s[:, i : i + H].astype(jnp.float32) for i in range(0, s.shape[1], H)),
  )
  first = split(first)

  @jax.checkpoint
  def step(states: States, now):
    gates, starts_B = now
    states = begun(starts_B, first, states)
    c, a = additive_attention(states[0], query_HA, v_A, source)
    states = cell(gates.astype(jnp.float32) + product(c, context_CGH), u_HGH, states)
    return states, (states[0].astype(gates.dtype), c.astype(gates.dtype), a)

  last, (y, c, a) = jax.lax.scan(step, split(states), (gates_TBGH, starts_TB))
  return y, c, a, jnp.stack(last)


def search_naive(
  x_BTD: Float[Array, 'B T D'],
  weights: Weights,
  source: Source,
  states: States,
  first: States,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H'], Float[Array, 'B T C'], Float[Array, 'B T S'], States]:
  """`search`, one token after the other."""
  w = jax.tree.map(lambda p: p.astype(jnp.float32), weights)
  b = jnp.zeros(w.w_DGH.shape[1:]) if w.b_GH is None else w.b_GH
  values = source.values_BSC.astype(jnp.float32)
  states, first = (tuple(s.astype(jnp.float32) for s in some) for some in (states, first))

  def step(states: States, now):
    x, starts_B = now
    states = begun(starts_B, first, states)
    h = states[0]
    e = jnp.tanh((h @ w.query_HA)[:, None] + source.keys_BSA) @ w.v_A
    e = jnp.exp(e - e.max(1, keepdims=True)) * source.mask_BS
    a = e / jnp.maximum(e.sum(1, keepdims=True), 1e-30)
    c = (a[:, :, None] * values).sum(1)
    products = [x @ w.w_DGH[:, g] + c @ w.context_CGH[:, g] + b[g][None] for g in range(len(b))]
    if len(b) == 3:
      r, z = (jax.nn.sigmoid(products[g] + h @ w.u_HGH[:, g]) for g in range(2))
      states = (z * h + (1 - z) * jnp.tanh(products[2] + (r * h) @ w.u_HGH[:, 2]),)
    else:
      i, f, g, o = (products[g] + h @ w.u_HGH[:, g] for g in range(4))
      cell = jax.nn.sigmoid(f) * states[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
      states = jax.nn.sigmoid(o) * jnp.tanh(cell), cell
    return states, (states[0], c, a)

  states, outputs = jax.lax.scan(
    step, states, (jnp.swapaxes(x_BTD, 0, 1).astype(jnp.float32), starts_BT.T)
  )
  y, c, a = (jnp.swapaxes(z, 0, 1) for z in outputs)
  return y.astype(x_BTD.dtype), c.astype(x_BTD.dtype), a, states


def begun(starts_B: Array, first: States, states: States) -> States:
  """The states that a step reads: the first ones where a document begins."""
  return tuple(jnp.where(starts_B[:, None], f, s) for f, s in zip(first, states, strict=True))


def _gru(gates_BGH: Array, u_HGH: Array, states: States) -> States:
  (h,) = states
  rz = jax.nn.sigmoid(gates_BGH[:, :2] + product(h, u_HGH[:, :2]))
  r, z = rz[:, 0], rz[:, 1]
  return (z * h + (1 - z) * jnp.tanh(gates_BGH[:, 2] + product(r * h, u_HGH[:, 2:])[:, 0]),)


def _lstm(gates_BGH: Array, u_HGH: Array, states: States) -> States:
  return lstm_cell(gates_BGH + product(states[0], u_HGH), states[1])


ATTENTIVE_DECODER = Operation(
  'attentive_decoder',
  {'naive': Implementation(search_naive), 'scan': Implementation(_loop)},
  lambda: ('scan',),
)

_CELLS: dict[int, Callable[[Array, Array, States], States]] = {3: _gru, 4: _lstm}
