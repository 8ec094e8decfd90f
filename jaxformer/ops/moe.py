"""A mixture of experts, once it is known which token goes where: pure functions, on any mesh.

`dropless` computes every choice of every token; `placed` the tokens in the places of each expert,
of which there is a fixed number; `moe_naive` is what both mean.

On a mesh the experts are divided over the axis of `experts` (and their hidden units over that of
`mlp`), the sequences over several
axes, that one among them: tokens then travel to their experts by all-to-all and back, and no
  expert's weights travel over it. Where
too few sequences are divided (decoding), every shard has all tokens, computes its experts' part,
and the parts are summed.

Dims: N tokens of a shard, E experts, K experts a token, C places, P (token, expert) pairs, D width,
  F hidden units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxformer.ops.grouped_matmul import grouped_matmul
from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.sequence_parallel import time_axes
from jaxformer.sharding import all_mesh_axes, mesh_axes, per_shard, shards

Activation = Callable[[Array], Array]

# of a round of `dropless` over shards: places in a bucket, relative to those that balanced routing
# needs
SLACK = 1.25


class Experts(NamedTuple):
  """Weights of the feed-forward layers, stacked: y = h W_out with h = act(x W_in), or act(x W_gate)
  * x W_in where there is a gate."""

  w_in: Float[Array, 'E D F']
  w_gate: Float[Array, 'E D F'] | None
  w_out: Float[Array, 'E F D']


def moe_naive(
  x_BTD: Float[Array, 'B T D'],
  token_BP: Int[Array, 'B P'],
  expert_BP: Int[Array, 'B P'],
  weight_BP: Float[Array, 'B P'],
  experts: Experts,
  activation: Activation,
) -> Float[Array, 'B T D']:
  """y_t = sum over the pairs (t, e, weight) of weight * expert_e(x_t), pair by pair, each with its
  own copy of its expert's weights."""

  def one(x_TD, token, expert, weight):
    x, w_in, w_out = x_TD[token], experts.w_in[expert], experts.w_out[expert]
    if experts.w_gate is None:
      hidden = activation(x @ w_in)
    else:
      hidden = activation(x @ experts.w_gate[expert]) * (x @ w_in)
    return weight * (hidden @ w_out).astype(jnp.float32)

  y_BPD = jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(x_BTD, token_BP, expert_BP, weight_BP)
  row = jnp.arange(x_BTD.shape[0])[:, None]
  return jnp.zeros(x_BTD.shape, jnp.float32).at[row, token_BP].add(y_BPD).astype(x_BTD.dtype)


# ---- every choice of every token ---------------------------------------------------------------


