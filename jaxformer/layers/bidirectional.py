"""A recurrence in both directions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import InputError
from jaxformer.layers.gru import Gru
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
  starts_BT,
)
from jaxformer.layers.lstm import Lstm, RecurrentConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BidirectionalState:
  """The states that the two directions begin from, or ended in: forward after the last token of the
  row, backward after the first token of the row's last document."""

  forward: State
  backward: State


class Bidirectional(Layer):
  """[forward_t, backward_t]: two recurrences, one from the left and one from the right (Schuster
  and Paliwal 1997), twice as wide as one. Each has weights of its own."""

  class Config(LayerConfig):
    """
    Attributes:
      layer: the recurrence.
    """

    layer: RecurrentConfig = Lstm.Config()

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Bidirectional:
      return Bidirectional(self, width, rngs, position)

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
    def examples(cls) -> tuple[Bidirectional.Config, ...]:
      return cls(), cls(layer=Gru.Config(hidden=24, project=False))

  def __init__(
    self, config: Bidirectional.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    self.forward, self.backward = (
      config.layer.build(width, rngs, position),
      config.layer.build(width, rngs, position),
    )

  def init_state(
    self, batch: int, max_len: int, memory: Memory | None = None
  ) -> BidirectionalState:
    return BidirectionalState(
      self.forward.init_state(batch, max_len), self.backward.init_state(batch, max_len)
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: BidirectionalState | None = None
  ) -> Output:
    first = BidirectionalState(None, None) if state is None else state
    forward = self.forward(x_BTD, ctx.fold(0), first.forward)
    back = _Backwards(ctx.segments_BT, *x_BTD.shape[:2])
    shared = {name: back.there(v) for name, v in ctx.shared.items()}
    backward = self.backward(
      back.there(x_BTD),
      ctx.fold(1).replace(segments_BT=back.segments_BT, shared=shared),
      first.backward,
    )
    y = jnp.concatenate([forward.y, back.again(backward.y)], axis=-1)
    return Output(y, None if state is None else BidirectionalState(forward.state, backward.state))

  def handed_over(self, state: BidirectionalState) -> State:
    return state.backward

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: BidirectionalState) -> Output:
    raise InputError('Bidirectional: reads a sequence from both ends and cannot decode')


class _Backwards:
  """Rows from the right to the left. The last document of a row comes last, so that the recurrence
  ends at its first token even where padding stands before it."""

  def __init__(self, segments_BT: Int[Array, 'B T'] | None, batch: int, length: int):
    self.segments_BT = self._index_BT = None
    if segments_BT is None:
      return
    # each document has one of its own
    number_BT = jnp.cumsum(starts_BT(segments_BT, batch, length), axis=1, dtype=jnp.int32)
    # positions of other documents
    earlier_B = jnp.sum(number_BT != number_BT[:, -1:], axis=1, dtype=jnp.int32)
    self._index_BT = (earlier_B[:, None] - 1 - jnp.arange(length, dtype=jnp.int32)[None]) % length
    self.segments_BT = self.there(number_BT)

  def there(self, x: Array) -> Array:
    """[B, T, ...] backwards: the documents before the last from right to left, then the last."""
    return jnp.flip(x, 1) if self._index_BT is None else _taken(x, self._index_BT)

  def again(self, x: Array) -> Array:
    """As it was: the way there is its own inverse."""
    return self.there(x)


def _taken(x: Array, index_BT: Array) -> Array:
  return jnp.take_along_axis(x, index_BT.reshape(*index_BT.shape, *(1,) * (x.ndim - 2)), axis=1)
