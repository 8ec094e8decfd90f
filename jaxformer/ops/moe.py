"""A mixture of experts, once it is known which token goes to which expert: pure functions, on any
mesh.

- `dropless`: every choice of every token (Gale et al. 2022, "MegaBlocks").
- `dispatch_with_capacity`: an expert takes a limited number of tokens of a sequence (Fedus et al.
  2022, "Switch Transformers").
- `from_slots`: the tokens in the slots of each expert, of which there is a fixed number (Zhou et
  al. 2022, "Expert Choice").

`moe_naive` defines the result of all of them. Each permutes tokens to their experts, multiplies
them with the experts' matrices, and permutes them back.

On a mesh the experts are sharded over the axis of `experts` (and their hidden units over that of
`mlp`), the sequences over several axes, that one among them: tokens are then exchanged by
all-to-all before and after, and no expert's weights travel. Where too few sequences are sharded
(decoding), every shard has all tokens, computes its experts' part, and the parts are summed.

Dims: N tokens of a shard, E experts, K experts per token, C slots, P (token, expert) pairs, S
  shards of the experts, D width, F hidden units.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxformer.ops.grouped_matmul import grouped_matmul
from jaxformer.ops.implementation import Operation
from jaxformer.ops.routing import assign_slots, has_slot
from jaxformer.ops.sequence_parallel import time_axes
from jaxformer.sharding import all_mesh_axes, mesh_axes, per_shard, shards

Hidden = Callable[[Array, Array | None], Array]
"""Hidden units from what the projections in return: x W_in, and x W_gate or None."""

# slots of a bucket in a round of `dropless` over shards, relative to those that balanced routing
# needs
SLACK = 1.25

_TOKENS = ('batch', 'time', None)
_EXPERTS = (
  *(('experts', None, 'mlp'), ('experts', None, 'mlp'), ('experts', 'mlp', None)),
  *(('experts', 'mlp'), ('experts', 'mlp'), ('experts', None)),
)


class Experts(NamedTuple):
  """Weights of the feed-forward layers, stacked: y = h W_out + b_out with h = hidden(x W_in + b_in,
  x W_gate + b_gate); gate and biases may be absent."""

  w_in: Float[Array, 'E D F']
  w_gate: Float[Array, 'E D F'] | None
  w_out: Float[Array, 'E F D']
  b_in: Float[Array, 'E F'] | None = None
  b_gate: Float[Array, 'E F'] | None = None
  b_out: Float[Array, 'E D'] | None = None


@dataclasses.dataclass(frozen=True)
class Form:
  """What experts compute from their weights, and where the weight of a pair is a factor.

  Attributes:
    hidden: hashable, as the form is a static argument.
    on_input: the weight multiplies the expert's input (Llama 4); False: its output. In either case
      a pair of weight 0 contributes nothing.
  """

  hidden: Hidden
  on_input: bool = False

  def factors(self, weight: Array) -> tuple[Array | None, Array]:
    """The factor of an expert's input, None for none, and that of its output, fp32."""
    if not self.on_input:
      return None, weight
    return weight, (weight != 0).astype(jnp.float32)

  def scaled(self, rows: Array, weight: Array) -> Array:
    """The inputs of experts, [..., D], for pairs of these weights, [...]."""
    factor, _ = self.factors(weight)
    return rows if factor is None else (rows * factor[..., None]).astype(rows.dtype)


def dropless(
  x_BTD: Float[Array, 'B T D'],
  expert_BTK: Int[Array, 'B T K'],
  weight_BTK: Float[Array, 'B T K'],
  experts: Experts,
  form: Form,
) -> Float[Array, 'B T D']:
  """y_t = sum_k weight_tk * expert_(expert_tk)(x_t): pairs sorted by expert and multiplied as
  groups (`ops.grouped_matmul`), so that FLOPs are those of the chosen experts, however unequal
  their loads (Gale et al. 2022).

  On shards of the experts, tokens travel in rounds. In one, each shard sends every other a bucket
  of at most c = `SLACK` N K / shards rows; there are as many rounds as the fullest bucket needs,
  one where routing is about balanced. So nothing is dropped, memory is that of one round, and
  traffic grows only with the imbalance. The gradient goes through the same rounds and recomputes
  the experts' hidden units."""
  compute = MOE_DROPLESS[MOE_DROPLESS.choose()]
  return compute(x_BTD, expert_BTK, weight_BTK, experts, form)


