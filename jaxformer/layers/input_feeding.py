"""A decoder of LSTMs and attention whose output is fed back into the next step."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.attentive_decoder import AttentiveDecoder, AttentiveState
from jaxformer.layers.cross_attention import LuongAttention
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Output,
  dropout,
  required,
)
from jaxformer.layers.lstm import Lstm, RecurrentState
from jaxformer.ops.input_feeding import InputFeedingWeights, input_feeding


class InputFeeding(Layer):
  """h^1_t = LSTM_1([x_t, y_{t-1}]), h^l_t = LSTM_l(h^{l-1}_t), y_t = tanh([c_t, h^L_t] W), the
  output of `LuongAttention` (Luong et al. 2015, section 3.3).

  The bottom LSTM reads the previous output together with the input, so that the decoder knows what
  it attended to. y_0 = 0. If an encoder hands over states, the LSTMs start from those of its
  layers, from the bottom up; those beyond them from zeros. The state carries y and the LSTMs'
  states."""

  class Config(LayerConfig):
    """
    Attributes:
      layers: number of LSTMs, L.
      lstm: of each; the `context_width` of the bottom one is the width of what is fed back.
      attention: on top; it reads the units of an LSTM.
      dropout: rate on what an LSTM reads of the previous output and of the LSTM below. (Dropout of
        x_t belongs to the layer that makes it.)
    """

    layers: int = 2
    lstm: Lstm.Config = Lstm.Config()
    attention: LuongAttention.Config = LuongAttention.Config()
    dropout: float = 0.0

    def validate(self):
      self.require_positive('layers')
      if self.lstm.context_width is not None:
        raise InputError(
          'InputFeeding.lstm.context_width',
          self.lstm.context_width,
          'none: the bottom one reads what is fed back',
        )
      if self.lstm.project and self.lstm.hidden is not None:
        raise InputError(
          'InputFeeding.lstm.project',
          self.lstm.project,
          'false where hidden is given: attention reads the units',
        )
      self.require_rate('dropout')

    def out_width(self, width: int) -> int:
      return self.lstm.units(width)

    def memory_width(self, width: int) -> int:
      return self.attention.memory_width(self.lstm.units(width))

    @classmethod
    def examples(cls):
      return (
        cls(),
        cls(layers=1, attention=LuongAttention.Config(score_init=None)),
        cls(
          layers=3,
          lstm=Lstm.Config(hidden=48, project=False, bias=None, forget_bias=0.0),
          attention=LuongAttention.Config(source_width=24),
        ),
      )

    def mixing_flops_per_token(self, width, length, causal):
      return self.attention.mixing_flops_per_token(self.lstm.units(width), length, causal)

  def __init__(
    self, config: InputFeeding.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    H = config.lstm.units(width)
    self.width, self.dropout = width, config.dropout
    bottom = Lstm(config.lstm.replace(context_width=H), width, rngs, position)
    self.lstms = nnx.List(
      [bottom, *(Lstm(config.lstm, H, rngs, position) for _ in range(config.layers - 1))]
    )
    self.attention = config.attention.build(H, rngs, position)

  def init_state(self, batch, max_len, memory=None) -> AttentiveState:
    memory = required(memory, 'InputFeeding')
    final = itertools.chain((s for block in memory.states for s in block), itertools.repeat(None))
    first = tuple(
      lstm.init_state(batch, max_len, memory.replace(state=state))
      for lstm, state in zip(self.lstms, final, strict=False)
    )
    y_BH = jnp.zeros_like(first[0].h_BH)
    source = self.attention.keys(memory)
    keys, values = source.k_BSGK[:, :, 0], source.v_BSGC[:, :, 0]
    return AttentiveState((y_BH, first), first, keys, values, source.mask_BS)

  select_rows = AttentiveDecoder.select_rows

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: AttentiveState | None = None
  ) -> Output:
    (B, T, _), L = x_BTD.shape, len(self.lstms)
    before = self.init_state(B, T, ctx.memory) if state is None else state
    factors = None
    if self.dropout > 0 and ctx.dropout_key is not None:
      units = before.carried[0].shape[-1]
      factors = dropout(jnp.ones((B, T, L * units), x_BTD.dtype), self.dropout, ctx)
    y, a, (fed, *last) = input_feeding(
      x_BTD,
      self._weights(),
      before.source,
      _flat(*before.carried),
      _flat(jnp.zeros_like(before.carried[0]), before.first),
      ctx.starts(x_BTD),
      factors,
    )
    after = tuple(RecurrentState(h, c) for h, c in zip(last[:L], last[L:], strict=True))
    return Output(
      y,
      None if state is None else dataclasses.replace(before, carried=(fed, after)),
      alignments=(a,) if ctx.align else (),
    )

  def _weights(self) -> InputFeedingWeights:
    w = [lstm.kernel[...] for lstm in self.lstms]
    return InputFeedingWeights(
      w[0][: self.width],
      (w[0][self.width :], *w[1:]),
      tuple(lstm.recurrent_kernel[...] for lstm in self.lstms),
      tuple(lstm.bias[...] for lstm in self.lstms if lstm.bias is not None),
      self.attention.out.kernel[...],
    )


def _flat(y_BH: Array, states: tuple[RecurrentState, ...]) -> tuple[Array, ...]:
  """States in the order of `ops.input_feeding.input_feeding`."""
  return y_BH, *(s.h_BH for s in states), *(s.c_BH for s in states)
