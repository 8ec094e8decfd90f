"""The gated recurrent unit as a layer, with the reset gate in either of its places."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.init import Orthogonal
from jaxformer.layers.layer import Context, LayerPosition, Output
from jaxformer.layers.lstm import Recurrent, RecurrentConfig, RecurrentState
from jaxformer.ops.recurrence import gru
from jaxformer.sharding import param


class Gru(Recurrent):
  """h_t = z h_{t-1} + (1 - z) n, with r, z = sigmoid(x W + h U + b) and n = tanh(x W + b + (r h) U)
  (Cho et al. 2014, eq. 5-8).

  `ops.recurrence.gru`. PyTorch's two biases add up to `bias` for r and z; for n they are `bias` and
  `recurrent_bias`. Bahdanau et al. 2014 write 1 - z for z: negate the weights of their z to get
  ours."""

  class Config(RecurrentConfig):
    """
    Attributes:
      reset_after: whether the reset gate acts after the product with the hidden state, n = tanh(x W
        + b + r (h U + b')) (cuDNN, PyTorch, Keras), so that the three products with h are one,
        which is faster; there is a b' if there are biases. False: before it (Cho et al. 2014, eq.
        8; Bahdanau et al. 2014, appendix A).
    """

    reset_after: bool = False

    def state_size(self, width: int, max_len: int) -> int:
      return self.units(width)

    @classmethod
    def examples(cls) -> tuple[Gru.Config, ...]:
      return (
        cls(recurrent_init=Orthogonal()),
        cls(reset_after=True),
        cls(hidden=48, bias=None, reset_after=True),
      )

  def __init__(self, config: Gru.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position, gates=3)
    self.reset_after, H = config.reset_after, self.units
    bias = config.bias if self.reset_after else None
    self.recurrent_bias = (
      None
      if bias is None
      else param(bias(rngs.params(), (H,), H, position), ('inner',), decay=False)
    )

  def zeros(self, batch: int) -> RecurrentState:
    return RecurrentState(jnp.zeros((batch, self.units)))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: RecurrentState | None = None
  ) -> Output:
    first = self.zeros(len(x_BTD)) if state is None else state
    y_BTH, h = gru(
      self._input(x_BTD, ctx),
      *self._weights(),
      first.h_BH,
      ctx.starts(x_BTD),
      after=self.reset_after,
      b_after_H=None if self.recurrent_bias is None else self.recurrent_bias[...],
    )
    return Output(self._out(y_BTH), None if state is None else RecurrentState(h))