def dispatch_with_capacity(
  x_BTD: Float[Array, 'B T D'],
  expert_BTK: Int[Array, 'B T K'],
  weight_BTK: Float[Array, 'B T K'],
  experts: Experts,
  form: Form,
  capacity: int,
) -> tuple[Float[Array, 'B T D'], Float[Array, '']]:
  """`dropless` of the choices left when an expert takes at most `capacity` tokens of a sequence,
  the first ones (`ops.routing.assign_slots`), and the fraction of choices dropped."""
  E = experts.w_in.shape[0]
  if time_axes(x_BTD.shape[1]):  # slots are those of complete sequences; tokens stay on their shard
    kept_BTK = has_slot(expert_BTK, E, capacity)
    y = dropless(x_BTD, expert_BTK, jnp.where(kept_BTK, weight_BTK, 0.0), experts, form)
    return y, 1.0 - jnp.mean(kept_BTK.astype(jnp.float32))
  token, weight, dropped = assign_slots(expert_BTK, weight_BTK, E, capacity)
  return from_slots(x_BTD, token, weight, experts, form), dropped


def from_slots(
  x_BTD: Float[Array, 'B T D'],
  token_BEC: Int[Array, 'B E C'],
  weight_BEC: Float[Array, 'B E C'],
  experts: Experts,
  form: Form,
) -> Float[Array, 'B T D']:
  """y_t = sum over the slots (e, c) that hold token t of weight * expert_e(x_t). A slot of weight 0
  is empty; it costs as much as a full one. Products are those of E matrices with B C rows each; on
  shards of the experts all slots travel once there and back."""
  compute = MOE_CAPACITY[MOE_CAPACITY.choose()]
  return compute(x_BTD, token_BEC, weight_BEC, experts, form)


# ---- pair by pair ------------------------------------------------------------------------------


def moe_naive(x_BTD, token_BP, expert_BP, weight_BP, experts: Experts, form: Form):
  """y_t = sum over the pairs (t, e, weight) of weight * expert_e(x_t), pair by pair, each with its
  own copy of its expert's weights."""

  def one(x_TD, token, expert, weight):
    own = jax.tree.map(lambda w: w[expert], experts)
    h = _hidden(form.scaled(x_TD[token], weight), own, form)
    return form.factors(weight)[1] * _plus(h @ own.w_out, own.b_out).astype(jnp.float32)

  y_BPD = jax.vmap(jax.vmap(one, (None, 0, 0, 0)))(x_BTD, token_BP, expert_BP, weight_BP)
  return _scatter_add(x_BTD.shape, token_BP, y_BPD).astype(x_BTD.dtype)


def _plus(y, bias):
  return y if bias is None else y + bias


def _hidden(x, experts: Experts, form: Form, times=jnp.matmul, plus=_plus):
  gate = None
  if experts.w_gate is not None:
    gate = plus(times(x, experts.w_gate), experts.b_gate)
  return form.hidden(plus(times(x, experts.w_in), experts.b_in), gate)


def _scatter_add(shape, token_BP, y_BPD):
  row = jnp.arange(shape[0])[:, None]
  return jnp.zeros(shape, jnp.float32).at[row, token_BP].add(y_BPD)


