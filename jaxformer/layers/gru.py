"""The gated recurrent unit as a layer, with the reset gate in either of its places."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.layers.init import Orthogonal
from jaxformer.layers.layer import Context, LayerPosition, Output, starts_BT
from jaxformer.layers.lstm import Recurrent, RecurrentConfig
from jaxformer.ops.recurrence import gru
from jaxformer.sharding import param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GruState:
  """The hidden state after the last token, fp32."""

  h_BH: Float[Array, 'B H']


class Reset(Config, abstract=True):
  """Base of the places where the reset gate r acts on the candidate n."""


class ResetState(Reset):
  """n = tanh(x W + b + (r h) U) (Cho et al. 2014, eq. 8; Bahdanau et al. 2014, appendix A)."""


class ResetProduct(Reset):
  """n = tanh(x W + b + r (h U + b')) (cuDNN, PyTorch): the three products with h are one, which is
  faster. b' is there where there are offsets."""


class Gru(Recurrent):
  """h_t = z h_{t-1} + (1 - z) n, with r, z = sigmoid(x W + h U + b) (Cho et al. 2014):
  `ops.recurrence.gru`.

  PyTorch's two vectors of offsets add up to `b` for r and z; for n they are `b` and b' of
  `ResetProduct`. Bahdanau et al. 2014 write 1 - z for z: weights of theirs are ours after those of
  z are negated."""

  class Config(RecurrentConfig):
    """
    Attributes:
      reset: where the reset gate acts; its type says which of two cells this is.
    """

    reset: Reset = ResetState()

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Gru:
      return Gru(self, width, rngs, position)

    def state_size(self, width: int, max_len: int) -> int:
      return self.units(width)

    @classmethod
    def examples(cls) -> tuple[Gru.Config, ...]:
      return (
        cls(recurrent_init=Orthogonal()),
        cls(reset=ResetProduct()),
        cls(hidden=48, bias=None, reset=ResetProduct()),
      )

  def __init__(self, config: Gru.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, 3, width, rngs, position)
    self.after, H = isinstance(config.reset, ResetProduct), self.units
    bias = config.bias if self.after else None
    self.b_after = (
      None
      if bias is None
      else param(bias(rngs.params(), (H,), H, position), ('inner',), decay=False)
    )

  def zeros(self, batch: int) -> GruState:
    return GruState(jnp.zeros((batch, self.units)))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: GruState | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    first = self.zeros(B) if state is None else state
    y_BTH, h = gru(
      self._input(x_BTD, ctx),
      *self._weights(),
      first.h_BH,
      starts_BT(ctx.segments_BT, B, T),
      after=self.after,
      b_after_H=None if self.b_after is None else self.b_after[...],
    )
    return Output(self._out(y_BTH), None if state is None else GruState(h))