def dropless(
  x_BTD: Float[Array, 'B T D'],
  expert_BTK: Int[Array, 'B T K'],
  weight_BTK: Float[Array, 'B T K'],
  experts: Experts,
  activation: Activation,
) -> Float[Array, 'B T D']:
  """y_t = sum_k weight_tk * expert_(expert_tk)(x_t): pairs sorted by expert and multiplied as
  groups (`ops.grouped_matmul`), so that FLOPs are those of the chosen experts, however unequal
  their loads (Gale et al. 2022).

  On shards of the experts, tokens travel in rounds. In one, each shard sends every other a bucket
  of at most c = `SLACK` N K / shards rows; there are as many rounds as the fullest bucket needs,
  one where routing is about balanced. So nothing is dropped, memory is that of one round, and
  traffic grows only with the imbalance. The gradient goes through the same rounds and computes the
  experts' hidden units again."""
  B, T, K = expert_BTK.shape
  if MOE_DROPLESS.choose() == 'naive':
    token_BP = jnp.broadcast_to((jnp.arange(T * K) // K)[None], (B, T * K))
    return moe_naive(
      x_BTD,
      token_BP,
      expert_BTK.reshape(B, T * K),
      weight_BTK.reshape(B, T * K),
      experts,
      activation,
    )
  over = _Mesh.of(B, experts)

  def shard(x_BTD, expert_BTK, weight_BTK, *weights):
    b, t, D = x_BTD.shape
    x_ND, expert_NK, weight_NK = (
      x_BTD.reshape(b * t, D),
      expert_BTK.reshape(b * t, K),
      weight_BTK.reshape(b * t, K),
    )
    here = Experts(*weights)
    if over.exchanges:
      y = _exchanged(x_ND, weight_NK, here, expert_NK, activation, over)
    else:
      y = _sorted(x_ND, over.local(expert_NK, here), weight_NK, here, activation)
    return over.summed(y.astype(x_BTD.dtype)).reshape(b, t, D)

  tokens = ('batch', 'time', None)
  mapped = per_shard(shard, (tokens, tokens, tokens, *_AXES), tokens)
  return mapped(x_BTD, expert_BTK, weight_BTK, *experts)


_AXES = ('experts', None, 'mlp'), ('experts', None, 'mlp'), ('experts', 'mlp', None)


class _Mesh(NamedTuple):
  """How the mesh divides this layer: the mesh axes of the experts, whether they also divide the
  sequences, and those over which every shard has only a part of the sum."""

  experts: tuple[str, ...]
  shards: int
  exchanges: bool
  partial: tuple[str, ...]

  @classmethod
  def of(cls, batch: int, experts: Experts) -> _Mesh:
    E, _, F = experts.w_in.shape
    over, hidden = mesh_axes('experts', E), mesh_axes('mlp', F)
    exchanges = bool(over) and set(over) <= set(mesh_axes('batch', batch))
    return cls(over, shards('experts', E), exchanges, hidden if exchanges else (*over, *hidden))

  def local(self, expert: Array, here: Experts) -> Array:
    """Numbers of experts among those of this shard, which has all tokens; for the others one beyond
    the last."""
    if not self.experts:
      return expert
    mine = here.w_in.shape[0]
    number = expert - jax.lax.axis_index(self.experts) * mine
    return jnp.where((number >= 0) & (number < mine), number, mine)

  def summed(self, y: Array) -> Array:
    """Of all shards, in the dtype in which a dense layer's parts would be summed."""
    return jax.lax.psum(y, self.partial) if self.partial else y


def _hidden_to_output(
  rows_PD: Array, sizes_E: Array, experts: Experts, activation: Activation
) -> Array:
  """Each expert on its group of the rows; zeros for rows of no group."""

  def times(a, w):
    return grouped_matmul(a, w, sizes_E)

  h = times(rows_PD, experts.w_in)
  h = activation(h) if experts.w_gate is None else activation(times(rows_PD, experts.w_gate)) * h
  return times(checkpoint_name(h, 'mlp_hidden'), experts.w_out)


def _sorted(
  x_ND, expert_NK, weight_NK, experts: Experts, activation: Activation
) -> Float[Array, 'N D']:
  """On one shard: numbers of experts beyond the last count for nothing."""
  N, K = expert_NK.shape
  order = jnp.argsort(expert_NK.reshape(N * K), stable=True)
  inverse = jnp.argsort(order)
  sizes_E = jnp.bincount(expert_NK.reshape(N * K), length=experts.w_in.shape[0])
  y_PD = _hidden_to_output(_spread(x_ND, order, inverse, K), sizes_E, experts, activation)
  y_NKD = _permuted(y_PD, inverse, order).reshape(N, K, -1)
  return jnp.einsum('nkd,nk->nd', y_NKD.astype(jnp.float32), weight_NK)


# What is gathered by a permutation has a gradient that is gathered too; JAX's own would scatter and
# add.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_ND, order_P, inverse_P, K):
  """K copies of every row, in a new order."""
  return x_ND[order_P // K]


_spread.defvjp(
  lambda x_ND, order_P, inverse_P, K: (_spread(x_ND, order_P, inverse_P, K), inverse_P),
  lambda K, inverse_P, g_PD: (g_PD[inverse_P].reshape(-1, K, g_PD.shape[-1]).sum(1), None, None),
)


@jax.custom_vjp
def _permuted(y_PD, order_P, inverse_P):
  return y_PD[order_P]


_permuted.defvjp(
  lambda y_PD, order_P, inverse_P: (y_PD[order_P], inverse_P),
  lambda inverse_P, g_PD: (g_PD[inverse_P], None, None),
)


# ---- the same, tokens travelling in rounds -----------------------------------------------------


class _Buckets(NamedTuple):
  """The pairs of a shard by destination.

  Attributes:
    order_P: pairs sorted by expert, so by destination.
    starts_S, sizes_S: where in this order the pairs for each shard begin, and how many they are.
    expert_P: of each pair, in its old order.
    rounds: how many there are, the same on all shards.
  """

  order_P: Array
  starts_S: Array
  sizes_S: Array
  expert_P: Array
  rounds: Array


def _bucket_rows(pairs: int, shards: int) -> int:
  return min(pairs, math.ceil(SLACK * pairs / shards / 8) * 8)


def _buckets(expert_NK: Array, mine: int, over: _Mesh) -> _Buckets:
  expert_P = expert_NK.reshape(-1)
  sizes_S = jnp.bincount(expert_P // mine, length=over.shards)
  needed = -(-jnp.max(sizes_S) // _bucket_rows(expert_P.size, over.shards))
  # All shards of the mesh go through the same rounds, whatever their own need: collectives wait for
  # each other.
  rounds = jax.lax.pmax(needed, all_mesh_axes())
  return _Buckets(
    jnp.argsort(expert_P, stable=True), jnp.cumsum(sizes_S) - sizes_S, sizes_S, expert_P, rounds
  )


def _round(
  i, x_ND, weight_NK, experts: Experts, buckets: _Buckets, activation: Activation, over: _Mesh
) -> Float[Array, 'N D']:
  """What round i adds to the output of this shard's tokens."""
  (N, D), K, mine = x_ND.shape, weight_NK.shape[1], experts.w_in.shape[0]
  S, c = over.shards, _bucket_rows(N * K, over.shards)

  def travel(a):
    return jax.lax.all_to_all(a, over.experts, 0, 0, tiled=True)

  place_SC = i * c + jnp.arange(c)[None]
  filled_SC = place_SC < buckets.sizes_S[:, None]
  pair_SC = buckets.order_P[jnp.minimum(buckets.starts_S[:, None] + place_SC, N * K - 1)]
  expert_SC = jnp.where(filled_SC, buckets.expert_P[pair_SC] - mine * jnp.arange(S)[:, None], mine)
  pair, expert = pair_SC.reshape(S * c), travel(expert_SC.astype(jnp.int32)).reshape(S * c)
  rows = travel(jnp.where(filled_SC.reshape(S * c, 1), x_ND[pair // K], jnp.zeros((), x_ND.dtype)))
  order = jnp.argsort(expert, stable=True)
  inverse = jnp.argsort(order)
  y = _hidden_to_output(
    _permuted(rows, order, inverse), jnp.bincount(expert, length=mine), experts, activation
  )
  y = travel(_permuted(y, inverse, order)).astype(jnp.float32)
  weight = jnp.where(filled_SC.reshape(S * c), weight_NK.reshape(N * K)[pair], 0.0)
  return jnp.zeros((N, D), jnp.float32).at[pair // K].add(weight[:, None] * y)


def _exchanged(x_ND, weight_NK, experts, expert_NK, activation, over) -> Float[Array, 'N D']:
  return _rounds(
    x_ND, weight_NK, experts, _buckets(expert_NK, experts.w_in.shape[0], over), activation, over
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _rounds(x_ND, weight_NK, experts, buckets, activation, over):
  """The sum of all rounds. It is linear in the rounds, so its gradient is the sum of theirs."""

  def add(i, y):
    return y + _round(i, x_ND, weight_NK, experts, buckets, activation, over)

  return jax.lax.fori_loop(0, buckets.rounds, add, jnp.zeros(x_ND.shape, jnp.float32))


def _rounds_forward(x_ND, weight_NK, experts, buckets, activation, over):
  return _rounds(x_ND, weight_NK, experts, buckets, activation, over), (
    x_ND,
    weight_NK,
    experts,
    buckets,
  )


def _rounds_backward(activation, over, saved, g_ND):
  *inputs, buckets = saved

  def add(i, total):
    _, pull = jax.vjp(lambda *a: _round(i, *a, buckets, activation, over), *inputs)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, pull(g_ND))

  total = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tuple(inputs))
  total = jax.lax.fori_loop(0, buckets.rounds, add, total)
  return *jax.tree.map(lambda g, a: g.astype(a.dtype), total, tuple(inputs)), None


_rounds.defvjp(_rounds_forward, _rounds_backward)


# ---- a fixed number of places an expert --------------------------------------------------------


def placed(
  x_BTD: Float[Array, 'B T D'],
  token_BEC: Int[Array, 'B E C'],
  weight_BEC: Float[Array, 'B E C'],
  experts: Experts,
  activation: Activation,
) -> Float[Array, 'B T D']:
  """y_t = sum over the places (e, c) that hold token t of weight * expert_e(x_t). A place of weight
  0 is empty; it costs as much as a full one. Products are those of E matrices with B C rows each;
  on shards of the experts all places travel once there and back."""
  B, E, C = token_BEC.shape
  if MOE_CAPACITY.choose() == 'naive':
    expert = jnp.broadcast_to(jnp.arange(E)[None, :, None], (B, E, C))
    return moe_naive(
      x_BTD, *(a.reshape(B, E * C) for a in (token_BEC, expert, weight_BEC)), experts, activation
    )
  over, T, axes = _Mesh.of(B, experts), x_BTD.shape[1], time_axes(x_BTD.shape[1])

  def shard(x_BTD, token_BEC, weight_BEC, *weights):
    b, _, D = x_BTD.shape
    here = Experts(*weights)
    if over.experts and not over.exchanges:
      mine = here.w_in.shape[0]
      first = jax.lax.axis_index(over.experts) * mine
      token_BEC, weight_BEC = (
        jax.lax.dynamic_slice_in_dim(a, first, mine, 1) for a in (token_BEC, weight_BEC)
      )
    rows, token_BEC, weight_BEC = _rows_of_places(x_BTD, token_BEC, weight_BEC, axes)
    e, C = token_BEC.shape[1:]
    token_BP, row = token_BEC.reshape(b, e * C), jnp.arange(b)[:, None]
    rows = rows.swapaxes(0, 1).reshape(e, b * C, D)
    if over.exchanges:
      rows = jax.lax.all_to_all(rows, over.experts, 0, 1, tiled=True)
    y = _batched(rows, here, activation)
    if over.exchanges:
      y = jax.lax.all_to_all(y, over.experts, 1, 0, tiled=True)
    y_BPD = y.reshape(e, b, C, D).swapaxes(0, 1).reshape(b, e * C, D).astype(jnp.float32)
    y = (
      jnp.zeros((b, T, D), jnp.float32)
      .at[row, token_BP]
      .add(weight_BEC.reshape(b, e * C, 1) * y_BPD)
    )
    y = jax.lax.psum_scatter(y, axes, scatter_dimension=1, tiled=True) if axes else y
    return over.summed(y.astype(x_BTD.dtype))

  # a place holds a token of anywhere in its sequence
  whole, tokens = ('batch', None, None), ('batch', 'time', None)
  mapped = per_shard(shard, (tokens, whole, whole, *_AXES), tokens)
  return mapped(x_BTD, token_BEC, weight_BEC, *experts)


def _rows_of_places(x_BTD, token_BEC, weight_BEC, axes: tuple[str, ...]):
  """The tokens `[b, e, C, D]` in the places of this shard, with their numbers and weights: all
  places, or where time is divided one part of each expert's, whose tokens other shards send."""
  row, C = jnp.arange(len(x_BTD))[:, None, None], token_BEC.shape[2]
  if not axes:
    return x_BTD[row, token_BEC], token_BEC, weight_BEC
  n, here, t = jax.lax.axis_size(axes), jax.lax.axis_index(axes), x_BTD.shape[1]
  token_BEC, weight_BEC = (
    jnp.pad(a, ((0, 0), (0, 0), (0, -C % n))) for a in (token_BEC, weight_BEC)
  )
  place = token_BEC - here * t
  mine = ((place >= 0) & (place < t))[..., None]
  rows = jnp.where(mine, x_BTD[row, jnp.clip(place, 0, t - 1)], jnp.zeros((), x_BTD.dtype))
  part = token_BEC.shape[2] // n
  token_BEC, weight_BEC = (
    jax.lax.dynamic_slice_in_dim(a, here * part, part, 2) for a in (token_BEC, weight_BEC)
  )
  return jax.lax.psum_scatter(rows, axes, scatter_dimension=2, tiled=True), token_BEC, weight_BEC


def _batched(rows_END, experts: Experts, activation: Activation):
  def times(a, w):
    return jnp.einsum('end,edf->enf', a, w)

  h = times(rows_END, experts.w_in)
  h = activation(h) if experts.w_gate is None else activation(times(rows_END, experts.w_gate)) * h
  return times(checkpoint_name(h, 'mlp_hidden'), experts.w_out)


MOE_DROPLESS = Operation(
  'moe_dropless',
  {'naive': Implementation(moe_naive), 'grouped': Implementation(_sorted)},
  lambda: ('grouped',),
)
MOE_CAPACITY = Operation(
  'moe_capacity',
  {'naive': Implementation(moe_naive), 'batched': Implementation(_batched)},
  lambda: ('batched',),
)
