"""Layers side by side on one input, as in hybrid heads."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.layers.attention import Attention
from jaxformer.layers.cross_attention import CrossAttention
from jaxformer.layers.layer import (
  CommonConfig,
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
  merge_aux,
)
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp, Mlp
from jaxformer.layers.moe import Moe


class Summand(Config):
  """One of the layers of `ParallelLayers`.

  Attributes:
    layer: the layer; its type says which.
    in_scale: constant factor on its input; None for 1.
    out_scale: constant factor on its output; None for 1.
  """

  layer: LayerConfig
  in_scale: float | None = None
  out_scale: float | None = None

  def validate(self):
    self.require_positive('in_scale', 'out_scale')


class ParallelLayers(Layer):
  """y = sum over i of b_i layer_i(a_i x), with constants a_i and b_i (Zuo et al. 2025, section 2).

  The state has that of each layer. What a layer shares is seen by later layers of the stack, not by
  those beside it. In a decoder that starts from the states of an encoder, the encoder has parallel
  layers in the same position."""

  class Config(LayerConfig):
    """
    Attributes:
      summands: the layers, with their factors.
    """

    summands: tuple[Summand, ...] = (
      Summand(layer=Attention.Config()),
      Summand(layer=GatedMlp.Config()),
    )

    def validate(self):
      self.require(len(self.summands) > 0, 'summands', 'at least one layer')

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
      return tuple(summand.layer for summand in self.summands)

    def resolved(self, width: int) -> ParallelLayers.Config:
      found = tuple(s.replace(layer=s.layer.resolved(width)) for s in self.summands)
      return self.replace(summands=found)

    @property
    def decodes(self) -> bool:
      return all(layer.decodes for layer in self.layers)

    @property
    def hands_over(self) -> bool:
      return all(layer.hands_over for layer in self.layers)

    @property
    def expert_count(self) -> int:
      """What a mesh axis may divide into parts of equal numbers in each layer."""
      return math.gcd(*(layer.expert_count for layer in self.layers))

    @property
    def experts_per_token(self) -> float:
      return sum(layer.experts_per_token for layer in self.layers)

    def out_width(self, width: int) -> int:
      found = {layer.out_width(width) for layer in self.layers}
      self.require(len(found) == 1, 'summands', f'layers of one output width; found {found}')
      return found.pop()

    def memory_width(self, width: int) -> int | None:
      found = {layer.memory_width(width) for layer in self.layers} - {None}
      self.require(len(found) < 2, 'summands', f'layers that read one encoder; found {found}')
      return found.pop() if found else None

    def reads(self, width: int) -> dict[str, int]:
      return {name: c for layer in self.layers for name, c in layer.reads(width).items()}

    def common(self, width: int) -> dict[str, CommonConfig]:
      return {name: c for layer in self.layers for name, c in layer.common(width).items()}

    @classmethod
    def examples(cls):
      attention, mlp = Attention.Config(heads=2), GatedMlp.Config(hidden=24)
      mamba = Mamba2.Config(d_state=4, head_dim=16, heads=2)
      plain = Mlp.Config(hidden=24, activation='relu')
      return (
        cls(
          summands=(
            Summand(layer=mamba, in_scale=1.25, out_scale=0.5),
            Summand(layer=attention, in_scale=0.8, out_scale=0.9),
          )
        ),
        cls(summands=(Summand(layer=Moe.Config(experts=4, expert=mlp)), Summand(layer=plain))),
        cls(
          summands=(
            Summand(layer=CrossAttention.Config(heads=2, source_width=24), out_scale=0.7),
            Summand(layer=attention),
          )
        ),
      )

    def mixing_flops_per_token(self, width, length, causal):
      return sum(layer.mixing_flops_per_token(width, length, causal) for layer in self.layers)

  def __init__(
    self, config: ParallelLayers.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.config = config
    self.layers = nnx.List([layer.build(width, rngs, position) for layer in config.layers])

  def bind(self, common: Mapping[str, Any], index: int | Array) -> None:
    for layer in self.layers:
      layer.bind(common, index)

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> tuple[State, ...]:
    """The state of each layer; `memory.state` holds the states of the encoder's parallel layers."""
    if memory is None or memory.state is None:
      return tuple(layer.init_state(batch, max_len, memory) for layer in self.layers)
    return tuple(
      layer.init_state(batch, max_len, memory.replace(state=state))
      for layer, state in zip(self.layers, memory.state, strict=True)
    )

  def select_rows(
    self, state: tuple[State, ...], index: Array, same_source: bool = False
  ) -> tuple[State, ...]:
    states = zip(self.layers, state, strict=True)
    return tuple(layer.select_rows(s, index, same_source) for layer, s in states)

  def handed_over(self, state: tuple[State, ...]) -> tuple[State, ...]:
    return tuple(layer.handed_over(s) for layer, s in zip(self.layers, state, strict=True))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: tuple[State, ...] | None = None
  ) -> Output:
    return self._sum(x_BTD, ctx, state, one_token=False)

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: tuple[State, ...]) -> Output:
    return self._sum(x_BD, ctx, state, one_token=True)

  def _sum(
    self, x: Array, ctx: Context, state: tuple[State, ...] | None, one_token: bool
  ) -> Output:
    """The scaled sum, with what all layers return beside it."""
    ys, states, aux, share, alignments = [], [], {}, {}, ()
    for i, (layer, part) in enumerate(zip(self.layers, self.config.summands, strict=True)):
      run = layer.step if one_token else layer
      scaled = x if part.in_scale is None else part.in_scale * x
      out = run(scaled, ctx.fold(i), None if state is None else state[i])
      ys.append(out.y if part.out_scale is None else part.out_scale * out.y)
      states.append(out.state)
      aux, share = merge_aux(aux, out.aux), share | out.share
      alignments += out.alignments
    y = functools.reduce(operator.add, ys)
    return Output(y, None if state is None else tuple(states), aux, share, alignments)
