"""A stack: groups of (pattern of blocks, repeats). Repeated patterns are stored stacked and
scanned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.config import Config
from jaxformer.layers.layer import Context, LayerConfig, LayerPosition, Memory, Output, State
from jaxformer.models.block import Block, gather, in_turn
from jaxformer.models.params import stacked
from jaxformer.sharding import needs_all_gather, platform, unshard

_policies = jax.checkpoint_policies
NAMED = ('attention', 'mlp_hidden')  # what `checkpoint_name` marks in the layers

REMAT: dict[str, Callable[..., Any] | None] = {
  'none': None,  # keep all activations
  # keep the input of each period alone
  'full': _policies.nothing_saveable,
  # keep the products with weights
  'dots': _policies.dots_with_no_batch_dims_saveable,
  'attention': _policies.save_only_these_names('attention'),  # keep attention's output
  # keep it and the feed-forward's hidden units
  'names': _policies.save_only_these_names(*NAMED),
  # the same, in the host's memory
  'offload': _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(NAMED),
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
"""Remat policies by name: what the forward pass keeps for the backward pass."""

UNROLLED_BLOCKS = 16  # on a CPU, up to so many blocks run as a Python loop


class Group(Config):
  """A pattern of blocks, repeated.

  Attributes:
    pattern: the blocks of one period.
    repeats: periods; more than one are stacked on a leading axis of their parameters and scanned.
  """

  pattern: tuple[Block.Config, ...]
  repeats: int = 1

  def validate(self):
    self.require(self.repeats > 0, 'repeats', 'positive')
    self.require(len(self.pattern) > 0, 'pattern', 'at least one block')

  def widths(self, width: int) -> list[int]:
    """The width before each block of the pattern, and after the last. Raises `InputError` where
    what repeats changes it."""
    widths = [width]
    for block in self.pattern:
      widths.append(block.widths(widths[-1])[-1])
    self.require(
      self.repeats == 1 or widths[-1] == width,
      'repeats',
      f'1 where blocks make a width of {widths[-1]} of {width}',
    )
    return widths


def layers_with_widths(
  groups: tuple[Group, ...], width: int
) -> Iterator[tuple[LayerConfig, int, int]]:
  """Every layer's config with the width of its input, and how many times it stands in a stack whose
  input has `width`."""
  for group in groups:
    for block, before in zip(group.pattern, group.widths(width), strict=False):
      for branch, w in zip(block.branches, block.widths(before), strict=False):
        yield branch.layer, w, group.repeats
    width = group.widths(width)[-1]


def out_width(groups: tuple[Group, ...], width: int) -> int:
  """The width of a stack's output."""
  for group in groups:
    width = group.widths(width)[-1]
  return width


class Stack(nnx.Module):
  """Groups of blocks one after the other. Of their auxiliary values, losses come out added, others
  as a vector over the layers that give them, from the bottom up."""

  def __init__(self, groups: tuple[Group, ...], width: int, rngs: nnx.Rngs):
    layers = sum(len(g.pattern) * g.repeats for g in groups)
    branches = sum(len(b.branches) * g.repeats for g in groups for b in g.pattern)
    built, first = [], 0
    for g in groups:
      widths = g.widths(width)

      def period(rngs: nnx.Rngs, layer: int | Array, pattern=g.pattern, widths=widths) -> nnx.List:
        return nnx.List(
          [
            b.build(widths[i], rngs, LayerPosition(layer + i, layers, branches))
            for i, b in enumerate(pattern)
          ]
        )

      built.append(
        period(rngs, first)
        if g.repeats == 1
        else stacked(period, g.repeats, rngs, first, len(g.pattern))
      )
      first += len(g.pattern) * g.repeats
      width = widths[-1]
    self.groups = nnx.List(built)
    self.repeats = tuple(g.repeats for g in groups)

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
        for b in blocks
      )

    def periods(blocks: nnx.List, n: int) -> tuple[State, ...]:
      if memory is None:
        first = period(jax.tree.map(lambda p: p[0], blocks))
        return jax.tree.map(lambda z: jnp.broadcast_to(z, (n, *z.shape)), first)
      return jax.tree.map(lambda *s: jnp.stack(s), *(period(p) for p in _periods(blocks, n)))

    return tuple(
      period(g) if n == 1 else periods(g, n) for g, n in zip(self.groups, self.repeats, strict=True)
    )

  def select_rows(
    self, state: tuple[State, ...], index: Array, same_source: bool = False
  ) -> tuple[State, ...]:
    """`Layer.select_rows` of all layers."""

    def period(blocks: nnx.List, states: tuple[State, ...]) -> tuple[State, ...]:
      return tuple(
        b.select_rows(s, index, same_source) for b, s in zip(blocks, states, strict=True)
      )

    return tuple(
      period(g, s) if n == 1 else jax.vmap(lambda s, g=g: period(g, s))(s)
      for g, s, n in zip(self.groups, state, self.repeats, strict=True)
    )

  def handed_over(self, state: tuple[State, ...]) -> tuple[tuple[State, ...], ...]:
    """What an encoder in this final state hands over, by block from the bottom up
    (`Memory.states`)."""
    return tuple(
      block.handed_over(s)
      for blocks, states, n in zip(self.groups, state, self.repeats, strict=True)
      for period in ([states] if n == 1 else _periods(states, n))
      for block, s in zip(blocks, period, strict=True)
    )

  def __call__(
    self, x: Array, ctx: Context, state: tuple[State, ...] | None = None, one_token: bool = False
  ) -> Output:
    states, aux, share, alignments = [], {}, {}, ()
    for i, (blocks, n) in enumerate(zip(self.groups, self.repeats, strict=True)):
      run = _once if n == 1 else _unrolled if self._unroll(ctx) else _scanned
      out = run(
        blocks,
        n,
        x,
        ctx.fold(i).replace(shared=ctx.shared | share),
        None if state is None else state[i],
        one_token,
      )
      x = out.y
      states.append(out.state)
      share |= out.share
      aux = gather(aux, out.aux)
      alignments += out.alignments
    return Output(x, None if state is None else tuple(states), aux, share, alignments)

  def separated(self, ctx: Context) -> Stack:
    """For many steps in a loop: the same stack with the parameters of every period by themselves,
    where `ctx` unrolls them.

    A step then does not cut them out of the stacked ones, which copies all of them for each token.
    `separate_state` is the same for the state, and the loop can then update each cache in place.
    """
    if not self._unroll(ctx):
      return self
    stack = nnx.clone(self)
    groups = zip(self.groups, self.repeats, strict=True)
    stack.groups = nnx.List(
      [period for g, n in groups for period in ([g] if n == 1 else _periods(g, n))]
    )
    stack.repeats = (1,) * len(stack.groups)
    return stack

  def separate_state(self, state: tuple[State, ...], ctx: Context) -> tuple[State, ...]:
    """The state of this stack as that of `separated(ctx)`."""
    if not self._unroll(ctx):
      return state
    return tuple(
      p
      for s, n in zip(state, self.repeats, strict=True)
      for p in ([s] if n == 1 else _periods(s, n))
    )

  def _unroll(self, ctx: Context) -> bool:
    if ctx.unroll is not None:
      return ctx.unroll
    blocks = sum(len(g) * n for g, n in zip(self.groups, self.repeats, strict=True))
    return platform() == 'cpu' and blocks <= UNROLLED_BLOCKS


