"""A decoder-only language model: embedding, stack, norm, head."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxformer.config import InputError
from jaxformer.layers.dense import EmbeddingTable
from jaxformer.layers.layer import Context, Output
from jaxformer.layers.norm import NormConfig, RMSNorm, build_norm
from jaxformer.models.autoregressive import Autoregressive, AutoregressiveConfig, DecoderState
from jaxformer.models.embedder import Embedder
from jaxformer.models.head import Head
from jaxformer.models.stack import Group, Stack
from jaxformer.task_type import Batch, TaskType


class LanguageModel(Autoregressive):
  """p(token t | tokens before t) = softmax(head(norm(stack(embedding(tokens) + positions))))."""

  class Config(AutoregressiveConfig):
    """
    Attributes:
      stack: groups of blocks.
      embedding_norm: norm right after the embedding (RWKV's ln0); None for none.
      logit_scale: factor on the logits, before the softcap (Granite); None for 1.
      softcap: logits become c tanh(logits / c); None for none.
      residual_dtype: of the residual stream: that of all computations, or `float32`, in which
        branches are added and normed while layers compute in less (Mamba's `residual_in_fp32`).
    """

    stack: tuple[Group, ...]
    embedding_norm: NormConfig | None = None
    final_norm: NormConfig | None = RMSNorm()
    logit_scale: float | None = None
    softcap: float | None = None
    residual_dtype: Literal['compute', 'float32'] = 'compute'

    def validate(self):
      super().validate()
      self.require_positive('logit_scale', 'softcap')

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
    V, D = c.vocab_size, c.width
    tokens = EmbeddingTable(c.embedding_init, (V, D), ('vocab', 'embed'), rngs=rngs, matmul=c.tied)
    self.embedder = Embedder(
      tokens, c, rngs, norm=c.embedding_norm, scale=c.embedding_scale, dropout=c.dropout
    )
    self.stack = Stack(c.stack, D, rngs)
    self.final_norm = build_norm(c.final_norm, D)
    self.head = Head(
      D,
      V,
      rngs,
      init=c.head_init,
      tied=c.tied,
      bias=c.head_bias,
      logit_scale=c.logit_scale,
      softcap=c.softcap,
    )

  @property
  def decoding_stack(self) -> Stack:
    return self.stack

  def _stream(self, x: Array, ctx: Context) -> tuple[Array, Context]:
    if self.config.residual_dtype == 'compute':
      return x, ctx
    return x.astype(jnp.float32), ctx.replace(compute_dtype=x.dtype)

  def _normed(self, y: Array) -> Array:
    y = super()._normed(y)
    wide = self.config.residual_dtype == 'float32'
    return y.astype(self.embedder.input.table[...].dtype) if wide else y

  def init_state(self, batch: int, max_len: int) -> DecoderState:
    """The state before the first token, for sequences of up to `max_len` tokens."""
    self.config.check_length(max_len)
    for layer, _ in self.config.layers():
      if not layer.decodes:
        raise InputError(f'{layer.tag}: reads tokens ahead of its output, so it cannot decode')
    return self._start(self.stack.init_state(batch, max_len), batch)

  def hidden(
    self, tokens_BT: Int[Array, 'B T'], ctx: Context = Context(), state: DecoderState | None = None
  ) -> Output:
    """The normed output of the stack, `[B, T, D]`: what the head reads. With a state, the sequence
    continues from it."""
    return self._decode(tokens_BT, ctx, state)

  def read(self, batch: Batch, ctx: Context) -> Output:
    return self.hidden(batch.inputs, ctx.replace(segments_BT=batch.segments_BT))

  def __call__(
    self, tokens_BT: Int[Array, 'B T'], ctx: Context = Context(), state: DecoderState | None = None
  ) -> Output:
    """Logits of every position, `[B, T, V]` in fp32. For training use `loss`, which never holds
    them all."""
    out = self.hidden(tokens_BT, ctx, state)
    return dataclasses.replace(out, y=self.logits(out.y))
