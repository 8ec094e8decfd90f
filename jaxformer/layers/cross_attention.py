"""A decoder's attention to the encoder's output: multi-head as in the Transformer, and Luong's
multiplicative one."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxformer.config import Config, InputError
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
from jaxformer.ops.linear import linear
from jaxformer.sharding import param, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysState:
  """Keys and values of a source, and which of them are tokens."""

  k_BSGK: Float[Array, 'B S G K']
  v_BSGC: Float[Array, 'B S G C']
  mask_BS: Bool[Array, 'B S']


class ReadsMemory(Layer):
  """Base of the layers without a recurrence that attend to the memory: their state is made of it
  once."""

  name = ''

  def keys(self, memory: Memory) -> KeysState:
    raise NotImplementedError

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> KeysState:
    return self.keys(required(memory, self.name))

  def select_rows(self, state: KeysState, index: Array, same_source: bool = False) -> KeysState:
    return state if same_source else super().select_rows(state, index)


def _seen(keys: KeysState, T: int) -> Mask:
  """All queries see all tokens of the source."""
  B = keys.mask_BS.shape[0]
  return Mask(False, None, jnp.ones((B, T), jnp.int32), keys.mask_BS.astype(jnp.int32))


class CrossAttention(ReadsMemory):
  """softmax(q k^T / sqrt(K)) v with queries from the decoder and keys and values from the encoder's
  output (Vaswani et al. 2017, section 3.2.3), then an output projection. Padding of the source is
  hidden."""

  name = 'CrossAttention'

  class Config(LayerConfig):
    """
    Attributes:
      heads: of queries, keys and values.
      head_dim: None for width / heads.
      source_width: of the encoder's output; None for the width.
      bias: offsets on all four projections.
      init: of the query, key and value projections; `out_init`: of the output projection.
    """

    heads: int = 4
    head_dim: int | None = None
    source_width: int | None = None
    bias: bool = False
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      for field in ('heads', 'head_dim', 'source_width'):
        self.require(getattr(self, field) is None or getattr(self, field) > 0, field, 'positive')

    def head_size(self, width: int) -> int:
      """K, from the width where it is not given."""
      if self.head_dim is None and width % self.heads:
        raise InputError(
          f'width = {width} is not divisible by CrossAttention.heads = {self.heads}; give head_dim '
          'or another number of heads'
        )
      return self.head_dim or width // self.heads

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> CrossAttention:
      return CrossAttention(self, width, rngs, position)

    def memory_width(self, width: int) -> int:
      return self.source_width or width

    def state_size(self, width: int, max_len: int) -> int:
      return 2 * max_len * self.heads * self.head_size(width)

    @classmethod
    def examples(cls) -> tuple[CrossAttention.Config, ...]:
      # Without offsets: the same number on all keys leaves a softmax as it is, and what is measured
      # of its gradient is rounding.
      return cls(), cls(head_dim=16, source_width=24)

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      return 4.0 * self.heads * self.head_size(width) * length

  def __init__(
    self, config: CrossAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, K, C = config, config.head_size(width), config.memory_width(width)
    self.head_dim, H = K, c.heads

    def weight(init: Init, shape: tuple[int, int], axes: tuple[str, str]):
      return param(init(rngs.params(), shape, shape[0], position), axes)

    def bias(size: int, axis: str):
      return param(jnp.zeros(size), (axis,), decay=False) if c.bias else None

    self.wq, self.bq = weight(c.init, (width, H * K), ('embed', 'heads')), bias(H * K, 'heads')
    self.wk, self.bk = weight(c.init, (C, H * K), ('embed', 'heads')), bias(H * K, 'heads')
    self.wv, self.bv = weight(c.init, (C, H * K), ('embed', 'heads')), bias(H * K, 'heads')
    self.wo, self.bo = weight(c.out_init, (H * K, width), ('heads', 'embed')), bias(width, 'norm')

  def _heads(self, x: Array, w: nnx.Param, b: nnx.Param | None, time: str | None) -> Array:
    y = linear(x, w[...], None if b is None else b[...])
    return shard(y.reshape(*x.shape[:2], -1, self.head_dim), 'batch', time, 'heads', None)

  def keys(self, memory: Memory) -> KeysState:
    y = memory.y_BSC.astype(self.wk[...].dtype)
    return KeysState(
      self._heads(y, self.wk, self.bk, None), self._heads(y, self.wv, self.bv, None), memory.mask_BS
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: KeysState | None = None
  ) -> Output:
    keys = self.keys(required(ctx.memory, self.name)) if state is None else state
    q = self._heads(x_BTD, self.wq, self.bq, 'time')
    mask, scale = _seen(keys, x_BTD.shape[1]), 1.0 / math.sqrt(self.head_dim)
    y = attention(q, keys.k_BSGK.astype(q.dtype), keys.v_BSGC.astype(q.dtype), mask, scale=scale)
    weights = (attention_weights(q, keys.k_BSGK, mask, scale=scale).mean(1),) if ctx.align else ()
    y = checkpoint_name(y.reshape(*y.shape[:2], -1), 'attention')
    return Output(
      linear(y, self.wo[...], None if self.bo is None else self.bo[...]), state, alignments=weights
    )


# ---- Luong -------------------------------------------------------------------------------------


class Score(Config, abstract=True):
  """Base of the ways to compare a decoder's output h with an encoder's output m."""


class DotScore(Score):
  """h . m: both must be as wide."""


class GeneralScore(Score):
  """h . W m."""

  init: Init = FanInUniform()


class LuongAttention(ReadsMemory):
  """y_t = tanh(W [c_t, h_t]), c_t = sum_s softmax_s(score(h_t, m_s)) m_s: global attention after
  the recurrence, with the state of the same step (Luong et al. 2015, section 3.1). With input
  feeding it stands within `InputFeeding`."""

  name = 'LuongAttention'

  class Config(LayerConfig):
    """
    Attributes:
      source_width: of the encoder's output; None for the width.
      score: its type says which.
      init: of W.
    """

    source_width: int | None = None
    score: Score = GeneralScore()
    init: Init = FanInUniform()

    def validate(self):
      self.require(self.source_width is None or self.source_width > 0, 'source_width', 'positive')

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> LuongAttention:
      if isinstance(self.score, DotScore) and self.memory_width(width) != width:
        raise InputError(
          f'LuongAttention.score = DotScore: needs a source_width of {width}, the width of the '
          'decoder'
        )
      return LuongAttention(self, width, rngs, position)

    def memory_width(self, width: int) -> int:
      return self.source_width or width

    def state_size(self, width: int, max_len: int) -> int:
      return max_len * (width + self.memory_width(width))

    @classmethod
    def examples(cls) -> tuple[LuongAttention.Config, ...]:
      return cls(source_width=24), cls(score=DotScore())

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      return 2.0 * (width + self.memory_width(width)) * length

  def __init__(
    self, config: LuongAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, C = config, config.memory_width(width)
    self.width = width
    general = c.score if isinstance(c.score, GeneralScore) else None
    self.w_score = (
      None
      if general is None
      else param(general.init(rngs.params(), (C, width), C, position), ('embed', None))
    )
    self.w = param(c.init(rngs.params(), (C + width, width), C + width, position), (None, 'embed'))

  def keys(self, memory: Memory) -> KeysState:
    values = memory.y_BSC.astype(self.w[...].dtype)
    keys = values if self.w_score is None else linear(values, self.w_score[...])
    return KeysState(keys[:, :, None], values[:, :, None], memory.mask_BS)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: KeysState | None = None
  ) -> Output:
    keys = self.keys(required(ctx.memory, self.name)) if state is None else state
    a = attention_weights(x_BTD[:, :, None], keys.k_BSGK, _seen(keys, x_BTD.shape[1]), scale=1.0)[
      :, 0
    ]
    c = jnp.einsum('BTS,BSC->BTC', a.astype(x_BTD.dtype), keys.v_BSGC[:, :, 0].astype(x_BTD.dtype))
    y = jnp.tanh(linear(jnp.concatenate([c, x_BTD], axis=-1), self.w[...]))
    return Output(y, state, alignments=(a,) if ctx.align else ())
