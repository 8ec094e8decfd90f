"""A block: a tuple of residual branches. The type of a branch says where norm and residual are."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.config import Config
from jaxformer.layers.layer import (
  CommonConfig,
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
  dropout,
  merge_aux,
)
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import Norm, NormConfig, RMSNorm
from jaxformer.sharding import shard


class BranchConfig(Config, abstract=True):
  """Base of the branches: a layer and how it joins the residual stream. All share one module,
  `Branch`.

  Attributes:
    layer: the layer; its type says which.
    dropout: rate on the layer's output before it joins.
    tied_dropout: rate at which whole channels of it are dropped, the same at all positions.
    scale: constant factor on what joins the residual stream (Granite's residual multiplier); None
      for 1.
  """

  layer: LayerConfig
  dropout: float = 0.0
  tied_dropout: float = 0.0
  scale: float | None = None

  def validate(self):
    self.require_rate('dropout', 'tied_dropout')
    self.require_positive('scale')

  def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Branch:
    return Branch(self, width, rngs, position)

  def build_norm(self, width: int) -> nnx.Module | None:
    return None

  def apply(self, x: Array, layer: Callable[[Array], Array], norm: Any) -> Array:
    """Return the residual stream after the branch; `norm` is the module of `build_norm`."""
    raise NotImplementedError

  def joined(self, x: Array, y: Array) -> Array:
    """Return the residual stream x with y, times `scale`, added to it."""
    return x + (y if self.scale is None else self.scale * y)

  def out_width(self, width: int) -> int:
    """The width after the branch. Raises `InputError` for a sum of vectors of different widths."""
    out = self.layer.out_width(width)
    self.require(
      out == width,
      'layer',
      f'one whose output is as wide as its input; {self.layer.tag} changes {width} to {out}',
    )
    return out


class PreNorm(BranchConfig):
  """x + layer(norm(x)) (GPT-2 and most since)."""

  norm: NormConfig = RMSNorm()

  def build_norm(self, width: int) -> Norm:
    return self.norm.build(width)

  def apply(self, x, layer, norm):
    return self.joined(x, layer(norm(x)))


class NormOnly(BranchConfig):
  """layer(norm(x)), without a sum (the layers of the shared block of Zamba, Glorioso et al.
  2024)."""

  norm: NormConfig = RMSNorm()

  def validate(self):
    super().validate()
    self.require(self.scale is None, 'scale', 'none in a branch without a residual stream')

  def build_norm(self, width: int) -> Norm:
    return self.norm.build(width)

  def apply(self, x, layer, norm):
    return layer(norm(x))

  def out_width(self, width: int) -> int:
    return self.layer.out_width(width)


class PostNorm(BranchConfig):
  """norm(x + layer(x)) (Vaswani et al. 2017)."""

  norm: NormConfig = RMSNorm()

  def build_norm(self, width: int) -> Norm:
    return self.norm.build(width)

  def apply(self, x, layer, norm):
    return norm(self.joined(x, layer(x)))


class NormAfter(BranchConfig):
  """x + norm(layer(x)): the norm on the layer's output (OLMo 2)."""

  norm: NormConfig = RMSNorm()

  def build_norm(self, width: int) -> Norm:
    return self.norm.build(width)

  def apply(self, x, layer, norm):
    return self.joined(x, norm(layer(x)))


class SandwichNorm(BranchConfig):
  """x + norm_after(layer(norm_before(x))): norms on both sides of the layer (Gemma 2 and 3).

  Attributes:
    norm: of both norms, which have parameters of their own.
  """

  norm: NormConfig = RMSNorm()

  def build_norm(self, width: int) -> NormPair:
    return NormPair(self.norm, width)

  def apply(self, x, layer, norm):
    return self.joined(x, norm.after(layer(norm.before(x))))


class ResidualOfNorm(BranchConfig):
  """residual n + layer(n) with n = norm(x): the sum starts from the normalized stream (MiniMax
  2025).

  With the norm of the next branch this is norm(residual x + layer(x)), DeepNorm (Wang et al. 2022,
  section 3.1), from the second branch on.

  Attributes:
    residual: constant factor on the normalized stream.
  """

  norm: NormConfig = RMSNorm()
  residual: float = 1.0

  def validate(self):
    super().validate()
    self.require_positive('residual')

  def build_norm(self, width: int) -> Norm:
    return self.norm.build(width)

  def apply(self, x, layer, norm):
    n = norm(x)
    return self.joined(n if self.residual == 1.0 else self.residual * n, layer(n))


class Residual(BranchConfig):
  """x + layer(x), without a norm (Shazeer et al. 2017, appendix C.1)."""

  def apply(self, x, layer, norm):
    return self.joined(x, layer(x))


class Plain(BranchConfig):
  """layer(x), without norm or sum (stacks of LSTMs)."""

  def validate(self):
    super().validate()
    self.require(self.scale is None, 'scale', 'none in a branch without a residual stream')

  def apply(self, x, layer, norm):
    return layer(x)

  def out_width(self, width: int) -> int:
    return self.layer.out_width(width)


class NormPair(nnx.Module):
  """A norm before a layer and one after it."""

  def __init__(self, config: NormConfig, width: int):
    self.before = config.build(width)
    self.after = config.build(width)


class Branch(nnx.Module):
  """A layer, perhaps a norm, and the config's way to apply them."""

  def __init__(self, config: BranchConfig, width: int, rngs: nnx.Rngs, position: LayerPosition):
    self.config = config
    self.layer: Layer = config.layer.build(width, rngs, position)
    self.norm = config.build_norm(width)

  def __call__(self, x: Array, ctx: Context, state: State, one_token: bool) -> Output:
    run = self.layer.step if one_token else self.layer
    out: list[Output] = []  # set by `layer`, which the config applies once

    def layer(x: Array) -> Array:
      out.append(run(x if ctx.compute_dtype is None else x.astype(ctx.compute_dtype), ctx, state))
      y = dropout(out[0].y, self.config.dropout, ctx)
      return dropout(y, self.config.tied_dropout, ctx.fold(2), tied=True)

    # The name stands in the operations of the compiled program, for profiles of it.
    with jax.named_scope(type(self.layer).__name__):
      y = self.config.apply(x, layer, self.norm)
    if ctx.compute_dtype is not None:
      y = y.astype(x.dtype)
    return dataclasses.replace(out[0], y=shard(y, 'batch', *('time',) * (y.ndim - 2), 'embed'))


def widths(parts: Iterable[Any], width: int) -> list[int]:
  """The width before each of some branches, blocks or groups, and after the last."""
  return list(itertools.accumulate(parts, lambda w, part: part.out_width(w), initial=width))


class Block(nnx.Module):
  """Residual branches one after the other: one (Mamba), two (a transformer) or more."""

  class Config(Config):
    branches: tuple[BranchConfig, ...]

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Block:
      return Block(self, width, rngs, position)

    def out_width(self, width: int) -> int:
      """The width after the block."""
      return widths(self.branches, width)[-1]

  def __init__(self, config: Block.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    self.branches = nnx.List(
      [
        b.build(w, rngs, position)
        for b, w in zip(config.branches, widths(config.branches, width), strict=False)
      ]
    )

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> tuple[State, ...]:
    """`Layer.init_state` of its layers; `memory.state` holds the states of a block of the
    encoder."""
    if memory is None or memory.state is None:
      return tuple(b.layer.init_state(batch, max_len, memory) for b in self.branches)
    return tuple(
      b.layer.init_state(batch, max_len, memory.replace(state=s))
      for b, s in zip(self.branches, memory.state, strict=True)
    )

  def select_rows(
    self, state: tuple[State, ...], index: Array, same_source: bool = False
  ) -> tuple[State, ...]:
    """`Layer.select_rows` of its layers."""
    return tuple(
      b.layer.select_rows(s, index, same_source) for b, s in zip(self.branches, state, strict=True)
    )

  def bind(self, common: Mapping[str, nnx.Module], index: int | Array) -> None:
    """`Layer.bind` of its layers."""
    for branch in self.branches:
      branch.layer.bind(common, index)

  def handed_over(self, state: tuple[State, ...]) -> tuple[State, ...]:
    """`Layer.handed_over` of its layers."""
    return tuple(b.layer.handed_over(s) for b, s in zip(self.branches, state, strict=True))

  def __call__(
    self, x: Array, ctx: Context, state: tuple[State, ...] | None, one_token: bool
  ) -> Output:
    return apply_sequentially(self.branches, x, ctx, state, one_token)


class BlockLayer(Layer):
  """y = block(x), with its norms and residual sums (Dehghani et al. 2019, section 2.1).

  One layer that `Shared` can repeat. Its branch is `Plain`."""

  class Config(LayerConfig):
    """
    Attributes:
      block: the branches.
    """

    block: Block.Config = Block.Config(branches=(PreNorm(layer=GatedMlp.Config()),))

    @property
    def _layers(self) -> tuple[LayerConfig, ...]:
      return tuple(branch.layer for branch in self.block.branches)

    def _with_widths(self, width: int) -> list[tuple[LayerConfig, int]]:
      return list(zip(self._layers, widths(self.block.branches, width), strict=False))

    def resolved(self, width: int) -> BlockLayer.Config:
      branches = zip(self.block.branches, widths(self.block.branches, width), strict=False)
      resolved = tuple(b.replace(layer=b.layer.resolved(w)) for b, w in branches)
      return self.replace(block=self.block.replace(branches=resolved))

    @property
    def decodes(self) -> bool:
      return all(layer.decodes for layer in self._layers)

    @property
    def expert_count(self) -> int:
      return max(layer.expert_count for layer in self._layers)

    @property
    def experts_per_token(self) -> float:
      return sum(layer.experts_per_token for layer in self._layers)

    def out_width(self, width: int) -> int:
      return self.block.out_width(width)

    def memory_width(self, width: int) -> int | None:
      found = (layer.memory_width(w) for layer, w in self._with_widths(width))
      return next((w for w in found if w is not None), None)

    def reads(self, width: int) -> dict[str, int]:
      return {n: c for layer, w in self._with_widths(width) for n, c in layer.reads(w).items()}

    def common(self, width: int) -> dict[str, CommonConfig]:
      return {n: c for layer, w in self._with_widths(width) for n, c in layer.common(w).items()}

    @classmethod
    def examples(cls):
      return (cls(block=pre_norm(RMSNorm(), GatedMlp.Config(hidden=24))),)

    def mixing_flops_per_token(self, width, length, causal):
      return sum(
        layer.mixing_flops_per_token(w, length, causal) for layer, w in self._with_widths(width)
      )

  def __init__(
    self, config: BlockLayer.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.block = config.block.build(width, rngs, position)

  def bind(self, common, index) -> None:
    self.block.bind(common, index)

  def init_state(self, batch, max_len, memory=None) -> State:
    return self.block.init_state(batch, max_len, memory)

  def select_rows(self, state, index, same_source=False) -> State:
    return self.block.select_rows(state, index, same_source)

  def __call__(self, x_BTD: Array, ctx: Context, state: State = None) -> Output:
    return self.block(x_BTD, ctx, state, one_token=False)

  def step(self, x_BD: Array, ctx: Context, state: State) -> Output:
    return self.block(x_BD, ctx, state, one_token=True)


def pre_norm(norm: NormConfig, *layers: LayerConfig, dropout: float = 0.0) -> Block.Config:
  """Return a block of these layers, each in a `PreNorm` branch."""
  return Block.Config(
    branches=tuple(PreNorm(layer=layer, norm=norm, dropout=dropout) for layer in layers)
  )


def apply_sequentially(
  parts: Iterable[Callable[..., Output]],
  x: Array,
  ctx: Context,
  state: Sequence[State] | None,
  one_token: bool,
) -> Output:
  """Apply branches, blocks, periods or groups one after the other. Each sees the values that
  earlier ones share; `state` holds the state of each."""
  states, aux, share, alignments = [], {}, {}, ()
  for i, part in enumerate(parts):
    out = part(
      x,
      ctx.fold(i).replace(shared=ctx.shared | share),
      None if state is None else state[i],
      one_token,
    )
    x = out.y
    states.append(out.state)
    share |= out.share
    aux = merge_aux(aux, out.aux)
    alignments += out.alignments
  return Output(x, None if state is None else tuple(states), aux, share, alignments)


def with_pooled_losses(aux: dict[str, Array]) -> dict[str, Array]:
  """Replace the pairs of vectors of layers, `pooled/NAME/...` of `[L, 2, n]`, by losses
  `loss/NAME`: the inner product of their means over the layers."""
  kept = {name: v for name, v in aux.items() if not name.startswith('pooled/')}
  for name in aux.keys() - kept.keys():
    a, b = jnp.mean(aux[name], axis=0)
    kept = merge_aux(kept, {f'loss/{name.split("/")[1]}': jnp.sum(a * b)})
  return kept
