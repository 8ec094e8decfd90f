"""Decoder layers whose recurrence attends to the source at every step by additive attention: those
of RNNsearch and GNMT."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import Init, Normal, Orthogonal, Uniform, Zeros
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
  required,
)
from jaxformer.layers.lstm import ATTENTION_CONTEXT, gate_bias, gate_kernel
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
class AttentiveState:
  """The state of a recurrence with attention inside.

  Attributes:
    carried: what the recurrence carries after the last token, fp32.
    first: what a document starts from, fp32.
    keys, values, mask: of the source; True at its tokens.
  """

  carried: State
  first: State
  keys_BSA: Float[Array, 'B S A']
  values_BSC: Float[Array, 'B S C']
  mask_BS: Bool[Array, 'B S']

  @property
  def source(self) -> AttentionSource:
    """The source as `ops` take it."""
    return AttentionSource(self.keys_BSA, self.values_BSC, self.mask_BS)


class AttentiveDecoderConfig(LayerConfig, abstract=True):
  """Base of the configs of `RnnSearch` and `GnmtAttention`.

  Attributes:
    hidden: units H; None for the width.
    attention: hidden units A of the attention; None for H.
    source_width: C, of the encoder's output; None for the width.
    init: of the kernels of the input and of the attention's result; `recurrent_init`: of that of
      the hidden state, gate by gate; `attention_init`: of the attention's matrices; `score_init`:
      of the vector that maps its hidden units to a score.
    bias: initialization of the gates' biases; None for no biases.
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
    self.require_positive('hidden', 'attention', 'source_width')

  def units(self, width: int) -> int:
    """H."""
    return self.hidden or width

  def memory_width(self, width: int) -> int:
    return self.source_width or width

  def mixing_flops_per_token(self, width, length, causal):
    """Scores and the weighted sum over a source of `length`."""
    return 2.0 * length * ((self.attention or self.units(width)) + self.memory_width(width))


class AttentiveDecoder(Layer):
  """Base of the two: the weights of the recurrence, and the state."""

  def __init__(
    self,
    config: AttentiveDecoderConfig,
    width: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
    *,
    gates: int,
    forget_bias: float = 0.0,
  ):
    c, H, C = config, config.units(width), config.memory_width(width)
    A = c.attention or H
    self.units = H
    self.kernel = gate_kernel(c.init, (width, gates, H), rngs, position)
    self.context_kernel = gate_kernel(c.init, (C, gates, H), rngs, position)
    self.recurrent_kernel = gate_kernel(c.recurrent_init, (H, gates, H), rngs, position)
    self.bias = gate_bias(c.bias, (gates, H), rngs, position, forget_bias)
    dense = functools.partial(Dense, c.attention_init, rngs=rngs, position=position)
    self.query = dense((H, A), ('embed', 'inner'))
    self.key = dense((C, A), ('embed', 'inner'))
    self.score = param(c.score_init(rngs.params(), (A,), A, position), ('inner',), decay=False)

  def first_states(self, memory: Memory) -> States:
    """The states before the first token."""
    raise NotImplementedError

  def init_state(self, batch, max_len, memory=None) -> AttentiveState:
    memory = required(memory, type(self).__name__)
    values = memory.y_BSC.astype(self.kernel[...].dtype)
    first = self.first_states(memory)
    return AttentiveState(first, first, self.key(values), values, memory.mask_BS)

  def select_rows(
    self, state: AttentiveState, index: Array, same_source: bool = False
  ) -> AttentiveState:
    selected = Layer.select_rows(self, state, index)
    return dataclasses.replace(state, carried=selected.carried) if same_source else selected

  def run(
    self, x_BTD: Array, ctx: Context, state: AttentiveState
  ) -> tuple[AttentiveState, Array, Array, Array]:
    """Return the state after the last token, and of all tokens the hidden states, the results of
    the attention, and its weights."""
    weights = AttentiveWeights(
      self.kernel[...],
      self.context_kernel[...],
      self.recurrent_kernel[...],
      None if self.bias is None else self.bias[...],
      self.query.kernel[...],
      self.score[...],
    )
    starts = ctx.starts(x_BTD)
    y, c, a, last = attentive_decoder(
      x_BTD, weights, state.source, state.carried, state.first, starts
    )
    return dataclasses.replace(state, carried=last), y, c, a


