"""A stack: groups of (pattern of blocks, repeats). The parameters of repeated patterns are stored
stacked, and scanned or unrolled."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.config import Config, InputError
from jaxformer.layers.layer import (
  STACK_INPUT,
  CommonConfig,
  Context,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
  bound,
)
from jaxformer.models.block import (
  Block,
  BranchConfig,
  apply_sequentially,
  widths,
  with_pooled_losses,
)
from jaxformer.models.params import stacked
from jaxformer.sharding import needs_all_gather, platform, unshard

_policies = jax.checkpoint_policies
NAMED = ('attention', 'mlp_hidden')  # the names that layers give by `checkpoint_name`

REMAT: dict[str, Callable[..., Any] | None] = {
  'none': None,  # save all activations
  # save only the input of each period
  'full': _policies.nothing_saveable,
  # save products with weights
  'dots': _policies.dots_with_no_batch_dims_saveable,
  'attention': _policies.save_only_these_names('attention'),  # save attention outputs
  # save these and feed-forward hidden units
  'names': _policies.save_only_these_names(*NAMED),
  # the same, in host memory
  'offload': _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(NAMED),
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
"""Remat policies by name: what the forward pass saves for the backward pass."""

Modules = TypeVar('Modules', bound=nnx.Module)

UNROLLED_BLOCKS = 16  # maximum number of blocks that a CPU unrolls


class Group(Config):
  """A pattern of blocks, repeated.

  Attributes:
    pattern: the blocks of one period.
    repeats: periods; more than one are stacked on a leading axis of their parameters and scanned.
  """

  pattern: tuple[Block.Config, ...]
  repeats: int = 1

  def validate(self):
    self.require_positive('repeats')
    # each is a step of the tables of costs; the deepest models have hundreds
    self.require(self.repeats <= 100_000, 'repeats', 'at most 100,000')
    self.require(len(self.pattern) > 0, 'pattern', 'at least one block')

  def out_width(self, width: int) -> int:
    """The width after the group. Raises `InputError` where a repeated pattern changes it."""
    out = widths(self.pattern, width)[-1]
    self.require(
      self.repeats == 1 or out == width,
      'repeats',
      f'1 where the pattern changes the width from {width} to {out}',
    )
    return out


def group(*branches: BranchConfig, repeats: int = 1) -> Group:
  """Return a group whose pattern is one block of these branches."""
  return Group(pattern=(Block.Config(branches=branches),), repeats=repeats)


def grouped(blocks: Sequence[Block.Config]) -> tuple[Group, ...]:
  """Return the groups of a stack of these blocks, from the bottom up: wherever a pattern recurs at
  once, the repetition that covers the most blocks becomes a group, and of those the one with the
  shortest pattern; what lies between repetitions is the pattern of a group by itself."""
  kinds: list[Block.Config] = []
  for block in blocks:
    if block not in kinds:
      kinds.append(block)
  ids, groups, single, at = [kinds.index(b) for b in blocks], [], [], 0

  def covered(period: int) -> int:
    """Blocks from `at` on that repetitions of the next `period` make up."""
    end = at + period
    while ids[end : end + period] == ids[at : at + period]:
      end += period
    return end - at

  while at < len(ids):
    periods = range(1, (len(ids) - at) // 2 + 1)
    repeated = [(covered(p), -p) for p in periods if covered(p) > p]
    length, period = max(repeated, default=(1, 0))
    if not repeated:
      single.append(blocks[at])
    else:
      if single:
        groups.append(Group(pattern=tuple(single)))
        single = []
      groups.append(Group(pattern=tuple(blocks[at : at - period]), repeats=-length // period))
    at += length
  return (*groups, Group(pattern=tuple(single))) if single else tuple(groups)


def blocks_with_widths(
  groups: tuple[Group, ...], width: int
) -> Iterator[tuple[str, Block.Config, int, int]]:
  """Every block's config with its name in the stack, the width of its input, and how many times it
  occurs in a stack with inputs of `width`."""
  for g, group in enumerate(groups):
    before = widths(group.pattern, width)
    for p, (block, w) in enumerate(zip(group.pattern, before, strict=False)):
      yield f'groups.{g}.{p}', block, w, group.repeats
    width = group.out_width(width)


def layers_with_widths(
  groups: tuple[Group, ...], width: int
) -> Iterator[tuple[LayerConfig, int, int]]:
  """Every layer's config with the width of its input, and how many times it occurs in a stack with
  inputs of `width`."""
  for _, block, before, repeats in blocks_with_widths(groups, width):
    for branch, w in zip(block.branches, widths(block.branches, before), strict=False):
      yield branch.layer, w, repeats


def common_modules(
  groups: tuple[Group, ...], width: int
) -> dict[str, tuple[CommonConfig, int, int]]:
  """The modules that layers of a stack have in common: name -> config, width of the inputs of the
  layers that use it, and how many do. Raises `InputError` where two mean different ones."""
  found: dict[str, tuple[CommonConfig, int, int]] = {}
  for layer, w, repeats in layers_with_widths(groups, width):
    for name, config in layer.common(w).items():
      known, at, uses = found.get(name, (config, w, 0))
      if (known, at) != (config, w):
        problem = f'layers mean different modules by it: {known} for inputs of {at} channels, and '
        raise InputError('common', name, problem=f'{problem}{config} for {w}')
      found[name] = config, w, uses + repeats
  return found


class Stack(nnx.Module):
  """Groups of blocks one after the other. Of the layers' auxiliary values, losses are added, others
  become a vector over the layers that return them, from the bottom up.

  Modules that layers have in common (`LayerConfig.common`) are stored once, and bound to the layers
  in each call. Layers may read the input of the stack (`STACK_INPUT`)."""

  def __init__(self, groups: tuple[Group, ...], width: int, rngs: nnx.Rngs):
    layers = sum(len(g.pattern) * g.repeats for g in groups)
    branches = sum(len(b.branches) * g.repeats for g in groups for b in g.pattern)
    common = common_modules(groups, width)
    self.reads_input = any(
      STACK_INPUT in c.reads(w) for c, w, _ in layers_with_widths(groups, width)
    )
    built, first = [], 0
    for g in groups:

      def period(rngs: nnx.Rngs, layer: int | Array, pattern=g.pattern, width=width) -> nnx.List:
        return nnx.List(
          [
            block.build(w, rngs, LayerPosition(layer + i, layers, branches))
            for i, (block, w) in enumerate(zip(pattern, widths(pattern, width), strict=False))
          ]
        )

      built.append(
        period(rngs, first)
        if g.repeats == 1
        else stacked(period, g.repeats, rngs, first, len(g.pattern))
      )
      first += len(g.pattern) * g.repeats
      width = g.out_width(width)
    self.groups = nnx.List(built)
    self.repeats = tuple(g.repeats for g in groups)
    self.common = nnx.Dict(
      {name: _used(config.build(w, layers, rngs), n) for name, (config, w, n) in common.items()}
    )

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> tuple[State, ...]:
    """The states before the first token (`Layer.init_state`). Of `memory.states`, each block gets
    that of the encoder's block in the same position; blocks beyond those of the encoder get
    none."""
    states = iter(() if memory is None else memory.states)

    def period(blocks: nnx.List) -> tuple[State, ...]:
      return tuple(
        b.init_state(
          batch, max_len, None if memory is None else memory.replace(state=next(states, None))
        )
        for b in self._bound(blocks)
      )

    def periods(blocks: nnx.List, n: int) -> tuple[State, ...]:
      if memory is None:
        first = period(jax.tree.map(lambda p: p[0], blocks))
        return jax.tree.map(lambda z: jnp.broadcast_to(z, (n, *z.shape)), first)
      return jax.tree.map(lambda *s: jnp.stack(s), *(period(p) for p in _split(blocks, n)))

    return tuple(
      period(g) if n == 1 else periods(g, n) for g, n in zip(self.groups, self.repeats, strict=True)
    )

  def select_rows(
    self, state: tuple[State, ...], index: Array, same_source: bool = False
  ) -> tuple[State, ...]:
    """`Layer.select_rows` of all layers."""

    def period(blocks: nnx.List, states: tuple[State, ...]) -> tuple[State, ...]:
      return tuple(
        b.select_rows(s, index, same_source)
        for b, s in zip(self._bound(blocks), states, strict=True)
      )

    return tuple(
      period(g, s) if n == 1 else jax.vmap(lambda s, g=g: period(g, s))(s)
      for g, s, n in zip(self.groups, state, self.repeats, strict=True)
    )

  def handed_over(self, state: tuple[State, ...]) -> tuple[tuple[State, ...], ...]:
    """Final states of an encoder's layers for the decoder, by block from the bottom up
    (`Memory.states`)."""
    periods = zip(self._periods(self.groups), self._periods(state), strict=True)
    return tuple(
      block.handed_over(s)
      for blocks, states in periods
      for block, s in zip(self._bound(blocks), states, strict=True)
    )

  def __call__(
    self,
    x: Array,
    ctx: Context,
    state: tuple[State, ...] | None = None,
    one_token: bool = False,
    keep_state: bool = True,
  ) -> Output:
    """Apply all blocks to `x`, from `state` if there is one. `keep_state=False`: the states after
    `x` are not needed, and are returned only where that is free."""
    if self.reads_input:
      # with an axis of time, as all values that layers share
      ctx = ctx.replace(shared=ctx.shared | {STACK_INPUT: x[:, None] if one_token else x})
    first = itertools.accumulate(self._blocks_per_group(), initial=0)
    groups = (
      functools.partial(
        _for_each_period, blocks, self.common, at, n, self._unrolls(ctx), keep_state
      )
      for blocks, at, n in zip(self.groups, first, self.repeats, strict=False)
    )
    out = apply_sequentially(groups, x, ctx, state, one_token)
    return dataclasses.replace(out, aux=with_pooled_losses(out.aux))

  def unstack(self, ctx: Context) -> None:
    """Store the parameters of every period separately, in place, where `ctx` unrolls them: for many
    steps in a loop. A step then does not slice them out of the stacked ones, which copies all of
    them for each token. Call `unstacked_state` before."""
    if self._unrolls(ctx):
      self.groups = nnx.List(self._periods(self.groups))
      self.repeats = (1,) * len(self.groups)

  def unstacked_state(self, state: tuple[State, ...], ctx: Context) -> tuple[State, ...]:
    """This stack's state, for the stack after `unstack(ctx)`: a loop can then update each cache in
    place."""
    return tuple(self._periods(state)) if self._unrolls(ctx) else state

  def _periods(self, groups: Iterable[Any]) -> list[Any]:
    """The parts of all periods, from trees of groups."""
    trees = zip(groups, self.repeats, strict=True)
    return [period for tree, n in trees for period in ([tree] if n == 1 else _split(tree, n))]

  def _bound(self, blocks: nnx.List) -> nnx.List:
    """Blocks with the modules in common, where the index in the stack does not matter."""
    return bound(blocks, self.common, 0) if self.common else blocks

  def _blocks_per_group(self) -> list[int]:
    return [len(g) * n for g, n in zip(self.groups, self.repeats, strict=True)]

  def _unrolls(self, ctx: Context) -> bool:
    if ctx.unroll is not None:
      return ctx.unroll
    return platform() == 'cpu' and sum(self._blocks_per_group()) <= UNROLLED_BLOCKS


def _used(module: nnx.Module, uses: int) -> nnx.Module:
  """A module whose parameters say at how many depths they are used."""
  used: nnx.Module = jax.tree.map(
    lambda v: v.replace(uses=uses), module, is_leaf=lambda v: isinstance(v, nnx.Variable)
  )
  return used


def _for_each_period(
  blocks: nnx.List,
  common: nnx.Dict,
  first: int,
  n: int,
  unroll: bool,
  keep_state: bool,
  x: Array,
  ctx: Context,
  state: State,
  one_token: bool,
) -> Output:
  """Apply the n periods of a group one after the other: unrolled or scanned. The group starts with
  block number `first` of the stack.

  A scan carries states that are kept, and updates them in place: as inputs and outputs of a scan
  they would be in memory twice. States that are only read are inputs, since the gradient of a carry
  adds up n arrays of full size."""
  run = _period(ctx, one_token)
  if n == 1:
    return run(blocks, common, first, x, ctx, state)
  if unroll:
    starts = range(first, first + n * len(blocks), len(blocks))
    periods = [
      lambda x, ctx, s, _, p=p, at=at: run(p, common, at, x, ctx, s)
      for p, at in zip(_split(blocks, n), starts, strict=True)
    ]
    states = None if state is None else _split(state, n)
    out = apply_sequentially(periods, x, ctx, states, one_token)
    _check_no_share(out)
    after = None if state is None else jax.tree.map(lambda *s: jnp.stack(s), *out.state)
    return dataclasses.replace(out, state=after)

  def body(carried, period):
    x, states = carried
    i, blocks, read = period
    if keep_state:
      read = jax.tree.map(lambda s: jax.lax.dynamic_index_in_dim(s, i, keepdims=False), states)
    out = run(blocks, common, first + i * len(blocks), x, ctx.fold(i), read)
    _check_no_share(out)
    if keep_state:
      states = jax.tree.map(
        lambda s, after: jax.lax.dynamic_update_index_in_dim(s, after, i, 0), states, out.state
      )
    return (out.y, states), (out.aux, out.alignments)

  kept, read = (state, None) if keep_state else (None, state)
  (y, state), (aux, by_block) = jax.lax.scan(body, (x, kept), (jnp.arange(n), blocks, read))
  alignments = tuple(a[i] for i in range(n) for a in by_block)
  aux = {
    k: v.sum(0) if k.startswith('loss/') else v.reshape(-1, *v.shape[2:]) for k, v in aux.items()
  }
  return Output(y, state, aux, alignments=alignments)


def _check_no_share(out: Output) -> None:
  if out.share:
    raise ValueError(
      f'a repeated block cannot share values ({", ".join(out.share)}): put it in a group of its own'
    )


def _split(tree: Any, n: int) -> list[Any]:
  """A stacked tree as a list of its n periods."""
  # `split` once, not an index per period: its transpose is one concatenation, that of indexing adds
  # up n arrays of full size.
  parts = jax.tree.map(
    lambda p: tuple(q.reshape(p.shape[1:]) for q in jax.lax.split(p, (1,) * n, axis=0)), tree
  )
  graph, leaves = jax.tree.structure(tree), jax.tree.leaves(parts)
  return [jax.tree.unflatten(graph, leaves[i::n]) for i in range(n)]


# ---- rematerialization -------------------------------------------------------------------------


def _period(ctx: Context, one_token: bool) -> Callable[..., Output]:
  """The blocks of one period as a function, with the remat policy of `ctx`."""
  gather = needs_all_gather() and not one_token  # for one token it costs less to send activations

  def run(
    blocks: nnx.List, common: nnx.Dict, first: int | Array, x: Array, ctx: Context, state: State
  ) -> Output:
    blocks = _unsharded(blocks) if gather else blocks
    if common:
      blocks = bound(blocks, _unsharded(common) if gather else common, first)
    return apply_sequentially(blocks, x, ctx, state, one_token)

  if ctx.remat != 'none':
    policy = REMAT[ctx.remat] or _policies.everything_saveable
  elif gather:
    # Unsharded weights are not kept for the backward pass, or each device would come to hold those
    # of all periods.
    policy = _all_but_unsharded
  else:
    return run
  return jax.checkpoint(run, policy=_without_complex(policy), prevent_cse=False)


def _unsharded(modules: Modules) -> Modules:
  """The blocks of a period, or what layers have in common, with all-gathered weights. Left to
  itself, the partitioner gathers some weights twice in the backward pass."""

  def replicate(p: nnx.Param) -> Any:
    return p.replace(unshard(p[...], p.get_metadata()['axes'][-p[...].ndim :]))

  unsharded: Modules = jax.tree.map(
    replicate, modules, is_leaf=lambda p: isinstance(p, nnx.Variable)
  )
  return unsharded


def _all_but_unsharded(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive.name != 'sharding_constraint'


def _without_complex(policy: Callable[..., Any]) -> Callable[..., Any]:
  """A policy that saves no complex numbers: JAX rounds what is saved to its own precision, and
  cannot do so with complex ones."""

  def saves(primitive: Any, *inputs: Any, **settings: Any) -> Any:
    name, kind = primitive.name, str(settings.get('fft_type', ''))
    makes = name == 'complex' or 'RFFT' in kind or 'complex' in str(settings.get('new_dtype', ''))
    takes = any('complex' in str(getattr(x, 'dtype', '')) for x in inputs) and name not in (
      'real',
      'imag',
      'abs',
    )
    return (
      False if 'IRFFT' not in kind and (makes or takes) else policy(primitive, *inputs, **settings)
    )

  return saves
