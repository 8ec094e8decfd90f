"""The LSTM as a layer, and what it shares with the GRU."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.config import InputError
from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init, Orthogonal, Zeros
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.ops.recurrence import lstm
from jaxformer.sharding import param, shard

FORGET_GATE = 1  # index among the gates i, f, g, o
ATTENTION_CONTEXT = 'context'  # the name under which a decoder layer shares what it attended to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
  """The hidden state and, in an LSTM, the cell after the last token, fp32."""

  h_BH: Float[Array, 'B H']
  c_BH: Any = None  # [B, H]; None in a GRU


def gate_kernel(
  init: Init, shape: tuple[int, int, int], rngs: nnx.Rngs, position: LayerPosition
) -> nnx.Param:
  """The kernel `[inputs, gates, H]` of all gates; each gate's is drawn independently."""
  inputs, gates, H = shape
  drawn = [init(rngs.params(), (inputs, H), inputs, position) for _ in range(gates)]
  return param(jnp.stack(drawn, axis=1), ('embed', None, 'inner'))


def gate_bias(
  init: Init | None,
  shape: tuple[int, int],
  rngs: nnx.Rngs,
  position: LayerPosition,
  forget_bias: float = 0.0,
) -> nnx.Param | None:
  """The biases `[gates, H]`, with `forget_bias` added to that of an LSTM's forget gate."""
  if init is None:
    return None
  drawn_GH = init(rngs.params(), shape, shape[1], position)
  if forget_bias:
    drawn_GH = drawn_GH.at[FORGET_GATE].add(forget_bias)
  return param(drawn_GH, (None, 'inner'), decay=False, matmul=False)


class RecurrentConfig(LayerConfig, abstract=True):
  """Base of the configs of gated recurrences.

  Attributes:
    hidden: units H; None for the width. If they differ, a projection [H, width] without bias
      follows.
    project: False leaves that projection out: the output is H wide.
    context_width: width of the `ATTENTION_CONTEXT` that a layer below shares, read together with
      the input, [x, context]; None for none.
    init: of the kernels of the input and of the projection; `recurrent_init`: of that of the hidden
      state. Each gate's is drawn independently.
    bias: initialization of the biases; None for no biases.
  """

  hidden: int | None = None
  init: Init = FanInUniform()
  recurrent_init: Init = FanInUniform()
  bias: Init | None = Zeros()
  project: bool = True
  context_width: int | None = None

  def validate(self):
    self.require_positive('hidden', 'context_width')
    self.require(
      self.project or self.hidden is not None,
      'project',
      'true where hidden is none, which needs no projection',
    )

  def units(self, width: int) -> int:
    """H."""
    return self.hidden or width

  def out_width(self, width: int) -> int:
    return width if self.project else self.units(width)

  @property
  def hands_over(self) -> bool:
    return True

  def reads(self, width: int) -> dict[str, int]:
    return {} if self.context_width is None else {ATTENTION_CONTEXT: self.context_width}


class Recurrent(Layer):
  """Base of the gated recurrences: their parameters, and the projection of their output."""

  has_cell: ClassVar[bool] = False  # whether the state has a cell c beside h

  def __init__(
    self,
    config: RecurrentConfig,
    width: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
    *,
    gates: int,
    forget_bias: float = 0.0,
  ):
    c, H, inputs = config, config.units(width), width + (config.context_width or 0)
    self.units, self.reads_context = H, c.context_width is not None
    self.kernel = gate_kernel(c.init, (inputs, gates, H), rngs, position)
    self.recurrent_kernel = gate_kernel(c.recurrent_init, (H, gates, H), rngs, position)
    self.bias = gate_bias(c.bias, (gates, H), rngs, position, forget_bias)
    self.out = (
      None
      if H in (width, c.out_width(width))
      else Dense(c.init, (H, width), ('inner', 'embed'), rngs=rngs, position=position)
    )

  def zeros(self, batch: int) -> RecurrentState:
    """The state at the start of a document."""
    zeros = jnp.zeros((batch, self.units))
    return RecurrentState(zeros, zeros if self.has_cell else None)

  def init_state(self, batch, max_len, memory=None) -> RecurrentState:
    own = self.zeros(batch)
    given = own if memory is None or memory.state is None else memory.state
    if jax.tree.structure(given) != jax.tree.structure(own) or given.h_BH.shape != own.h_BH.shape:
      raise InputError(
        f'the decoder has a recurrence of {self.units} units where the encoder hands over the '
        'state of another'
      )
    return given

  def run(
    self, x_BTI: Array, state: RecurrentState, starts_BT: Bool[Array, 'B T']
  ) -> tuple[Array, RecurrentState]:
    """Return the hidden state after every token, and the state after the last one."""
    raise NotImplementedError

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: RecurrentState | None = None
  ) -> Output:
    first = self.zeros(len(x_BTD)) if state is None else state
    if self.reads_context:
      context_BTC = ctx.shared[ATTENTION_CONTEXT].astype(x_BTD.dtype)
      x_BTD = jnp.concatenate([x_BTD, context_BTC], axis=-1)
    y, last = self.run(x_BTD, first, ctx.starts(x_BTD))
    y = shard(y, 'batch', 'time', 'inner')
    return Output(y if self.out is None else self.out(y), None if state is None else last)

  def weights(self) -> tuple[Array, Array, Array | None]:
    bias = None if self.bias is None else self.bias[...]
    return self.kernel[...], self.recurrent_kernel[...], bias


class Lstm(Recurrent):
  """i, f, o = sigmoid(x W + h U + b), g = tanh(x W + h U + b); c = f c + i g, h = o tanh(c),
  without peepholes (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

  `ops.recurrence.lstm`. There is one bias per gate; PyTorch's two add up to it."""

  class Config(RecurrentConfig):
    """
    Attributes:
      forget_bias: added to the forget gate's initial bias, so that cells remember from the start
        (Gers et al. 2000; 1 as Jozefowicz et al. 2015 recommend).
    """

    forget_bias: float = 1.0

    def validate(self):
      super().validate()
      self.require(
        self.bias is not None or self.forget_bias == 0,
        'forget_bias',
        '0 if there are no biases (bias = None)',
      )

    @classmethod
    def examples(cls):
      return (
        cls(),
        cls(hidden=48, recurrent_init=Orthogonal(), bias=None, forget_bias=0.0),
        cls(hidden=48, project=False, context_width=24),
      )

  has_cell = True

  def __init__(self, config: Lstm.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position, gates=4, forget_bias=config.forget_bias)

  def run(self, x_BTI, state, starts_BT):
    y_BTH, (h, c) = lstm(x_BTI, *self.weights(), state.h_BH, state.c_BH, starts_BT)
    return y_BTH, RecurrentState(h, c)
