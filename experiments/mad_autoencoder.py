"""The compression task of the MAD suite, with the autoencoder that it needs.

Question: how much of a sequence is in the last hidden state of an architecture? All that the
decoder reads is the output of the stack at the last position, and it must reconstruct every token
(Poli et al. 2024, section 3.1 and appendix B). A language model would see at each position what
it is asked for. The model is of this one task, so it stands here and not in the package: an
example of a user's own model, which trains, resumes and is evaluated like any other.

    jaxformer train experiments/mad_autoencoder.py
    jaxformer train experiments/mad_autoencoder.py --model.width 256 --training.steps 2000

`autoencoder(model)` makes one with the stack, the width and the positions of a language model.

Cost: a minute on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, EmbeddingTable
from jaxformer.layers.init import Init, Normal, Zeros
from jaxformer.layers.layer import Context, LayerPosition, Output, positions_BT
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.layers.position import SinusoidalPositions
from jaxformer.models.embedder import Embedder
from jaxformer.models.head import Head
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import BaseModel, ModelConfig
from jaxformer.models.stack import Group, Stack
from jaxformer.models.zoo import PRESETS
from jaxformer.sharding import shard
from jaxformer.task_type import Batch, TaskType
from jaxformer.training import AdamW, Experiment, TrainingConfig
from jaxformer.user_code import load_file

Compression = load_file(pathlib.Path(__file__).with_name('mad_tasks.py')).Compression


class Autoencoder(BaseModel):
  """p(token t | the sequence) = softmax(W norm(mlp(z + PE(t))) + b), with z the output of
  stack(embedding(tokens) + positions) at the last position.

  The decoder, mlp(x) = gelu(W2 norm(gelu(W1 norm(x) + b1)) + b2), is of the stack's width and sees
  no token: it has the position from the sinusoids PE(t) alone. All sequences end at the last
  position of their row, so there are no segments."""

  class Config(ModelConfig):
    """
    Attributes:
      vocab_size: rows of the embedding.
      stack: groups of blocks.
      norm: of the decoder and before the head.
      embedding_init, init: of the embedding, and of the decoder and the head. Biases start at zero.
    """

    vocab_size: int
    stack: tuple[Group, ...]
    norm: NormConfig = RMSNorm()
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
    self.embedder = Embedder(
      EmbeddingTable(c.embedding_init, (V, D), ('vocab', 'embed'), rngs=rngs), c, rngs
    )
    self.stack = Stack(c.stack, D, rngs)
    self.places = SinusoidalPositions(SinusoidalPositions.Config(), D)
    self.norm_1, self.norm_2, self.norm_3 = c.norm.build(D), c.norm.build(D), c.norm.build(D)
    self.dense_1, self.dense_2 = (
      Dense(c.init, (D, D), ('embed', None), rngs=rngs, position=LayerPosition(), bias=True)
      for _ in range(2)
    )
    self.head = Head(D, V, rngs, init=c.init, bias=Zeros())

  def read(self, batch: Batch, ctx: Context) -> Output:
    tokens_BT = jnp.asarray(batch.inputs)
    position_BT = positions_BT(None, *tokens_BT.shape)
    out = self.stack(self.embedder(tokens_BT, position_BT), ctx)
    places = self.places(position_BT).astype(out.y.dtype)
    y = shard(out.y[:, -1:] + places, 'batch', 'time', 'embed')
    y = jax.nn.gelu(self.dense_1(self.norm_1(y)), approximate=False)
    y = jax.nn.gelu(self.dense_2(self.norm_2(y)), approximate=False)
    return dataclasses.replace(out, y=self.norm_3(y))

  def __call__(self, batch: Batch, ctx: Context = Context()) -> Float[Array, 'B T V']:
    """Logits of the tokens at every position, in fp32."""
    return self.head(self.read(batch, ctx).y)


def autoencoder(model: LanguageModel.Config) -> Autoencoder.Config:
  """Make an autoencoder with the stack, the width and the positions of a language model, to test an
  architecture on `Compression`."""
  return Autoencoder.Config(
    vocab_size=model.vocab_size,
    width=model.width,
    context_length=model.context_length,
    stack=model.stack,
    positions=model.positions,
    norm=model.final_norm or RMSNorm(),
    embedding_init=model.embedding_init,
  )


_llama = PRESETS['llama2-tiny'].model
assert isinstance(_llama, LanguageModel.Config)
experiment = Experiment(
  model=autoencoder(_llama.replace(vocab_size=16)),
  data=Compression(),
  optimizer=AdamW(learning_rate=1e-3),
  training=TrainingConfig(steps=400, batch_size=32, eval_every=100, eval_batches=None),
)
