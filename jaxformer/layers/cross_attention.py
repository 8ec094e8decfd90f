"""A decoder's attention to the encoder's output: multi-head as in the Transformer, and Luong's
multiplicative one."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import FanInUniform, Init, Normal
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  required,
)
from jaxformer.ops.attention import Mask, attention, attention_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysState:
  """Keys and values of a source, and True at its tokens."""

  k_BSGK: Float[Array, 'B S G K']
  v_BSGC: Float[Array, 'B S G C']
  mask_BS: Bool[Array, 'B S']


class ReadsMemory(Layer):
  """Base of the layers without a recurrence that attend to the memory. Their state is `keys` of it,
  made once."""

  def keys(self, memory: Memory) -> KeysState:
    raise NotImplementedError

  def init_state(self, batch, max_len, memory=None) -> KeysState:
    return self.keys(required(memory, type(self).__name__))

  def select_rows(self, state: KeysState, index: Array, same_source: bool = False) -> KeysState:
    return state if same_source else super().select_rows(state, index)


def _seen(keys: KeysState, T: int) -> Mask:
  """All queries attend to all tokens of the source."""
  B = keys.mask_BS.shape[0]
  return Mask(False, None, jnp.ones((B, T), jnp.int32), keys.mask_BS.astype(jnp.int32))


class CrossAttention(ReadsMemory):
  """y = softmax(q k^T / sqrt(K)) v W_o over heads, with q = x W_q from the decoder and k, v = m
  W_k, m W_v from the encoder's output (Vaswani et al. 2017, section 3.2.3).

  Padding of the source is masked."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: of queries, keys and values.
      head_dim: None for width / heads.
      source_width: of the encoder's output; None for the width.
      bias: whether all four projections have biases.
      attention_dropout: rate at which attention weights are dropped.
      init: of the query, key and value projections; `out_init`: of the output projection.
    """

    heads: int = 4
    head_dim: int | None = None
    source_width: int | None = None
    bias: bool = False
    attention_dropout: float = 0.0
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('heads', 'head_dim', 'source_width')
      self.require_rate('attention_dropout')

    def head_size(self, width: int) -> int:
      """K, derived from the width if `head_dim` is None."""
      return self.head_dim or self.quotient(width, 'heads')

    def resolved(self, width: int) -> CrossAttention.Config:
      return self.replace(head_dim=self.head_size(width), source_width=self.memory_width(width))

    def memory_width(self, width: int) -> int:
      return self.source_width or width

    @classmethod
    def examples(cls):
      # Without biases: adding the same to all keys does not change a softmax, so the measured
      # gradient would be rounding error.
      return cls(), cls(head_dim=16, source_width=24, attention_dropout=0.1)

    def mixing_flops_per_token(self, width, length, causal):
      return 4.0 * self.heads * self.head_size(width) * length

  def __init__(
    self, config: CrossAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, K, C = config, config.head_size(width), config.memory_width(width)
    self.head_dim, self.attention_dropout, H = K, c.attention_dropout, c.heads
    dense = functools.partial(Dense, rngs=rngs, position=position, bias=c.bias)
    self.q = dense(c.init, (width, H * K), ('embed', 'heads'))
    self.k = dense(c.init, (C, H * K), ('embed', 'heads'))
    self.v = dense(c.init, (C, H * K), ('embed', 'heads'))
    self.o = dense(c.out_init, (H * K, width), ('heads', 'embed'))

  def keys(self, memory: Memory) -> KeysState:
    y = memory.y_BSC.astype(self.k.dtype)
    k, v = (by_head(dense(y), self.head_dim, time=None) for dense in (self.k, self.v))
    return KeysState(k, v, memory.mask_BS)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: KeysState | None = None
  ) -> Output:
    keys = self.init_state(*x_BTD.shape[:2], ctx.memory) if state is None else state
    q = by_head(self.q(x_BTD), self.head_dim)
    mask, scale = _seen(keys, x_BTD.shape[1]), 1.0 / math.sqrt(self.head_dim)
    y = attention(
      q,
      keys.k_BSGK.astype(q.dtype),
      keys.v_BSGC.astype(q.dtype),
      mask,
      scale=scale,
      dropout=self.attention_dropout,
      dropout_key=ctx.fold(0).dropout_key,
    )
    weights = (attention_weights(q, keys.k_BSGK, mask, scale=scale).mean(1),) if ctx.align else ()
    y = checkpoint_name(y.reshape(*y.shape[:2], -1), 'attention')
    return Output(self.o(y), state, alignments=weights)


# ---- Luong -------------------------------------------------------------------------------------


class LuongAttention(ReadsMemory):
  """y_t = tanh([c_t, h_t] W), c_t = sum_s softmax_s(score(h_t, m_s)) m_s, with the score h . m or
  h . m W_s (Luong et al. 2015, section 3.1).

  Global attention after the recurrence, with the hidden state of the same step. With input feeding
  it is part of `InputFeeding`."""

  class Config(LayerConfig):
    """
    Attributes:
      source_width: of the encoder's output; None for the width.
      score_init: of W_s, for the `general` score; None for the `dot` score, which has no W_s and
        needs a source as wide as the decoder.
      init: of W.
    """

    source_width: int | None = None
    score_init: Init | None = FanInUniform()
    init: Init = FanInUniform()

    def validate(self):
      self.require_positive('source_width')

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> LuongAttention:
      fits = self.score_init is not None or self.memory_width(width) == width
      self.require(fits, 'source_width', f'{width}, the width of the decoder, for the dot score')
      return LuongAttention(self, width, rngs, position)

    def memory_width(self, width: int) -> int:
      return self.source_width or width

    @classmethod
    def examples(cls):
      return cls(source_width=24), cls(score_init=None)

    def mixing_flops_per_token(self, width, length, causal):
      return 2.0 * (width + self.memory_width(width)) * length

  def __init__(
    self, config: LuongAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, C = config, config.memory_width(width)
    dense = functools.partial(Dense, rngs=rngs, position=position)
    self.score = None if c.score_init is None else dense(c.score_init, (C, width), ('embed', None))
    self.out = dense(c.init, (C + width, width), (None, 'embed'))

  def keys(self, memory: Memory) -> KeysState:
    values = memory.y_BSC.astype(self.out.dtype)
    keys = values if self.score is None else self.score(values)
    return KeysState(keys[:, :, None], values[:, :, None], memory.mask_BS)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: KeysState | None = None
  ) -> Output:
    keys = self.init_state(*x_BTD.shape[:2], ctx.memory) if state is None else state
    a = attention_weights(x_BTD[:, :, None], keys.k_BSGK, _seen(keys, x_BTD.shape[1]), scale=1.0)[
      :, 0
    ]
    c = jnp.einsum('BTS,BSC->BTC', a.astype(x_BTD.dtype), keys.v_BSGC[:, :, 0].astype(x_BTD.dtype))
    y = jnp.tanh(self.out(jnp.concatenate([c, x_BTD], axis=-1)))
    return Output(y, state, alignments=(a,) if ctx.align else ())
