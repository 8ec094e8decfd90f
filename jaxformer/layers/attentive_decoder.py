"""Decoder layers whose recurrence searches the source at every step: RNNsearch's and GNMT's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.layers.init import Init, Normal, Orthogonal, Uniform, Zeros
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  required,
  starts_BT,
)
from jaxformer.layers.lstm import CONTEXT, FORGET
from jaxformer.ops.attentive_decoder import (
  AttentionSource,
  AttentiveWeights,
  States,
  attentive_decoder,
)
from jaxformer.ops.linear import linear
from jaxformer.sharding import param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourceState:
  """What is searched, and the states that a document begins from, side by side (fp32)."""

  keys_BSA: Float[Array, 'B S A']
  values_BSC: Float[Array, 'B S C']
  mask_BS: Bool[Array, 'B S']
  first: States


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
  """The hidden state (and an LSTM's cell) after the last token, fp32, and what is searched."""

  states: States
  source: SourceState


class SearchConfig(LayerConfig, abstract=True):
  """What the two share.

  Attributes:
    hidden: units H; None for the width.
    attention: hidden units A of the attention; None for H.
    source_width: C, of the encoder's output; None for the width.
    init: of the weights of the input and of what was read; `recurrent_init`: of those of the hidden
      state, gate by gate; `attention_init`: of the attention's matrices; `score_init`: of the
      vector that makes one number of its hidden units.
    bias: initial values of the gates' offsets, one vector a gate; None for no offsets.
  """

  hidden: int | None = None
  attention: int | None = None
  source_width: int | None = None
  init: Init = Uniform(bound=0.1)
  recurrent_init: Init = Uniform(bound=0.1)
  attention_init: Init = Uniform(bound=0.1)
  score_init: Init = Uniform(bound=0.1)
  bias: Init | None = Zeros()

  def validate(self):
    for field in ('hidden', 'attention', 'source_width'):
      self.require(getattr(self, field) is None or getattr(self, field) > 0, field, 'positive')

  def units(self, width: int) -> int:
    """H."""
    return self.hidden or width

  def memory_width(self, width: int) -> int:
    return self.source_width or width

  def searched(self, width: int, max_len: int) -> int:
    """Numbers of a `SourceState` but for the first states."""
    return max_len * ((self.attention or self.units(width)) + self.memory_width(width))

  def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
    """Scores and the weighted sum over a source of `length`."""
    return 2.0 * length * ((self.attention or self.units(width)) + self.memory_width(width))


class AttentiveDecoder(Layer):
  """Base of the two: the weights of the loop, and the state."""

  def __init__(
    self, config: SearchConfig, gates: int, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, H, C = config, config.units(width), config.memory_width(width)
    A = c.attention or H
    self.name, self.units = c.tag, H

    def weight(init: Init, inputs: int) -> nnx.Param:
      drawn = [init(rngs.params(), (inputs, H), inputs, position) for _ in range(gates)]
      return param(jnp.stack(drawn, axis=1), ('embed', None, 'inner'))

    self.w, self.w_context, self.u = (
      weight(c.init, width),
      weight(c.init, C),
      weight(c.recurrent_init, H),
    )
    self.b = (
      None
      if c.bias is None
      else param(
        self._first_bias(c.bias(rngs.params(), (gates, H), H, position)),
        (None, 'inner'),
        decay=False,
        matmul=False,
      )
    )
    self.w_query = param(c.attention_init(rngs.params(), (H, A), H, position), ('embed', 'inner'))
    self.w_key = param(c.attention_init(rngs.params(), (C, A), C, position), ('embed', 'inner'))
    self.v = param(c.score_init(rngs.params(), (A,), A, position), ('inner',), decay=False)

  def _first_bias(self, drawn_GH: Array) -> Array:
    return drawn_GH

  def first_states(self, memory: Memory) -> States:
    """The states before the first token."""
    raise NotImplementedError

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> SearchState:
    memory = required(memory, self.name)
    values = memory.y_BSC.astype(self.w[...].dtype)
    first = self.first_states(memory)
    return SearchState(
      first, SourceState(linear(values, self.w_key[...]), values, memory.mask_BS, first)
    )

  def select_rows(self, state: SearchState, index: Array, same_source: bool = False) -> SearchState:
    source = state.source if same_source else super().select_rows(state.source, index)
    return SearchState(super().select_rows(state.states, index), source)

  def run(
    self, x_BTD: Array, ctx: Context, state: SearchState | None
  ) -> tuple[SearchState, Array, Array, Array]:
    """The state to begin from, all hidden states and contexts, and the attention's weights."""
    B, T, _ = x_BTD.shape
    before = self.init_state(B, T, ctx.memory) if state is None else state
    s, weights = (
      before.source,
      AttentiveWeights(
        self.w[...],
        self.w_context[...],
        self.u[...],
        None if self.b is None else self.b[...],
        self.w_query[...],
        self.v[...],
      ),
    )
    y, c, a, last = attentive_decoder(
      x_BTD,
      weights,
      AttentionSource(s.keys_BSA, s.values_BSC, s.mask_BS),
      before.states,
      s.first,
      starts_BT(ctx.segments_BT, B, T),
    )
    return SearchState(last, s), y, c, a


class RnnSearch(AttentiveDecoder):
  """The decoder of Bahdanau et al. 2014 (appendix A.2): a GRU that reads the source by additive
  attention keyed on its state before, and the hidden layer of its output.

    s_0 = tanh(W_s m<-_1), m<-_1 the backward half of the encoder's output at the first word e_ij =
    v . tanh(W_a s_{i-1} + U_a m_j),  c_i = sum_j softmax_j(e_ij) m_j r, z = sigmoid(W x_i + U
    s_{i-1} + C c_i),  s~ = tanh(W x_i + U (r s_{i-1}) + C c_i),  s_i = z s_{i-1} + (1 - z) s~ t~_i
    = U_o s_{i-1} + V_o x_i + C_o c_i,  y_i = [max(t~_{i,2k-1}, t~_{i,2k})]_{k=1..l}

  x_i is the embedding of the word before. The paper writes 1 - z for z: weights of its z are ours
  negated. The output reads s_{i-1}, as printed there."""

  class Config(SearchConfig):
    """
    Attributes:
      maxout: l; the output is so wide.
      start_init: of W_s; `out_init`: of U_o, V_o and C_o.
    """

    maxout: int = 32
    init: Init = Normal(std=0.01)
    recurrent_init: Init = Orthogonal()
    attention_init: Init = Normal(std=0.001)
    score_init: Init = Zeros()
    start_init: Init = Normal(std=0.01)
    out_init: Init = Normal(std=0.01)
    bias: Init | None = None

    def validate(self):
      super().validate()
      self.require(self.maxout > 0, 'maxout', 'positive')
      self.require(
        self.source_width is None or self.source_width % 2 == 0,
        'source_width',
        'even: two directions side by side',
      )

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> RnnSearch:
      return RnnSearch(self, width, rngs, position)

    def out_width(self, width: int) -> int:
      return self.maxout

    def state_size(self, width: int, max_len: int) -> int:
      return self.searched(width, max_len) + 2 * self.units(width)

    @classmethod
    def examples(cls) -> tuple[RnnSearch.Config, ...]:
      n = Normal(std=0.3)
      some = cls(init=n, attention_init=n, score_init=n)
      return some, some.replace(hidden=24, attention=16, source_width=20, maxout=12, bias=n)

  def __init__(self, config: RnnSearch.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, 3, width, rngs, position)
    c, H, C = config, self.units, config.memory_width(width)
    self.w_start = param(
      c.start_init(rngs.params(), (C // 2, H), C // 2, position), ('embed', 'inner'), matmul=False
    )

    def out(inputs: int) -> nnx.Param:
      return param(
        c.out_init(rngs.params(), (inputs, 2 * c.maxout), inputs, position), ('embed', 'inner')
      )

    self.out_state, self.out_input, self.out_context = out(H), out(width), out(C)

  def first_states(self, memory: Memory) -> States:
    first_word = memory.y_BSC[:, 0, self.w_start[...].shape[0] :]
    return (
      jnp.tanh(linear(first_word.astype(jnp.float32), self.w_start[...].astype(jnp.float32))),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: SearchState | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    begun = self.init_state(B, T, ctx.memory) if state is None else state
    after, s_BTH, c_BTC, a_BTS = self.run(x_BTD, ctx, begun)
    before_BTH = jnp.concatenate(
      [begun.states[0][:, None].astype(s_BTH.dtype), s_BTH[:, :-1]], axis=1
    )
    starts = starts_BT(ctx.segments_BT, B, T)[:, :, None]
    before_BTH = jnp.where(starts, begun.source.first[0][:, None].astype(s_BTH.dtype), before_BTH)
    t = (
      linear(before_BTH, self.out_state[...])
      + linear(x_BTD, self.out_input[...])
      + linear(c_BTC, self.out_context[...])
    )
    y = t.reshape(B, T, -1, 2).max(-1)
    return Output(y, None if state is None else after, alignments=(a_BTS,) if ctx.align else ())


class GnmtAttention(AttentiveDecoder):
  """The bottom layer of GNMT's decoder (Wu et al. 2016, section 3): an LSTM that reads [x_t, c_t],
  where c_t is what one hidden layer's attention (eq. 4), keyed on this layer's output of the step
  before, finds in the encoder's output. c_t is shared as `CONTEXT` for all layers above to read at
  the same step."""

  class Config(SearchConfig):
    """
    Attributes:
      forget_bias: added to the forget gate's initial bias.
    """

    forget_bias: float = 0.0

    def validate(self):
      super().validate()
      self.require(
        self.bias is not None or self.forget_bias == 0,
        'forget_bias',
        '0 where there are no offsets (bias = None)',
      )

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> GnmtAttention:
      return GnmtAttention(self, width, rngs, position)

    def out_width(self, width: int) -> int:
      return self.units(width)

    def state_size(self, width: int, max_len: int) -> int:
      return self.searched(width, max_len) + 4 * self.units(width)

    @classmethod
    def examples(cls) -> tuple[GnmtAttention.Config, ...]:
      return cls(), cls(hidden=24, attention=16, source_width=20, forget_bias=1.0)

  def __init__(
    self, config: GnmtAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.forget_bias = config.forget_bias
    super().__init__(config, 4, width, rngs, position)

  def _first_bias(self, drawn_GH: Array) -> Array:
    return drawn_GH.at[FORGET].add(self.forget_bias)

  def first_states(self, memory: Memory) -> States:
    if memory.state is None:
      zeros = jnp.zeros((memory.y_BSC.shape[0], self.units))
      return zeros, zeros
    return memory.state.h_BH, memory.state.c_BH

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: SearchState | None = None
  ) -> Output:
    after, y, c, a = self.run(x_BTD, ctx, state)
    return Output(
      y, None if state is None else after, share={CONTEXT: c}, alignments=(a,) if ctx.align else ()
    )
