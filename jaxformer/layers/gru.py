"""The gated recurrent unit as a layer, with the reset gate in either of its places."""

from __future__ import annotations

from flax import nnx

from jaxformer.layers.init import Orthogonal
from jaxformer.layers.layer import LayerPosition
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

    @classmethod
    def examples(cls):
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

  def run(self, x_BTI, state, starts_BT):
    bias = None if self.recurrent_bias is None else self.recurrent_bias[...]
    y_BTH, h = gru(
      x_BTI, *self.weights(), state.h_BH, starts_BT, after=self.reset_after, b_after_H=bias
    )
    return y_BTH, RecurrentState(h)
