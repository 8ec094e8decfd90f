"""An encoder, and a decoder that reads its output."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from jaxformer.config import InputError
from jaxformer.layers.dense import EmbeddingTable
from jaxformer.layers.layer import Context, Memory, Output, merge_aux, positions_BT, take_positions
from jaxformer.layers.norm import NormConfig, build_norm
from jaxformer.models.autoregressive import Autoregressive, AutoregressiveConfig, DecoderState
from jaxformer.models.block import widths
from jaxformer.models.embedder import Embedder
from jaxformer.models.head import Head
from jaxformer.models.stack import Group, Stack, layers_with_widths
from jaxformer.task_type import IGNORE, Batch, TaskType


class EncoderDecoder(Autoregressive):
  """p(token t | tokens before t, source) = softmax(head(norm(decoder(embedding(tokens),
  encoder(embedding(source)))))).

  The source is padded with -1 at the end of a row, which has no effect: no layer of the encoder
  passes anything from padding to tokens, and the decoder masks it. Rows of targets are padded at
  their end, where nothing is predicted.

  Token ids are not checked inside a compiled program: an id outside the vocabulary reads the
  nearest row."""

  class Config(AutoregressiveConfig):
    """
    Attributes:
      source_vocab_size: rows of the token table of the source.
      encoder, decoder: groups of blocks; a layer may change the width.
      encoder_norm: norm after the encoder; None for none.
      shared_embedding: whether source and target share one table.
      reverse_source: whether the encoder reads the source from its end (Sutskever et al. 2014,
        section 3.3).
      init_from_encoder: whether each layer of the decoder starts from the final state of the
        encoder's layer in the same position (of a bidirectional layer, that of its backward
        part).
    """

    source_vocab_size: int
    encoder: tuple[Group, ...]
    decoder: tuple[Group, ...]
    encoder_norm: NormConfig | None = None
    shared_embedding: bool = False
    reverse_source: bool = False
    init_from_encoder: bool = False

    def validate(self):
      super().validate()
      self.require_positive('source_vocab_size')
      self.require(
        not self.shared_embedding or self.source_vocab_size == self.vocab_size,
        'source_vocab_size',
        f'{self.vocab_size}, that of the target, where they share a table',
      )
      self.require(
        not self.tied or self.decoder_width == self.width,
        'tied',
        f'false where the decoder changes the width from {self.width} to {self.decoder_width}',
      )
      for layer, width, _ in layers_with_widths(self.decoder, self.width):
        self.require(layer.decodes, 'decoder', f'layers that decode; {layer.tag} does not')
        reads = layer.memory_width(width)
        if reads not in (None, self.memory_width):
          raise InputError(
            f'{layer.tag}.source_width = {reads}: must be {self.memory_width}, the width of the '
            "encoder's output"
          )
      for layer, width, _ in layers_with_widths(self.encoder, self.width):
        self.require(
          layer.memory_width(width) is None,
          'encoder',
          f'layers that read no encoder; {layer.tag} does',
        )
        self.require(
          layer.hands_over or not self.init_from_encoder,
          'init_from_encoder',
          f'false where the encoder has a layer without a state ({layer.tag})',
        )

    def build(self, rngs: nnx.Rngs) -> EncoderDecoder:
      return EncoderDecoder(self, rngs)

    @property
    def memory_width(self) -> int:
      """The width of the encoder's output."""
      return widths(self.encoder, self.width)[-1]

    @property
    def decoder_width(self) -> int:
      """The width that the head reads."""
      return widths(self.decoder, self.width)[-1]

    @property
    def task(self) -> TaskType:
      return TaskType(
        inputs='pairs', vocab_size=self.vocab_size, source_vocab_size=self.source_vocab_size
      )

    @property
    def stacks(self) -> tuple[tuple[Group, ...], ...]:
      return self.encoder, self.decoder

  def __init__(self, config: EncoderDecoder.Config, rngs: nnx.Rngs):
    c = config
    self.config = c
    V, D = c.vocab_size, c.width
    table = functools.partial(EmbeddingTable, c.embedding_init, axes=('vocab', 'embed'), rngs=rngs)
    self.source_input = None if c.shared_embedding else table((c.source_vocab_size, D))
    tokens = table((V, D), matmul=c.tied)
    self.embedder = Embedder(tokens, c, rngs, scale=c.embedding_scale, dropout=c.dropout)
    self.encoder, self.decoder = Stack(c.encoder, D, rngs), Stack(c.decoder, D, rngs)
    self.encoder_norm = build_norm(c.encoder_norm, c.memory_width)
    self.final_norm = build_norm(c.final_norm, c.decoder_width)
    self.head = Head(c.decoder_width, V, rngs, init=c.head_init, tied=c.tied, bias=c.head_bias)

  @property
  def decoding_stack(self) -> Stack:
    return self.decoder

  def encode(self, source_BS: Int[Array, 'B S'], ctx: Context = Context()) -> Memory:
    """Encode the source for the decoder."""
    return self._encode(source_BS, ctx)[0]

  def _encode(self, source_BS: Array, ctx: Context) -> tuple[Memory, dict[str, Array]]:
    """The memory, and the auxiliary values of the encoder's layers."""
    c, (B, S) = self.config, source_BS.shape
    c.check_length(S)
    source, valid_BS = jnp.asarray(source_BS), source_BS != IGNORE
    order_BS = back_BS = None
    if c.reverse_source or c.init_from_encoder:
      order_BS, back_BS = _reading_order(valid_BS, c.reverse_source)
      source = take_positions(source, order_BS)
    segments = (source != IGNORE).astype(jnp.int32)
    ctx = ctx.fold(0).replace(segments_BT=segments)
    x = self.embedder(
      source, positions_BT(segments, B, S), self._embedder_ctx(ctx), self.source_input
    )
    states = self.encoder.init_state(B, S) if c.init_from_encoder else None
    out = self.encoder(x, ctx, states)
    y = out.y if self.encoder_norm is None else self.encoder_norm(out.y)
    final = () if states is None else self.encoder.handed_over(out.state)
    if back_BS is not None:
      y = take_positions(y, back_BS)
    return Memory(y, valid_BS, final), out.aux

  def init_state(self, memory: Memory, max_len: int) -> DecoderState:
    """The state before the first token of a target of up to `max_len` tokens. Steps need the memory
    no more."""
    self.config.check_length(max_len)
    B = len(memory.mask_BS)
    return self._start(self.decoder.init_state(B, max_len, memory), B)

  def hidden(
    self,
    tokens_BT: Int[Array, 'B T'],
    memory: Memory | None,
    ctx: Context = Context(),
    state: DecoderState | None = None,
  ) -> Output:
    """The normed output of the decoder, `[B, T, D]`: what the head reads. With a state, the target
    continues from it, and `memory` may be None."""
    # Where the decoder starts from the encoder's states, its layers need states; elsewhere they
    # need none and keep no keys and values for later tokens.
    initial = None
    if state is None:
      if memory is None:
        raise ValueError('hidden: needs a memory or a state')
      initial = self.decoder.init_state(*tokens_BT.shape, memory) if memory.states else None
    return self._decode(tokens_BT, ctx.fold(1).replace(memory=memory), state, initial)

  def _both(self, source_BS: Array, tokens_BT: Array, ctx: Context) -> Output:
    memory, aux = self._encode(jnp.asarray(source_BS), ctx)
    out = self.hidden(tokens_BT, memory, ctx)
    return dataclasses.replace(out, aux=merge_aux(aux, out.aux))

  def read(self, batch: Batch, ctx: Context) -> Output:
    return self._both(batch.source_BS, batch.inputs, ctx)

  def __call__(
    self, source_BS: Int[Array, 'B S'], tokens_BT: Int[Array, 'B T'], ctx: Context = Context()
  ) -> Output:
    """Logits of every position of the target, `[B, T, V]` in fp32. For training use `loss`, which
    never holds them all."""
    out = self._both(source_BS, tokens_BT, ctx)
    return dataclasses.replace(out, y=self.logits(out.y))


def _reading_order(valid_BS: Array, reverse: bool) -> tuple[Array, Array]:
  """The positions of a row in the order in which the encoder reads them, and the inverse: from the
  last to the first, or with the padding moved from the end to the front, so that the last token
  gives the final state."""
  S = valid_BS.shape[1]
  index_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], valid_BS.shape)
  if reverse:
    return S - 1 - index_BS, S - 1 - index_BS
  padding_B1 = jnp.sum(~valid_BS, axis=1, keepdims=True, dtype=jnp.int32)
  return (index_BS - padding_B1) % S, (index_BS + padding_B1) % S