def _dropless_naive(x_BTD, expert_BTK, weight_BTK, experts, form):
  B, T, K = expert_BTK.shape
  token_BP = jnp.broadcast_to((jnp.arange(T * K) // K)[None], (B, T * K))
  pairs = (a.reshape(B, T * K) for a in (expert_BTK, weight_BTK))
  return moe_naive(x_BTD, token_BP, *pairs, experts, form)


def _slots_naive(x_BTD, token_BEC, weight_BEC, experts, form):
  B, E, C = token_BEC.shape
  expert = jnp.broadcast_to(jnp.arange(E)[None, :, None], (B, E, C))
  pairs = (a.reshape(B, E * C) for a in (token_BEC, expert, weight_BEC))
  return moe_naive(x_BTD, *pairs, experts, form)


# ---- shards of the experts ---------------------------------------------------------------------


class _ExpertSharding(NamedTuple):
  """How the mesh shards this layer: the mesh axes of the experts, whether the sequences are sharded
  over them too, so that shards exchange tokens, the axes over which results are summed, and those
  of the hidden units."""

  experts: tuple[str, ...]
  shards: int
  exchanges: bool
  summed: tuple[str, ...]
  hidden: tuple[str, ...]

  @classmethod
  def of(cls, batch: int, experts: Experts) -> _ExpertSharding:
    E, _, F = experts.w_in.shape
    over, hidden = mesh_axes('experts', E), mesh_axes('mlp', F)
    exchanges = bool(over) and set(over) <= set(mesh_axes('batch', batch))
    summed = hidden if exchanges else (*over, *hidden)
    return cls(over, shards('experts', E), exchanges, summed, hidden)

  def here(self, weights) -> Experts:
    """The experts of this shard. Where hidden units are sharded, only the first shard of them adds
    the bias of the output, as the shards' outputs are summed."""
    experts = Experts(*weights)
    if experts.b_out is None or not self.hidden:
      return experts
    first = jax.lax.axis_index(self.hidden) == 0
    return experts._replace(b_out=jnp.where(first, experts.b_out, jnp.zeros_like(experts.b_out)))

  def first(self, experts: Experts) -> Array:
    """The first expert of this shard."""
    return jax.lax.axis_index(self.experts) * experts.w_in.shape[0]

  def all_to_all(self, a, split: int = 0, concat: int = 0):
    """Slices of `a` along `split` to the shards of the experts, theirs along `concat`."""
    return jax.lax.all_to_all(a, self.experts, split, concat, tiled=True)

  def psum(self, y):
    """The sum over shards, in the dtype in which a dense layer's parts would be summed."""
    return jax.lax.psum(y, self.summed) if self.summed else y


# ---- every choice of every token ---------------------------------------------------------------


def _dropless_grouped(x_BTD, expert_BTK, weight_BTK, experts, form: Form):
  sharding, K = _ExpertSharding.of(len(x_BTD), experts), expert_BTK.shape[2]

  def shard(x_BTD, expert_BTK, weight_BTK, *weights):
    here = sharding.here(weights)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    expert_NK, weight_NK = (a.reshape(-1, K) for a in (expert_BTK, weight_BTK))
    if sharding.exchanges:
      buckets = _buckets(expert_NK, here.w_in.shape[0], sharding)
      y = _rounds(x_ND, weight_NK, here, buckets, form, sharding)
    else:
      number_P = expert_NK.reshape(-1)
      if sharding.experts:  # this shard has all tokens; others' experts are one beyond its last
        mine = here.w_in.shape[0]
        number_P = number_P - sharding.first(here)
        number_P = jnp.where((number_P >= 0) & (number_P < mine), number_P, mine)
      before, after = form.factors(weight_NK)
      rows, copies = x_ND, K
      if before is not None:
        rows = form.scaled(jnp.repeat(x_ND, K, axis=0), weight_NK.reshape(-1))
        copies = 1
      y_PD = _apply_experts(rows, number_P, here, form, copies)
      y = jnp.einsum('nkd,nk->nd', y_PD.reshape(*weight_NK.shape, -1).astype(jnp.float32), after)
    return sharding.psum(y.astype(x_BTD.dtype)).reshape(x_BTD.shape)

  mapped = per_shard(shard, (_TOKENS, _TOKENS, _TOKENS, *_EXPERTS), _TOKENS)
  return mapped(x_BTD, expert_BTK, weight_BTK, *experts)


def _apply_experts(x_ND, expert_P, experts: Experts, form: Form, copies=1):
  """The expert of each pair on its row, P = N copies: permute, grouped matmul, unpermute. Numbers
  beyond the last expert give zeros."""
  order = jnp.argsort(expert_P, stable=True)
  inverse = jnp.argsort(order)
  sizes_E = jnp.bincount(expert_P, length=experts.w_in.shape[0])

  def times(a, w):
    return grouped_matmul(a, w, sizes_E)

  def plus(y, bias):
    return y if bias is None else y + _rows_of(bias, expert_P[order])

  h = _hidden(_permute(x_ND, order, inverse, copies), experts, form, times, plus)
  y_PD = plus(times(checkpoint_name(h, 'mlp_hidden'), experts.w_out), experts.b_out)
  return _permute(y_PD, inverse, order, 1)


def _rows_of(bias_EF, expert_P):
  """The bias of each pair's expert, zeros for numbers beyond the last: as a product, whose gradient
  is one too and no scatter-add."""
  chosen = expert_P[:, None] == jnp.arange(bias_EF.shape[0])[None]
  return jnp.matmul(chosen.astype(bias_EF.dtype), bias_EF, precision=jax.lax.Precision.HIGHEST)


# The gradient of a gather by a permutation is a gather too; JAX's own would be a scatter-add.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permute(x_ND, order_P, inverse_P, copies):
  """`copies` of every row, in a new order."""
  return x_ND[order_P // copies if copies > 1 else order_P]


def _permute_backward(copies, inverse_P, g_PD):
  g = g_PD[inverse_P]
  return (g.reshape(-1, copies, g.shape[-1]).sum(1) if copies > 1 else g), None, None


_permute.defvjp(
  lambda x_ND, order_P, inverse_P, copies: (_permute(x_ND, order_P, inverse_P, copies), inverse_P),
  _permute_backward,
)


# ---- the same, tokens exchanged in rounds ------------------------------------------------------


def _bucket_rows(pairs: int, shards: int) -> int:
  return min(pairs, math.ceil(SLACK * pairs / shards / 8) * 8)


def _buckets(expert_NK, mine, sharding: _ExpertSharding):
  """The pairs of a shard by destination: (pairs sorted by expert, so by destination; where in this
  order those for each shard start, and how many they are; the expert of each pair; the number of
  rounds)."""
  expert_P = expert_NK.reshape(-1)
  sizes_S = jnp.bincount(expert_P // mine, length=sharding.shards)
  needed = -(-jnp.max(sizes_S) // _bucket_rows(expert_P.size, sharding.shards))
  # All shards of the mesh go through the same rounds, whatever their own need: collectives wait for
  # each other.
  rounds = jax.lax.pmax(needed, all_mesh_axes())
  order_P = jnp.argsort(expert_P, stable=True)
  return order_P, jnp.cumsum(sizes_S) - sizes_S, sizes_S, expert_P, rounds


def _round(i, x_ND, weight_NK, experts, buckets, form: Form, sharding: _ExpertSharding):
  """The contribution of round i to the output of this shard's tokens, [N, D]."""
  order_P, starts_S, sizes_S, expert_P, _ = buckets
  P, K, mine = weight_NK.size, weight_NK.shape[1], experts.w_in.shape[0]
  S, c = sharding.shards, _bucket_rows(P, sharding.shards)
  slot_SC = i * c + jnp.arange(c)[None]
  filled_SC = slot_SC < sizes_S[:, None]
  pair_SC = order_P[jnp.minimum(starts_S[:, None] + slot_SC, P - 1)]
  expert_SC = jnp.where(filled_SC, expert_P[pair_SC] - mine * jnp.arange(S)[:, None], mine)
  pair, filled = pair_SC.reshape(S * c), filled_SC.reshape(S * c)
  expert = sharding.all_to_all(expert_SC.astype(jnp.int32)).reshape(S * c)
  weight = jnp.where(filled, weight_NK.reshape(P)[pair], 0.0)
  rows = form.scaled(x_ND[pair // K], weight)
  rows = sharding.all_to_all(jnp.where(filled[:, None], rows, jnp.zeros((), x_ND.dtype)))
  y = sharding.all_to_all(_apply_experts(rows, expert, experts, form)).astype(jnp.float32)
  y = form.factors(weight)[1][:, None] * y
  return jnp.zeros(x_ND.shape, jnp.float32).at[pair // K].add(y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _rounds(x_ND, weight_NK, experts, buckets, form, sharding):
  """The sum of all rounds. It is linear in the rounds, so its gradient is the sum of theirs."""

  def add(i, y):
    return y + _round(i, x_ND, weight_NK, experts, buckets, form, sharding)

  return jax.lax.fori_loop(0, buckets[-1], add, jnp.zeros(x_ND.shape, jnp.float32))


def _rounds_forward(*arguments):
  return _rounds(*arguments), arguments[:4]


def _rounds_backward(form, sharding, saved, g_ND):
  *inputs, buckets = saved

  def add(i, total):
    _, pull = jax.vjp(lambda *a: _round(i, *a, buckets, form, sharding), *inputs)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, pull(g_ND))

  total = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tuple(inputs))
  total = jax.lax.fori_loop(0, buckets[-1], add, total)
  return *jax.tree.map(lambda g, a: g.astype(a.dtype), total, tuple(inputs)), None


_rounds.defvjp(_rounds_forward, _rounds_backward)


# ---- a fixed number of slots per expert --------------------------------------------------------


def _slots_batched(x_BTD, token_BEC, weight_BEC, experts, form: Form):
  sharding, axes = _ExpertSharding.of(len(x_BTD), experts), time_axes(x_BTD.shape[1])
  T = x_BTD.shape[1]

  def shard(x_BTD, token_BEC, weight_BEC, *weights):
    (b, _, D), here = x_BTD.shape, sharding.here(weights)
    if sharding.experts and not sharding.exchanges:
      first, mine = sharding.first(here), here.w_in.shape[0]
      token_BEC, weight_BEC = (
        jax.lax.dynamic_slice_in_dim(a, first, mine, 1) for a in (token_BEC, weight_BEC)
      )
    rows, token_BEC, weight_BEC = _rows_of_slots(x_BTD, token_BEC, weight_BEC, axes)
    e, C = token_BEC.shape[1:]
    rows = form.scaled(rows, weight_BEC).swapaxes(0, 1).reshape(e, b * C, D)
    rows = sharding.all_to_all(rows, 0, 1) if sharding.exchanges else rows
    times = functools.partial(jnp.einsum, 'end,edf->enf')
    h = _hidden(rows, here, form, times, _plus_each)
    y = _plus_each(times(checkpoint_name(h, 'mlp_hidden'), here.w_out), here.b_out)
    y = sharding.all_to_all(y, 1, 0) if sharding.exchanges else y
    y_BPD = y.reshape(e, b, C, D).swapaxes(0, 1).reshape(b, e * C, D).astype(jnp.float32)
    y_BPD = form.factors(weight_BEC)[1].reshape(b, e * C, 1) * y_BPD
    y = _scatter_add((b, T, D), token_BEC.reshape(b, e * C), y_BPD)
    y = jax.lax.psum_scatter(y, axes, scatter_dimension=1, tiled=True) if axes else y
    return sharding.psum(y.astype(x_BTD.dtype))

  # the token of a slot may stand anywhere in its sequence
  slots = ('batch', None, None)
  mapped = per_shard(shard, (_TOKENS, slots, slots, *_EXPERTS), _TOKENS)
  return mapped(x_BTD, token_BEC, weight_BEC, *experts)


def _plus_each(y_ENF, bias_EF):
  return y_ENF if bias_EF is None else y_ENF + bias_EF[:, None]


def _rows_of_slots(x_BTD, token_BEC, weight_BEC, axes: tuple[str, ...]):
  """The tokens `[b, e, C, D]` in the slots of this shard, with their numbers and weights: all
  slots, or where time is sharded a part of each expert's, whose tokens other shards send."""
  row, C = jnp.arange(len(x_BTD))[:, None, None], token_BEC.shape[2]
  if not axes:
    return x_BTD[row, token_BEC], token_BEC, weight_BEC
  n, here, t = jax.lax.axis_size(axes), jax.lax.axis_index(axes), x_BTD.shape[1]
  token_BEC, weight_BEC = (
    jnp.pad(a, ((0, 0), (0, 0), (0, -C % n))) for a in (token_BEC, weight_BEC)
  )
  position = token_BEC - here * t
  mine = ((position >= 0) & (position < t))[..., None]
  rows = jnp.where(mine, x_BTD[row, jnp.clip(position, 0, t - 1)], jnp.zeros((), x_BTD.dtype))
  part = token_BEC.shape[2] // n
  token_BEC, weight_BEC = (
    jax.lax.dynamic_slice_in_dim(a, here * part, part, 2) for a in (token_BEC, weight_BEC)
  )
  return jax.lax.psum_scatter(rows, axes, scatter_dimension=2, tiled=True), token_BEC, weight_BEC


MOE_DROPLESS = Operation(
  'moe_dropless', {'naive': _dropless_naive, 'grouped': _dropless_grouped}, lambda: ('grouped',)
)
MOE_CAPACITY = Operation(
  'moe_capacity', {'naive': _slots_naive, 'batched': _slots_batched}, lambda: ('batched',)
)
