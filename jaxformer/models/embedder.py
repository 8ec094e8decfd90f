"""From what a model reads to what its stack reads: token tables, features, positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import Config
from jaxformer.layers.dense import Dense, EmbeddingTable
from jaxformer.layers.init import FanInUniform, Init, Normal
from jaxformer.layers.layer import Context, LayerPosition, dropout
from jaxformer.layers.norm import NormConfig, build_norm
from jaxformer.models.model import ModelConfig
from jaxformer.sharding import shard
from jaxformer.task_type import TaskType


class InputConfig(Config, abstract=True):
  """Base of what a model reads at each position."""

  @property
  def task(self) -> TaskType:
    """The inputs, as a task type."""
    raise NotImplementedError

  def build(self, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make a module from `Batch.inputs` to vectors, `[B, T, D]`."""
    raise NotImplementedError


class TokenInput(InputConfig):
  """A table with one vector per token. It is small in a classifier, and not sharded over tokens."""

  vocab_size: int
  init: Init = Normal(std=1.0)

  def validate(self):
    self.require_positive('vocab_size')

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)

  def build(self, width: int, rngs: nnx.Rngs) -> EmbeddingTable:
    return EmbeddingTable(self.init, (self.vocab_size, width), (None, 'embed'), rngs=rngs)


class LinearInput(Dense):
  """`features` numbers per position (pixels, audio samples), under a linear map with a bias."""

  class Config(InputConfig):
    features: int
    init: Init = FanInUniform()

    def validate(self):
      self.require_positive('features')

    @property
    def task(self) -> TaskType:
      return TaskType(inputs='features', features=self.features)

    def build(self, width: int, rngs: nnx.Rngs) -> LinearInput:
      return LinearInput(
        self.init,
        (self.features, width),
        (None, 'embed'),
        rngs=rngs,
        position=LayerPosition(),
        bias=self.init,
      )

  def __call__(self, x: Float[Array, 'B T F']) -> Float[Array, 'B T D']:
    return super().__call__(jnp.asarray(x).astype(self.dtype))


class Embedder(nnx.Module):
  """dropout(norm(scale input(x) + positions)).

  Args:
    input: from inputs to vectors.
    config: of the model, for its positions.
    norm: None for none (RWKV's ln0).
    scale: factor on the vectors; None for 1.
    dropout: rate.
  """

  def __init__(
    self,
    input: nnx.Module,
    config: ModelConfig,
    rngs: nnx.Rngs,
    *,
    norm: NormConfig | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
  ):
    self.input: Any = input
    self.positions = (
      None
      if config.positions is None
      else config.positions.build(config.width, config.context_length, rngs)
    )
    self.norm = build_norm(norm, config.width)
    self.scale, self.dropout = scale, dropout

  @jax.named_scope('Embedder')
  def __call__(
    self,
    inputs: Array,
    positions: Int[Array, '*B'],
    ctx: Context = Context(),
    input: nnx.Module | None = None,
  ) -> Float[Array, '*B D']:
    """Vectors of tokens or features at these positions; `input` replaces the module's own."""
    x = (input or self.input)(inputs)
    if self.scale is not None:
      x = x * self.scale
    if self.positions is not None:
      x = x + self.positions(positions).astype(x.dtype)
    if self.norm is not None:
      x = self.norm(x)
    x = dropout(x, self.dropout, ctx)
    return shard(x, 'batch', *('time',) * (x.ndim - 2), 'embed')
