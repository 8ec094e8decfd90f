"""An autoencoder of token sequences: what a stack knows at the last position is all that its
decoder reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, LayerPosition, positions_BT, starts_BT
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.layers.position import SinusoidalPositions
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group, Stack
from jaxformer.ops.linear import linear
from jaxformer.ops.loss import LossSums, cross_entropy, token_scores
from jaxformer.sharding import param, shard
from jaxformer.task_type import Batch, TaskType


class Autoencoder(nnx.Module):
  """p(token t | the sequence) = softmax(W norm(mlp(z + PE(t))) + b), with z the output of
  stack(embedding(tokens) + positions) at the last position (the MAD suite's model for compression:
  Poli et al. 2024, section 3.1 and appendix B).

  The decoder, mlp(x) = gelu(W2 norm(gelu(W1 norm(x) + b1)) + b2), is of the stack's width and sees
  no token: nothing but the sinusoids PE(t) tells it where it is. Sequences all end at the last
  position of their row: there are no segments."""

  class Config(ModelConfig):
    """
    Attributes:
      vocab_size: rows of the embedding.
      stack: groups of blocks.
      norm: of the decoder and before the head.
      embedding_init, init: initial values of the embedding, and of the decoder and the head.
        Offsets begin at zero.
    """

    vocab_size: int
    stack: tuple[Group, ...]
    norm: NormConfig = RMSNorm.Config()
    embedding_init: Init = Normal()
    init: Init = Normal()

    def validate(self):
      super().validate()
      self.require(self.vocab_size > 0, 'vocab_size', 'positive')

    def build(self, rngs: nnx.Rngs) -> Autoencoder:
      return Autoencoder(self, rngs)

    @property
    def task(self) -> TaskType:
      return TaskType(predicts='sequence', vocab_size=self.vocab_size)

    @property
    def stacks(self) -> tuple[tuple[Group, ...], ...]:
      return (self.stack,)

  def __init__(self, config: Autoencoder.Config, rngs: nnx.Rngs):
    c, D, V = config, config.width, config.vocab_size
    self.config = c
    self.embedding = param(
      c.embedding_init(rngs.params(), (V, D), V, LayerPosition()), ('vocab', 'embed'), matmul=False
    )
    self.positions = None if c.positions is None else c.positions.build(D, c.context_length, rngs)
    self.stack = Stack(c.stack, D, rngs)
    self.places = SinusoidalPositions(SinusoidalPositions.Config(), D)
    self.norm_1, self.norm_2, self.norm_3 = c.norm.build(D), c.norm.build(D), c.norm.build(D)
    self.w_1, self.w_2 = (
      param(c.init(rngs.params(), (D, D), D, LayerPosition()), ('embed', None)) for _ in range(2)
    )
    self.b_1, self.b_2 = (param(jnp.zeros(D), ('norm',), decay=False) for _ in range(2))
    self.head = param(c.init(rngs.params(), (D, V), D, LayerPosition()), ('embed', 'vocab'))
    self.head_bias = param(jnp.zeros(V), ('vocab',), decay=False)

  def _hidden(self, batch: Batch, ctx: Context) -> tuple[Float[Array, 'B T D'], dict[str, Array]]:
    """What the head reads at every position."""
    tokens_BT = jnp.asarray(batch.inputs)
    B, T = tokens_BT.shape
    position_BT = positions_BT(starts_BT(None, B, T))
    x = jnp.take(self.embedding[...], tokens_BT, axis=0, mode='clip')
    if self.positions is not None:
      x = x + self.positions(position_BT).astype(x.dtype)
    out = self.stack(shard(x, 'batch', 'time', 'embed'), ctx)
    y = shard(out.y[:, -1:] + self.places(position_BT).astype(x.dtype), 'batch', 'time', 'embed')
    y = jax.nn.gelu(linear(self.norm_1(y), self.w_1[...], self.b_1[...]), approximate=False)
    y = jax.nn.gelu(linear(self.norm_2(y), self.w_2[...], self.b_2[...]), approximate=False)
    return self.norm_3(y), out.aux

  def __call__(self, batch: Batch, ctx: Context = Context()) -> Float[Array, 'B T V']:
    """Logits of the tokens at every position, in fp32."""
    logits = linear(self._hidden(batch, ctx)[0], self.head[...]).astype(jnp.float32)
    return logits + self.head_bias[...].astype(jnp.float32)[None, None]

  def loss(
    self, batch: Batch, ctx: Context = Context(), z_loss: float = 0.0, label_smoothing: float = 0.0
  ) -> tuple[LossSums, dict[str, Array]]:
    """Sums of the loss over a batch, and the layers' auxiliary scalars."""
    y, aux = self._hidden(batch, ctx)
    sums = cross_entropy(
      y,
      self.head[...],
      jnp.asarray(batch.targets_BT),
      bias_V=self.head_bias[...],
      z_loss=z_loss,
      label_smoothing=label_smoothing,
    )
    return sums, aux

  def scores(
    self, batch: Batch, ctx: Context = Context()
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """-log p(target) of every position, in nats, fp32, and whether no token is likelier; 0 and
    False where there is no target."""
    return token_scores(
      self._hidden(batch, ctx)[0],
      self.head[...],
      jnp.asarray(batch.targets_BT),
      bias_V=self.head_bias[...],
    )


def autoencoder(model: LanguageModel.Config) -> Autoencoder.Config:
  """An autoencoder with the stack, the width and the positions of a language model, to put an
  architecture to `Compression`."""
  return Autoencoder.Config(
    vocab_size=model.vocab_size,
    width=model.width,
    context_length=model.context_length,
    stack=model.stack,
    positions=model.positions,
    norm=model.final_norm or RMSNorm.Config(),
    embedding_init=model.embedding_init,
  )