def _gathered(blocks: nnx.List) -> nnx.List:
  """The blocks of a period with whole weights. Left to itself, the partitioner gathers some weights
  in the backward pass twice."""

  def whole(p: nnx.Param) -> Any:
    return p.replace(unshard(p[...], p.get_metadata()['axes'][-p[...].ndim :]))

  gathered_blocks: nnx.List = jax.tree.map(
    whole, blocks, is_leaf=lambda p: isinstance(p, nnx.Variable)
  )
  return gathered_blocks


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive.name != 'sharding_constraint'


def _of_reals(policy: Callable[..., Any]) -> Callable[..., Any]:
  """A policy that keeps no complex numbers: JAX rounds what is kept to its own precision, and
  cannot do so with complex ones."""

  def keeps(primitive: Any, *inputs: Any, **settings: Any) -> Any:
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

  return keeps


def _rematerialised(ctx: Context, one_token: bool) -> Callable[..., Output]:
  gather = needs_all_gather() and not one_token  # for one token it costs less to send activations

  def run(blocks: nnx.List, x: Array, ctx: Context, state: State) -> Output:
    return in_turn(_gathered(blocks) if gather else blocks, x, ctx, state, one_token)

  if ctx.remat != 'none':
    return jax.checkpoint(
      run, policy=_of_reals(REMAT[ctx.remat] or _policies.everything_saveable), prevent_cse=False
    )
  # Whole weights are not kept for the backward pass, or each chip would come to hold those of all
  # periods.
  return (
    jax.checkpoint(run, policy=_of_reals(_all_but_gathered), prevent_cse=False) if gather else run
  )


def _once(
  blocks: nnx.List, n: int, x: Array, ctx: Context, state: State, one_token: bool
) -> Output:
  return _rematerialised(ctx, one_token)(blocks, x, ctx, state)


def _unrolled(
  blocks: nnx.List, n: int, x: Array, ctx: Context, state: State, one_token: bool
) -> Output:
  states, aux, alignments = [], {}, ()
  for i, (blocks_i, state_i) in enumerate(_periods((blocks, state), n)):
    out = _rematerialised(ctx, one_token)(blocks_i, x, ctx.fold(i), state_i)
    _no_share(out)
    x = out.y
    states.append(out.state)
    aux = gather(aux, out.aux)
    alignments += out.alignments
  return Output(
    x,
    None if state is None else jax.tree.map(lambda *s: jnp.stack(s), *states),
    aux,
    alignments=alignments,
  )


def _periods(tree: Any, n: int) -> list[Any]:
  """A stacked tree as a list of its n periods."""
  # `split` once, not an index a period: its transpose is one concatenation, that of indexing adds
  # up n arrays of full size.
  parts = jax.tree.map(
    lambda p: tuple(q.reshape(p.shape[1:]) for q in jax.lax.split(p, (1,) * n, axis=0)), tree
  )
  graph, leaves = jax.tree.structure(tree), jax.tree.leaves(parts)
  return [jax.tree.unflatten(graph, leaves[i::n]) for i in range(n)]


def _scanned(
  blocks: nnx.List, n: int, x: Array, ctx: Context, state: State, one_token: bool
) -> Output:
  def body(x: Array, period):
    i, blocks, state = period
    out = _rematerialised(ctx, one_token)(blocks, x, ctx.fold(i), state)
    _no_share(out)
    return out.y, (out.state, out.aux, out.alignments)

  y, (state, aux, by_block) = jax.lax.scan(body, x, (jnp.arange(n), blocks, state))
  alignments = tuple(a[i] for i in range(n) for a in by_block)
  aux = {k: v.sum(0) if k.startswith('loss/') else v.reshape(-1) for k, v in aux.items()}
  return Output(y, state, aux, alignments=alignments)


def _no_share(out: Output) -> None:
  if out.share:
    raise ValueError(
      f'a repeated block cannot share values ({", ".join(out.share)}): put it in a group of its own'
    )
