"""A sequence classifier: input, stack, norm, pooling, head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config
from jaxformer.layers.init import FanInUniform, Init, Normal
from jaxformer.layers.layer import Context, LayerPosition, positions_BT, starts_BT
from jaxformer.layers.norm import LayerNorm, NormConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group, Stack
from jaxformer.ops.linear import linear
from jaxformer.ops.loss import LossSums
from jaxformer.sharding import param, shard
from jaxformer.task_type import IGNORE, Batch, TaskType

# ---- what goes in ------------------------------------------------------------------------------


class InputConfig(Config, abstract=True):
  """Base of what a classifier reads at each position."""

  @property
  def task(self) -> TaskType:
    """The inputs."""
    raise NotImplementedError

  def build(self, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """A module from a batch to vectors, `[B, T, D]`."""
    raise NotImplementedError


class TokenInput(nnx.Module):
  """Tokens, each with a vector of its own."""

  class Config(InputConfig):
    vocab_size: int
    init: Init = Normal(std=1.0)

    def validate(self):
      self.require(self.vocab_size > 0, 'vocab_size', 'positive')

    @property
    def task(self) -> TaskType:
      return TaskType(vocab_size=self.vocab_size)

    def build(self, width: int, rngs: nnx.Rngs) -> TokenInput:
      return TokenInput(self, width, rngs)

  def __init__(self, config: TokenInput.Config, width: int, rngs: nnx.Rngs):
    V = config.vocab_size
    self.embedding = param(
      config.init(rngs.params(), (V, width), V, LayerPosition()), (None, 'embed'), matmul=False
    )

  def __call__(self, batch: Any) -> Float[Array, 'B T D']:
    return jnp.take(self.embedding[...], batch.inputs, axis=0, mode='clip')


class LinearInput(nnx.Module):
  """`features` numbers a position (pixels, samples of a wave), under a linear map with offsets."""

  class Config(InputConfig):
    features: int
    init: Init = FanInUniform()

    def validate(self):
      self.require(self.features > 0, 'features', 'positive')

    @property
    def task(self) -> TaskType:
      return TaskType(inputs='features', features=self.features)

    def build(self, width: int, rngs: nnx.Rngs) -> LinearInput:
      return LinearInput(self, width, rngs)

  def __init__(self, config: LinearInput.Config, width: int, rngs: nnx.Rngs):
    F = config.features
    self.w = param(config.init(rngs.params(), (F, width), F, LayerPosition()), (None, 'embed'))
    self.b = param(config.init(rngs.params(), (width,), F, LayerPosition()), ('norm',), decay=False)

  def __call__(self, batch: Any) -> Float[Array, 'B T D']:
    return linear(jnp.asarray(batch.inputs).astype(self.w[...].dtype), self.w[...], self.b[...])


# ---- one vector for a sequence -----------------------------------------------------------------


class Pooling(Config, abstract=True):
  """Base of the ways to make one vector of those of all positions."""

  def __call__(
    self, y_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']
  ) -> Float[Array, 'B D']:
    """`valid_BT` is False where a row is padding, which is at its end."""
    raise NotImplementedError


class MeanPooling(Pooling):
  """The mean over the positions of the sequence, in fp32."""

  def __call__(self, y_BTD, valid_BT):
    total = jnp.sum(jnp.where(valid_BT[:, :, None], y_BTD.astype(jnp.float32), 0.0), axis=1)
    return (total / jnp.maximum(jnp.sum(valid_BT, axis=1), 1)[:, None]).astype(y_BTD.dtype)


class LastPooling(Pooling):
  """The last position of the sequence: what a causal stack knows when it has read all."""

  def __call__(self, y_BTD, valid_BT):
    last_B = jnp.maximum(jnp.sum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(y_BTD, last_B[:, None, None], axis=1)[:, 0]


# ---- the model ---------------------------------------------------------------------------------


class Classifier(nnx.Module):
  """p(class | sequence) = softmax(W pool(norm(stack(input(sequence) + positions))) + b).

  A batch is that of a language model, with tokens or features as inputs: the class of a row stands in
  `targets_BT` at the last position of its sequence, and -1 everywhere else (in all of a row that
  does not count). Sequences of unequal lengths are padded at the end, with `segments_BT` 1 in the
  sequence and 0 in the padding, which is a document of its own: no layer passes anything between
  documents in either direction, and pooling leaves the padding out, so that it changes nothing."""

  class Config(ModelConfig):
    """
    Attributes:
      input: tokens or numbers.
      classes: of which one is the answer.
      stack: groups of blocks; layers in both directions are welcome.
      final_norm: norm before pooling; None for none (post-norm stacks).
      pooling: how one vector comes of all positions.
      head_init: initial values of W; b begins at zero.
    """

    input: InputConfig
    classes: int
    stack: tuple[Group, ...]
    final_norm: NormConfig | None = LayerNorm.Config()
    pooling: Pooling = MeanPooling()
    head_init: Init = FanInUniform()

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
    self.input = c.input.build(D, rngs)
    self.positions = None if c.positions is None else c.positions.build(D, c.context_length, rngs)
    self.stack = Stack(c.stack, D, rngs)
    self.final_norm = None if c.final_norm is None else c.final_norm.build(D)
    self.head = param(
      c.head_init(rngs.params(), (D, c.classes), D, LayerPosition()), ('embed', None), matmul=False
    )
    self.head_bias = param(jnp.zeros(c.classes), (None,), decay=False)

  def _logits(self, batch: Batch, ctx: Context) -> tuple[Float[Array, 'B V'], dict[str, Array]]:
    B, T = batch.targets_BT.shape
    segments_BT = None if batch.segments_BT is None else jnp.asarray(batch.segments_BT)
    x = self.input(batch)
    if self.positions is not None:
      x = x + self.positions(positions_BT(starts_BT(segments_BT, B, T))).astype(x.dtype)
    out = self.stack(shard(x, 'batch', 'time', 'embed'), ctx.replace(segments_BT=segments_BT))
    y = out.y if self.final_norm is None else self.final_norm(out.y)
    valid_BT = jnp.ones((B, T), bool) if segments_BT is None else segments_BT > 0
    pooled = shard(self.config.pooling(y, valid_BT), 'batch', 'embed')
    bias = self.head_bias[...].astype(jnp.float32)
    return linear(pooled, self.head[...]).astype(jnp.float32) + bias[None], out.aux

  def __call__(self, batch: Batch, ctx: Context = Context()) -> Float[Array, 'B V']:
    """Logits of the classes of every row, in fp32."""
    return self._logits(batch, ctx)[0]

  def loss(
    self, batch: Batch, ctx: Context = Context(), z_loss: float = 0.0, label_smoothing: float = 0.0
  ) -> tuple[LossSums, dict[str, Array]]:
    """Sums of the loss over a batch, and auxiliary scalars: those of the layers, and `accuracy`,
    the fraction of right answers."""
    logits, aux = self._logits(batch, ctx)
    nll, hit, lse, counted = _scored(logits, _labels(batch))
    count = jnp.sum(counted).astype(jnp.float32)
    # the target's logit above the mean of all (`ops.loss`)
    smooth = label_smoothing * (lse - nll - logits.mean(-1))
    loss = jnp.sum(nll + jnp.where(counted, z_loss * jnp.square(lse) + smooth, 0.0))
    sums = LossSums(loss, jax.lax.stop_gradient(jnp.sum(nll)), count)
    return sums, aux | {'accuracy': jnp.sum(hit) / jnp.maximum(count, 1.0)}

  def scores(
    self, batch: Batch, ctx: Context = Context()
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """-log p(class) in nats, and whether no class is likelier, where a target stands; 0 and False
    elsewhere."""
    nll, hit, _, _ = _scored(self._logits(batch, ctx)[0], _labels(batch))
    asked_BT = jnp.asarray(batch.targets_BT) != IGNORE
    return jnp.where(asked_BT, nll[:, None], 0.0), asked_BT & hit[:, None]


def _labels(batch: Batch) -> Int[Array, ' B']:
  """The one target of each row, or -1."""
  return jnp.max(jnp.asarray(batch.targets_BT), axis=1)


def _scored(logits_BV: Array, label_B: Array) -> tuple[Array, Array, Array, Array]:
  """nll, whether the answer is right, logsumexp, and whether the row counts."""
  counted = label_B != IGNORE
  lse = jax.nn.logsumexp(logits_BV, axis=-1)
  picked = jnp.take_along_axis(logits_BV, jnp.maximum(label_B, 0)[:, None], axis=-1)[:, 0]
  return (
    jnp.where(counted, lse - picked, 0.0),
    counted & (picked >= jnp.max(logits_BV, axis=-1)),
    lse,
    counted,
  )
