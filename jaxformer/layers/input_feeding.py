"""A decoder of LSTMs and attention whose output is read again at the next step (Luong et al. 2015,
section 3.3)."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.cross_attention import KeysState, LuongAttention
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  dropout,
  required,
  starts_BT,
)
from jaxformer.layers.lstm import Lstm, LstmState
from jaxformer.ops.attentive_decoder import AttentionSource
from jaxformer.ops.input_feeding import InputFeedingWeights, input_feeding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FedSource:
  """What is attended to, and the states of the LSTMs that a document begins from (fp32)."""

  keys: KeysState
  first: tuple[LstmState, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FedState:
  """The output and the states of the LSTMs after the last token, fp32, and what is attended to."""

  y_BH: Float[Array, 'B H']
  lstms: tuple[LstmState, ...]
  source: FedSource


class InputFeeding(Layer):
  """LSTMs one on the other with `LuongAttention` on top, whose output the bottom one reads beside
  the input of the next step, so that the decoder knows what it attended to (Luong et al. 2015,
  section 3.3):

    h^1_t = LSTM_1([x_t, y_{t-1}]),  h^l_t = LSTM_l(h^{l-1}_t),  y_t = LuongAttention(h^L_t) =
    tanh(W [c_t, h^L_t])

  y_0 = 0. Where states are handed over, the LSTMs begin from those of the encoder's layers, from
  the bottom up; those beyond them from zeros."""

  class Config(LayerConfig):
    """
    Attributes:
      layers: number of LSTMs, L.
      lstm: of each; the bottom one's `context` is what is fed back.
      attention: on top; it reads the units of an LSTM.
      dropout: rate on what an LSTM reads of the attention before and of the LSTM below. (Dropping
        x_t is left to what makes it.)
    """

    layers: int = 2
    lstm: Lstm.Config = Lstm.Config()
    attention: LuongAttention.Config = LuongAttention.Config()
    dropout: float = 0.0

    def validate(self):
      self.require(self.layers > 0, 'layers', 'positive')
      if self.lstm.context_width is not None:
        raise InputError(
          f'InputFeeding.lstm.context_width = {self.lstm.context_width}: must be none: the bottom one reads '
          'what is fed back'
        )
      if self.lstm.project and self.lstm.hidden is not None:
        raise InputError(
          'InputFeeding.lstm.project = True: must be false where hidden is given: attention reads '
          'the units'
        )
      self.require(0 <= self.dropout < 1, 'dropout', 'at least 0 and below 1')

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> InputFeeding:
      return InputFeeding(self, width, rngs, position)

    def out_width(self, width: int) -> int:
      return self.lstm.units(width)

    def memory_width(self, width: int) -> int:
      return self.attention.memory_width(self.lstm.units(width))

    def state_size(self, width: int, max_len: int) -> int:
      H = self.lstm.units(width)
      return (
        self.attention.state_size(H, max_len)
        + H
        + 2 * self.layers * self.lstm.state_size(width, max_len)
      )

    @classmethod
    def examples(cls) -> tuple[InputFeeding.Config, ...]:
      return (
        cls(),
        cls(layers=1, attention=LuongAttention.Config(score_init=None)),
        cls(
          layers=3,
          lstm=Lstm.Config(hidden=48, project=False, bias=None, forget_bias=0.0),
          attention=LuongAttention.Config(source_width=24),
        ),
      )

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      return self.attention.mixing_flops_per_token(self.lstm.units(width), length, causal)

  def __init__(
    self, config: InputFeeding.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    H = config.lstm.units(width)
    self.width, self.dropout = width, config.dropout
    bottom = config.lstm.replace(context_width=H).build(width, rngs, position)
    self.lstms = nnx.List(
      [bottom, *(config.lstm.build(H, rngs, position) for _ in range(config.layers - 1))]
    )
    self.attention = config.attention.build(H, rngs, position)

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> FedState:
    memory = required(memory, 'InputFeeding')
    ended = itertools.chain((s for block in memory.states for s in block), itertools.repeat(None))
    first = tuple(
      lstm.init_state(batch, max_len, memory.replace(state=state))
      for lstm, state in zip(self.lstms, ended, strict=False)
    )
    return FedState(
      jnp.zeros_like(first[0].h_BH), first, FedSource(self.attention.keys(memory), first)
    )

  def select_rows(self, state: FedState, index: Array, same_source: bool = False) -> FedState:
    source = state.source if same_source else super().select_rows(state.source, index)
    return FedState(*super().select_rows((state.y_BH, state.lstms), index), source)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: FedState | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    before = self.init_state(B, T, ctx.memory) if state is None else state
    keys, first, H = before.source.keys, before.source.first, before.y_BH.shape[-1]
    drops = self.dropout > 0 and ctx.dropout_key is not None
    factors = (
      dropout(jnp.ones((B, T, len(first) * H), x_BTD.dtype), self.dropout, ctx) if drops else None
    )
    source = AttentionSource(keys.k_BSGK[:, :, 0], keys.v_BSGC[:, :, 0], keys.mask_BS)
    y, a, (fed, *last) = input_feeding(
      x_BTD,
      self._weights(),
      source,
      _in_a_row(before.y_BH, before.lstms),
      _in_a_row(jnp.zeros_like(before.y_BH), first),
      starts_BT(ctx.segments_BT, B, T),
      factors,
    )
    after = tuple(
      LstmState(h, c) for h, c in zip(last[: len(first)], last[len(first) :], strict=True)
    )
    return Output(
      y,
      None if state is None else FedState(fed, after, before.source),
      alignments=(a,) if ctx.align else (),
    )

  def _weights(self) -> InputFeedingWeights:
    w = [lstm.w[...] for lstm in self.lstms]
    return InputFeedingWeights(
      w[0][: self.width],
      (w[0][self.width :], *w[1:]),
      tuple(lstm.u[...] for lstm in self.lstms),
      tuple(lstm.b[...] for lstm in self.lstms if lstm.b is not None),
      self.attention.out.kernel[...],
    )


def _in_a_row(y_BH: Array, states: tuple[LstmState, ...]) -> tuple[Array, ...]:
  """States in the order of `ops.input_feeding.input_feeding`."""
  return y_BH, *(s.h_BH for s in states), *(s.c_BH for s in states)
