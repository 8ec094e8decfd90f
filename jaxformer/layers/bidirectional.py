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
  starts_BT,
)
from jaxformer.layers.lstm import Lstm, RecurrentConfig


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
    documents_BT, index_BT = _reversal(ctx.segments_BT, *x_BTD.shape[:2])
    backward_ctx = ctx.fold(1).replace(
      segments_BT=documents_BT,
      shared={name: _reversed(v, index_BT) for name, v in ctx.shared.items()},
    )
    backward = self.backward(_reversed(x_BTD, index_BT), backward_ctx, before_backward)
    y = jnp.concatenate([forward.y, _reversed(backward.y, index_BT)], axis=-1)
    return Output(y, None if state is None else (forward.state, backward.state))

  def handed_over(self, state: tuple[State, State]) -> State:
    return state[1]


def _reversal(
  segments_BT: Int[Array, 'B T'] | None, batch: int, length: int
) -> tuple[Int[Array, 'B T'] | None, Int[Array, 'B T'] | None]:
  """Return how rows are reversed: the documents in that order, and the index for `_reversed`.

  The documents before the last from right to left, then the last, so that the recurrence ends at
  its first token even if padding precedes it. The permutation is its own inverse."""
  if segments_BT is None:
    return None, None
  # each document has a number of its own
  number_BT = jnp.cumsum(starts_BT(segments_BT, batch, length), axis=1, dtype=jnp.int32)
  # positions of other documents
  earlier_B = jnp.sum(number_BT != number_BT[:, -1:], axis=1, dtype=jnp.int32)
  index_BT = (earlier_B[:, None] - 1 - jnp.arange(length, dtype=jnp.int32)[None]) % length
  return _reversed(number_BT, index_BT), index_BT


def _reversed(x: Array, index_BT: Array | None) -> Array:
  if index_BT is None:
    return jnp.flip(x, 1)
  return jnp.take_along_axis(x, index_BT.reshape(*index_BT.shape, *(1,) * (x.ndim - 2)), axis=1)
