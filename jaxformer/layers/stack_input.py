"""A layer that reads the input of the stack beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.layers.layer import (
  STACK_INPUT,
  CommonConfig,
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
)
from jaxformer.layers.mlp import LinearMap


class WithStackInput(Layer):
  """y = layer([x, e]) with the input e of the stack, the embeddings (Glorioso et al. 2024, "Zamba",
  section 2).

  The layer inside has inputs of twice the width. A stack whose input is as wide as x."""

  class Config(LayerConfig):
    """
    Attributes:
      layer: what reads both.
    """

    layer: LayerConfig = LinearMap.Config(out=32)

    def resolved(self, width: int) -> WithStackInput.Config:
      return self.replace(layer=self.layer.resolved(2 * width))

    @property
    def decodes(self) -> bool:
      return self.layer.decodes

    @property
    def expert_count(self) -> int:
      return self.layer.expert_count

    @property
    def experts_per_token(self) -> float:
      return self.layer.experts_per_token

    def out_width(self, width: int) -> int:
      return self.layer.out_width(2 * width)

    def memory_width(self, width: int) -> int | None:
      return self.layer.memory_width(2 * width)

    def reads(self, width: int) -> dict[str, int]:
      return {STACK_INPUT: width, **self.layer.reads(2 * width)}

    def common(self, width: int) -> dict[str, CommonConfig]:
      # the stack would build them for inputs of `width`
      found = self.layer.common(2 * width)
      self.require(not found, 'layer', 'one without modules in common; share this layer instead')
      return found

    def mixing_flops_per_token(self, width, length, causal):
      return self.layer.mixing_flops_per_token(2 * width, length, causal)

  def __init__(self, config: WithStackInput.Config, width: int, rngs: Any, position: LayerPosition):
    self.layer = config.layer.build(2 * width, rngs, position)

  def bind(self, common: Mapping[str, Any], index: int | Array) -> None:
    self.layer.bind(common, index)

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> State:
    return self.layer.init_state(batch, max_len, memory)

  def select_rows(self, state, index, same_source=False) -> State:
    return self.layer.select_rows(state, index, same_source)

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: State = None) -> Output:
    return self.layer(_beside(x_BTD, ctx.shared[STACK_INPUT]), ctx, state)

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: State) -> Output:
    return self.layer.step(_beside(x_BD, ctx.shared[STACK_INPUT][:, 0]), ctx, state)


def _beside(x: Array, stack_input: Array) -> Array:
  return jnp.concatenate([x, stack_input.astype(x.dtype)], axis=-1)
