"""A recurrence in both directions."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.layers.gru import Gru
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Output,
  State,
  take_positions,
)
from jaxformer.layers.lstm import Lstm, RecurrentConfig
from jaxformer.ops.documents import count_starts


class Bidirectional(Layer):
  """y_t = [forward_t, backward_t], two recurrences, one from the left and one from the right
  (Schuster and Paliwal 1997, section II).

  The output is twice as wide as that of one. Each direction has weights of its own. The state has
  those of the two directions: forward after the last token of the row, backward after the first
  token of the row's last document."""

  class Config(LayerConfig):
    """
    Attributes:
      layer: the recurrence.
    """

    layer: RecurrentConfig = Lstm.Config()

    @property
    def decodes(self) -> bool:
      return False

    @property
    def hands_over(self) -> bool:
      return True

    def out_width(self, width: int) -> int:
      return 2 * self.layer.out_width(width)

    def reads(self, width: int) -> dict[str, int]:
      return self.layer.reads(width)

    @classmethod
    def examples(cls):
      return cls(), cls(layer=Gru.Config(hidden=24, project=False))

  def __init__(
    self, config: Bidirectional.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.forward = config.layer.build(width, rngs, position)
    self.backward = config.layer.build(width, rngs, position)

  def init_state(self, batch, max_len, memory=None) -> tuple[State, State]:
    return self.forward.init_state(batch, max_len), self.backward.init_state(batch, max_len)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: tuple[State, State] | None = None
  ) -> Output:
    before, before_backward = (None, None) if state is None else state
    forward = self.forward(x_BTD, ctx.fold(0), before)
    # each document has a number of its own
    number_BT = count_starts(ctx.starts(x_BTD))
    index_BT = _reversal(number_BT)
    backward_ctx = ctx.fold(1).replace(
      segments_BT=take_positions(number_BT, index_BT),
      shared={name: take_positions(v, index_BT) for name, v in ctx.shared.items()},
    )
    backward = self.backward(take_positions(x_BTD, index_BT), backward_ctx, before_backward)
    y = jnp.concatenate([forward.y, take_positions(backward.y, index_BT)], axis=-1)
    return Output(y, None if state is None else (forward.state, backward.state))

  def handed_over(self, state: tuple[State, State]) -> State:
    return state[1]


def _reversal(number_BT: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Return the index for `take_positions` of rows of numbered documents: those before the last from
  right to left, then the last, so that the recurrence ends at its first token even if padding
  precedes it. The permutation is its own inverse."""
  earlier_B = jnp.sum(number_BT != number_BT[:, -1:], axis=1, dtype=jnp.int32)
  length = number_BT.shape[1]
  return (earlier_B[:, None] - 1 - jnp.arange(length, dtype=jnp.int32)[None]) % length
