"""A decoder-only language model: embedding, stack, norm, head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import InputError
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import (
  Context,
  LayerPosition,
  Output,
  State,
  dropout,
  positions_BT,
  starts_BT,
)
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group, Stack
from jaxformer.ops.linear import linear
from jaxformer.ops.loss import LossSums, cross_entropy, token_scores
from jaxformer.sharding import param, shard
from jaxformer.task_type import Batch, TaskType


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanguageModelState:
  """The states of the stack, and how many tokens of its present document each row has had."""

  stack: tuple[State, ...]
  offset_B: Int[Array, ' B']


class LanguageModel(nnx.Module):
  """p(token t | tokens before t) = softmax(head(norm(stack(embedding(tokens) + positions)))).

  Token ids are not checked inside a compiled program: an id outside the vocabulary reads the
  nearest row. The data pipeline and `generate` check before."""

  class Config(ModelConfig):
    """
    Attributes:
      vocab_size: rows of the embedding.
      stack: groups of blocks.
      embedding_norm: norm right after the embedding (RWKV's ln0); None for none.
      embedding_scale: factor on the embeddings; None for 1.
      final_norm: norm before the head; None for none (post-norm stacks).
      tied: the head is the embedding's transpose.
      head_bias: offsets on the logits.
      softcap: logits become c tanh(logits / c); None for none.
      dropout: rate on the embeddings.
      embedding_init, head_init: initial values; `head_init` must be left alone where the head is
        tied.
    """

    vocab_size: int
    stack: tuple[Group, ...]
    embedding_norm: NormConfig | None = None
    embedding_scale: float | None = None
    final_norm: NormConfig | None = RMSNorm.Config()
    tied: bool = False
    head_bias: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    embedding_init: Init = Normal()
    head_init: Init | None = None

    def validate(self):
      super().validate()
      self.require(self.vocab_size > 0, 'vocab_size', 'positive')
      self.require(0 <= self.dropout < 1, 'dropout', 'at least 0 and below 1')
      self.require(self.softcap is None or self.softcap > 0, 'softcap', 'positive')
      self.require(
        not (self.tied and self.head_init is not None),
        'head_init',
        'none where the head is tied to the embedding',
      )

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
      return LanguageModel(self, rngs)

    @property
    def task(self) -> TaskType:
      return TaskType(vocab_size=self.vocab_size)

    @property
    def stacks(self) -> tuple[tuple[Group, ...], ...]:
      return (self.stack,)

  def __init__(self, config: LanguageModel.Config, rngs: nnx.Rngs):
    c = config
    self.config = c
    V, D, position = c.vocab_size, c.width, LayerPosition()
    self.embedding = param(
      c.embedding_init(rngs.params(), (V, D), V, position), ('vocab', 'embed'), matmul=c.tied
    )
    self.positions = None if c.positions is None else c.positions.build(D, c.context_length, rngs)
    self.embedding_norm = None if c.embedding_norm is None else c.embedding_norm.build(D)
    self.stack = Stack(c.stack, D, rngs)
    self.final_norm = None if c.final_norm is None else c.final_norm.build(D)
    head_init = c.head_init or Normal()
    self.head = (
      None if c.tied else param(head_init(rngs.params(), (D, V), D, position), ('embed', 'vocab'))
    )
    self.head_bias = param(jnp.zeros(V), ('vocab',), decay=False) if c.head_bias else None

  # ---- pieces ----------------------------------------------------------------------------------

  def init_state(self, batch: int, max_len: int) -> LanguageModelState:
    """The state before the first token, for sequences of up to `max_len` tokens."""
    self.config.check_length(max_len)
    return LanguageModelState(self.stack.init_state(batch, max_len), jnp.zeros((batch,), jnp.int32))

  def hidden(
    self,
    tokens_BT: Int[Array, 'B T'],
    ctx: Context = Context(),
    state: LanguageModelState | None = None,
  ) -> Output:
    """The normed output of the stack, `[B, T, D]`: what the head reads. With a state, the sequence
    continues from it."""
    positions = positions_BT(
      starts_BT(ctx.segments_BT, *tokens_BT.shape), None if state is None else state.offset_B
    )
    x = shard(self._embed(tokens_BT, positions, ctx), 'batch', 'time', 'embed')
    out = self.stack(x, ctx, None if state is None else state.stack)
    y = out.y if self.final_norm is None else self.final_norm(out.y)
    return dataclasses.replace(
      out, y=y, state=None if state is None else LanguageModelState(out.state, positions[:, -1] + 1)
    )

  def _embed(self, tokens: Array, positions: Array, ctx: Context) -> Array:
    x = jnp.take(self.embedding[...], tokens, axis=0, mode='clip')
    if self.config.embedding_scale is not None:
      x = x * self.config.embedding_scale
    if self.positions is not None:
      x = x + self.positions(positions).astype(x.dtype)
    if self.embedding_norm is not None:
      x = self.embedding_norm(x)
    return dropout(x, self.config.dropout, ctx.fold(len(self.config.stack)))

  def _head(self) -> Array:
    return self.embedding[...].T if self.head is None else self.head[...]

  def _head_options(self) -> dict[str, Any]:
    bias = None if self.head_bias is None else self.head_bias[...]
    return {'bias_V': bias, 'softcap': self.config.softcap, 'transposed': self.head is None}

  # ---- the public face -------------------------------------------------------------------------

  def __call__(
    self,
    tokens_BT: Int[Array, 'B T'],
    ctx: Context = Context(),
    state: LanguageModelState | None = None,
  ) -> Output:
    """Logits of every position, `[B, T, V]` in fp32. For training use `loss`, which never holds
    them all."""
    out = self.hidden(tokens_BT, ctx, state)
    return dataclasses.replace(out, y=self.logits(out.y))

  def step(self, token_B: Int[Array, ' B'], ctx: Context, state: LanguageModelState) -> Output:
    """Logits after one more token, `[B, V]` in fp32."""
    x = shard(self._embed(token_B, state.offset_B, ctx), 'batch', 'embed')
    out = self.stack(x, ctx, state.stack, one_token=True)
    y = out.y if self.final_norm is None else self.final_norm(out.y)
    return dataclasses.replace(
      out, y=self.logits(y), state=LanguageModelState(out.state, state.offset_B + 1)
    )

  def logits(self, y: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """The head alone: fp32 logits of hidden vectors."""
    logits = linear(y, self._head()).astype(jnp.float32)
    if self.head_bias is not None:
      logits = logits + self.head_bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    c = self.config.softcap
    return logits if c is None else c * jnp.tanh(logits / c)

  def loss(
    self, batch: Batch, ctx: Context = Context(), z_loss: float = 0.0, label_smoothing: float = 0.0
  ) -> tuple[LossSums, dict[str, Array]]:
    """Sums of the loss over a batch, and the layers' auxiliary scalars."""
    out = self.hidden(batch.inputs, ctx.replace(segments_BT=batch.segments_BT))
    if label_smoothing and self.config.softcap is not None:
      raise InputError(
        f'training.label_smoothing = {label_smoothing}: must be 0 where model.softcap bends the '
        'logits'
      )
    sums = cross_entropy(
      out.y,
      self._head(),
      jnp.asarray(batch.targets_BT),
      z_loss=z_loss,
      label_smoothing=label_smoothing,
      **self._head_options(),
    )
    return sums, out.aux

  def scores(
    self, batch: Batch, ctx: Context = Context()
  ) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
    """-log p(target) of every position, in nats, fp32, and whether no token is likelier; 0 and
    False where there is no target. Few logits are held at a time."""
    y_BTD = self.hidden(batch.inputs, ctx.replace(segments_BT=batch.segments_BT)).y
    return token_scores(y_BTD, self._head(), jnp.asarray(batch.targets_BT), **self._head_options())
