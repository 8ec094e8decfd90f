"""Models that predict the next token: on whole sequences, and token by token from a state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Output, State, positions_BT
from jaxformer.layers.norm import NormConfig
from jaxformer.models.embedder import Embedder
from jaxformer.models.model import BaseModel, ModelConfig
from jaxformer.models.stack import Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
  """State of decoding.

  Attributes:
    stack: the states of the decoder's layers, with what they keep of a source.
    position_B: the position of the next token of each row in its document.
  """

  stack: tuple[State, ...]
  position_B: Int[Array, ' B']


class AutoregressiveConfig(ModelConfig, abstract=True):
  """Base of the configs of models with a decoder.

  Attributes:
    vocab_size: rows of the token table.
    embedding_scale: factor on the embeddings; None for 1.
    final_norm: norm before the head; None for none (post-norm stacks and recurrences).
    tied: whether the head is the transpose of the token table.
    head_bias: initialization of the bias of the logits; None for no bias.
    dropout: rate on the embeddings.
    embedding_init, head_init: initialization; `head_init` must be None where the head is tied.
  """

  vocab_size: int
  embedding_scale: float | None = None
  final_norm: NormConfig | None = None
  tied: bool = False
  head_bias: Init | None = None
  dropout: float = 0.0
  embedding_init: Init = Normal()
  head_init: Init | None = None

  def validate(self):
    super().validate()
    self.require_positive('vocab_size')
    self.require_rate('dropout')
    self.require(
      not (self.tied and self.head_init is not None),
      'head_init',
      'none where the head is tied to the embedding',
    )


class Autoregressive(BaseModel):
  """Base of the models with a decoder: embedder, stack, norm and head.

  Token ids are not checked inside a compiled program: an id outside the vocabulary reads the
  nearest row. The data pipeline and `generate` check before."""

  config: Any
  embedder: Embedder
  final_norm: nnx.Module | None

  @property
  def decoding_stack(self) -> Stack:
    """The stack that reads the tokens and keeps the state."""
    raise NotImplementedError

  @property
  def tied_VD(self) -> nnx.Param | None:
    return self.embedder.input.table if self.head.kernel is None else None

  def logits(self, y: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Apply the head alone: fp32 logits of hidden vectors."""
    return self.head(y, self.tied_VD)

  def step(self, token_B: Int[Array, ' B'], ctx: Context, state: DecoderState) -> Output:
    """Logits after one more token, `[B, V]` in fp32."""
    x = self.embedder(token_B, state.position_B, self._embedder_ctx(ctx))
    x, ctx = self._stream(x, ctx)
    out = self.decoding_stack(x, ctx, state.stack, one_token=True)
    return dataclasses.replace(
      out, y=self.logits(self._normed(out.y)), state=DecoderState(out.state, state.position_B + 1)
    )

  def select_rows(
    self, state: DecoderState, index: Int[Array, ' N'], same_source: bool = False
  ) -> DecoderState:
    """The state of the rows `index` of a batch (`Layer.select_rows`)."""
    stack = self.decoding_stack.select_rows(state.stack, index, same_source)
    return DecoderState(stack, jnp.take(state.position_B, index, axis=0))

  def unstack(self, ctx: Context) -> None:
    """Prepare the decoding stack for many steps in a loop, in place (`Stack.unstack`)."""
    self.decoding_stack.unstack(ctx)

  def unstacked_state(self, state: DecoderState, ctx: Context) -> DecoderState:
    """The state for the model after `unstack(ctx)`; call it before."""
    return dataclasses.replace(state, stack=self.decoding_stack.unstacked_state(state.stack, ctx))

  def _decode(
    self,
    tokens_BT: Int[Array, 'B T'],
    ctx: Context,
    state: DecoderState | None,
    initial: tuple[State, ...] | None = None,
  ) -> Output:
    """Return what the head reads, `[B, T, D]`. With a state, the sequence continues from it;
    `initial` are states of the stack to start from where the result needs no state."""
    before = None if state is None else state.position_B
    positions = positions_BT(ctx.segments_BT, *tokens_BT.shape, before)
    x = self.embedder(tokens_BT, positions, self._embedder_ctx(ctx))
    x, ctx = self._stream(x, ctx)
    if initial is not None:
      ctx = ctx.replace(fresh=True)
    out = self.decoding_stack(
      x, ctx, initial if state is None else state.stack, keep_state=initial is None
    )
    after = None if state is None else DecoderState(out.state, positions[:, -1] + 1)
    return dataclasses.replace(out, y=self._normed(out.y), state=after)

  def _embedder_ctx(self, ctx: Context) -> Context:
    """The dropout key of the embedder comes after those of the groups."""
    return ctx.fold(max(len(groups) for groups in self.config.stacks))

  def _stream(self, x: Array, ctx: Context) -> tuple[Array, Context]:
    """The residual stream that starts from the embeddings, and the context of its layers."""
    return x, ctx

  def _normed(self, y: Array) -> Array:
    return y if self.final_norm is None else self.final_norm(y)

  def _start(self, stack: tuple[State, ...], batch: int) -> DecoderState:
    return DecoderState(stack, jnp.zeros((batch,), jnp.int32))
