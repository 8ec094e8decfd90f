"""A sequence classifier: input, stack, norm, pooling, head."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.layers.init import FanInUniform, Init, Zeros
from jaxformer.layers.layer import Context, Output, positions_BT
from jaxformer.layers.norm import LayerNorm, NormConfig, build_norm
from jaxformer.models.embedder import Embedder, InputConfig
from jaxformer.models.head import Head
from jaxformer.models.model import BaseModel, ModelConfig
from jaxformer.models.stack import Group, Stack
from jaxformer.ops.loss import LossSums
from jaxformer.sharding import shard
from jaxformer.task_type import IGNORE, Batch, TaskType

# ---- one vector for a sequence -----------------------------------------------------------------


def mean_pooling(y_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']) -> Array:
  """The mean over the positions of the sequence, in fp32."""
  total = jnp.sum(jnp.where(valid_BT[:, :, None], y_BTD.astype(jnp.float32), 0.0), axis=1)
  return (total / jnp.maximum(jnp.sum(valid_BT, axis=1), 1)[:, None]).astype(y_BTD.dtype)


def last_pooling(y_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']) -> Array:
  """The last position of the sequence, for causal stacks."""
  last_B = jnp.maximum(jnp.sum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)
  return jnp.take_along_axis(y_BTD, last_B[:, None, None], axis=1)[:, 0]


POOLING = {'mean': mean_pooling, 'last': last_pooling}  # valid_BT is False at padding, at the end


# ---- the model ---------------------------------------------------------------------------------


class Classifier(BaseModel):
  """p(class | sequence) = softmax(W pool(norm(stack(input(sequence) + positions))) + b).

  `targets_BT` has the class of a row at the last position of its sequence, and -1 elsewhere (at all
  positions of a row that does not count). Sequences of unequal lengths are padded at the end, with
  `segments_BT` 1 in the sequence and 0 in the padding, which is a separate document: no layer
  passes anything between documents in either direction, and pooling excludes it, so padding has no
  effect."""

  class Config(ModelConfig):
    """
    Attributes:
      input: tokens or features.
      classes: number of classes.
      stack: groups of blocks; layers may be bidirectional.
      final_norm: norm before pooling; None for none (post-norm stacks).
      pooling: of all positions into one vector: their mean, or the last one, for causal stacks.
      head_init: initialization of W; `head_bias`: of b, with the fan-in of W.
    """

    input: InputConfig
    classes: int
    stack: tuple[Group, ...]
    final_norm: NormConfig | None = LayerNorm()
    pooling: Literal['mean', 'last'] = 'mean'
    head_init: Init = FanInUniform()
    head_bias: Init = Zeros()

    def validate(self):
      super().validate()
      self.require(self.classes > 1, 'classes', 'at least 2')

    def build(self, rngs: nnx.Rngs) -> Classifier:
      return Classifier(self, rngs)

    @property
    def task(self) -> TaskType:
      return dataclasses.replace(self.input.task, predicts='class', classes=self.classes)

    @property
    def stacks(self) -> tuple[tuple[Group, ...], ...]:
      return (self.stack,)

    def mixing_flops_per_token(self, length: int, causal: bool) -> float:
      """Those of the layers, and the head, which multiplies one vector per sequence."""
      layers = super().mixing_flops_per_token(length, causal)
      return layers + 2.0 * self.width * self.classes / length

  def __init__(self, config: Classifier.Config, rngs: nnx.Rngs):
    c, D = config, config.width
    self.config = c
    self.embedder = Embedder(c.input.build(D, rngs), c, rngs)
    self.stack = Stack(c.stack, D, rngs)
    self.final_norm = build_norm(c.final_norm, D)
    self.head = Head(D, c.classes, rngs, init=c.head_init, bias=c.head_bias, per_token=False)

  def read(self, batch: Batch, ctx: Context) -> Output:
    """What the head reads is one vector per sequence: T = 1."""
    B, T = batch.targets_BT.shape
    segments_BT = None if batch.segments_BT is None else jnp.asarray(batch.segments_BT)
    x = self.embedder(batch.inputs, positions_BT(segments_BT, B, T))
    out = self.stack(x, ctx.replace(segments_BT=segments_BT))
    y = out.y if self.final_norm is None else self.final_norm(out.y)
    valid_BT = jnp.ones((B, T), bool) if segments_BT is None else segments_BT > 0
    pooled = shard(POOLING[self.config.pooling](y, valid_BT), 'batch', 'embed')
    return dataclasses.replace(out, y=pooled[:, None])

  def targets(self, batch: Batch) -> Int[Array, 'B 1']:
    """The one target of each row, or -1."""
    return jnp.max(jnp.asarray(batch.targets_BT), axis=1, keepdims=True)

  def __call__(self, batch: Batch, ctx: Context = Context()) -> Float[Array, 'B V']:
    """Logits of the classes of every row, in fp32."""
    return self.head(self.read(batch, ctx).y[:, 0])

  def loss(
    self, batch: Batch, ctx: Context = Context(), **weights: float
  ) -> tuple[LossSums, dict[str, Array]]:
    """Sums of the loss over a batch, and auxiliary values: those of the layers, and `accuracy`,
    the fraction of correct classes; `weights` are those of `Head.loss`."""
    out, label_B1 = self.read(batch, ctx), self.targets(batch)
    sums = self.head.loss(out.y, label_B1, None, **weights)
    _, correct_B1 = self.head.scores(out.y, label_B1)
    return sums, out.aux | {'accuracy': jnp.sum(correct_B1) / jnp.maximum(sums.count, 1.0)}

  def scores(
    self, batch: Batch, ctx: Context = Context()
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    nll_B1, correct_B1 = super().scores(batch, ctx)
    target_BT = jnp.asarray(batch.targets_BT) != IGNORE
    return jnp.where(target_BT, nll_B1, 0.0), target_BT & correct_B1