class RnnSearch(AttentiveDecoder):
  """s_i = GRU(s_{i-1}, [x_i, c_i]) with additive attention c_i = sum_j softmax_j(v . tanh(W_a
  s_{i-1} + U_a m_j)) m_j (Bahdanau et al. 2014, appendix A.2).

  The decoder of RNNsearch, with the hidden layer of its output:

    s_0 = tanh(W_s m<-_1), m<-_1 the backward half of the encoder's output at the first word
    r, z = sigmoid(W x_i + U s_{i-1} + C c_i),  s~ = tanh(W x_i + U (r s_{i-1}) + C c_i)
    s_i = z s_{i-1} + (1 - z) s~
    t~_i = U_o s_{i-1} + V_o x_i + C_o c_i,  y_i = [max(t~_{i,2k-1}, t~_{i,2k})]_{k=1..l}

  x_i is the embedding of the previous word. The paper writes 1 - z for z: negate the weights of its
  z to get ours. The output reads s_{i-1}, as printed there."""

  class Config(AttentiveDecoderConfig):
    """
    Attributes:
      maxout: l, the width of the output.
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
      self.require_positive('maxout')
      self.require(
        self.source_width is None or self.source_width % 2 == 0,
        'source_width',
        'even: two directions side by side',
      )

    def out_width(self, width: int) -> int:
      return self.maxout

    @classmethod
    def examples(cls):
      n = Normal(std=0.3)
      some = cls(init=n, attention_init=n, score_init=n)
      return some, some.replace(hidden=24, attention=16, source_width=20, maxout=12, bias=n)

  def __init__(self, config: RnnSearch.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position, gates=3)
    c, H, C = config, self.units, config.memory_width(width)
    dense, l = functools.partial(Dense, rngs=rngs, position=position), c.maxout
    self.start = dense(c.start_init, (C // 2, H), ('embed', 'inner'), matmul=False)
    self.out_state = dense(c.out_init, (H, 2 * l), ('embed', 'inner'))
    self.out_input = dense(c.out_init, (width, 2 * l), ('embed', 'inner'))
    self.out_context = dense(c.out_init, (C, 2 * l), ('embed', 'inner'))

  def first_states(self, memory: Memory) -> States:
    kernel = self.start.kernel[...]
    first_word = memory.y_BSC[:, 0, kernel.shape[0] :]
    return (jnp.tanh(linear(first_word.astype(jnp.float32), kernel.astype(jnp.float32))),)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: AttentiveState | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    before = self.init_state(B, T, ctx.memory) if state is None else state
    after, s_BTH, c_BTC, a_BTS = self.run(x_BTD, ctx, before)
    (s_BH,), (first_BH,) = before.carried, before.first
    previous_BTH = jnp.concatenate([s_BH[:, None].astype(s_BTH.dtype), s_BTH[:, :-1]], axis=1)
    starts = ctx.starts(x_BTD)[:, :, None]
    previous_BTH = jnp.where(starts, first_BH[:, None].astype(s_BTH.dtype), previous_BTH)
    t = self.out_state(previous_BTH) + self.out_input(x_BTD) + self.out_context(c_BTC)
    y = t.reshape(B, T, -1, 2).max(-1)
    return Output(y, None if state is None else after, alignments=(a_BTS,) if ctx.align else ())


class GnmtAttention(AttentiveDecoder):
  """h_t = LSTM(h_{t-1}, [x_t, c_t]) with additive attention c_t to the source, keyed on h_{t-1} (Wu
  et al. 2016, section 3, eq. 4).

  The bottom layer of GNMT's decoder. c_t is shared as `ATTENTION_CONTEXT`, for all layers above to
  read at the same step."""

  class Config(AttentiveDecoderConfig):
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
        '0 if there are no biases (bias = None)',
      )

    def out_width(self, width: int) -> int:
      return self.units(width)

    @classmethod
    def examples(cls):
      return cls(), cls(hidden=24, attention=16, source_width=20, forget_bias=1.0)

  def __init__(
    self, config: GnmtAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    super().__init__(config, width, rngs, position, gates=4, forget_bias=config.forget_bias)

  def first_states(self, memory: Memory) -> States:
    if memory.state is None:
      zeros = jnp.zeros((memory.y_BSC.shape[0], self.units))
      return zeros, zeros
    return memory.state.h_BH, memory.state.c_BH

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: AttentiveState | None = None
  ) -> Output:
    before = self.init_state(*x_BTD.shape[:2], ctx.memory) if state is None else state
    after, y, c, a = self.run(x_BTD, ctx, before)
    return Output(
      y,
      None if state is None else after,
      share={ATTENTION_CONTEXT: c},
      alignments=(a,) if ctx.align else (),
    )
