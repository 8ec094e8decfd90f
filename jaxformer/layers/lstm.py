"""The LSTM as a layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.init import FanInUniform, Init, Orthogonal, Zeros
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
from jaxformer.ops.linear import linear
from jaxformer.ops.recurrence import lstm
from jaxformer.sharding import param, shard

FORGET = 1  # which of the gates i, f, g, o
CONTEXT = 'context'  # the name under which a decoder's layer shares what it read of the memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LstmState:
  """The hidden state and the cell after the last token, fp32."""

  h_BH: Float[Array, 'B H']
  c_BH: Float[Array, 'B H']


class RecurrentConfig(LayerConfig, abstract=True):
  """What the gated recurrences share.

  Attributes:
    hidden: units H; None for the width. Where it is another number, a projection [H, width] without
      offsets follows.
    project: False leaves that projection out: the output is H wide.
    context_width: width of the `CONTEXT` that a layer below shares, to be read beside the input, [x,
      context]; None for none.
    init: of the weights of the input and of the projection; `recurrent_init`: of those of the
      hidden state. Each gate's matrix is drawn by itself.
    bias: initial values of the offsets, one vector a gate; None for no offsets.
  """

  hidden: int | None = None
  init: Init = FanInUniform()
  recurrent_init: Init = FanInUniform()
  bias: Init | None = Zeros()
  project: bool = True
  context_width: int | None = None

  def validate(self):
    self.require(self.hidden is None or self.hidden > 0, 'hidden', 'positive')
    self.require(
      self.project or self.hidden is not None,
      'project',
      'true where hidden is none, which needs no projection',
    )
    self.require(self.context_width is None or self.context_width > 0, 'context_width', 'positive')

  def units(self, width: int) -> int:
    """H."""
    return self.hidden or width

  def out_width(self, width: int) -> int:
    return width if self.project else self.units(width)

  @property
  def hands_over(self) -> bool:
    return True

  def reads(self, width: int) -> dict[str, int]:
    return {} if self.context_width is None else {CONTEXT: self.context_width}


class Recurrent(Layer):
  """Base of the gated recurrences: their parameters, and the projection of their output."""

  def __init__(
    self, config: RecurrentConfig, gates: int, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, H = config, config.units(width)

    def weight(init: Init, inputs: int) -> nnx.Param:
      drawn = [init(rngs.params(), (inputs, H), inputs, position) for _ in range(gates)]
      return param(jnp.stack(drawn, axis=1), ('embed', None, 'inner'))

    self.units, self.reads_context = H, c.context_width is not None
    self.w, self.u = weight(c.init, width + (c.context_width or 0)), weight(c.recurrent_init, H)
    self.b = (
      None
      if c.bias is None
      else param(
        self._first_bias(c.bias(rngs.params(), (gates, H), H, position)),
        (None, 'inner'),
        decay=False,
        matmul=False,
      )
    )
    self.w_out = (
      None
      if H in (width, c.out_width(width))
      else param(c.init(rngs.params(), (H, width), H, position), ('inner', 'embed'))
    )

  def _first_bias(self, drawn_GH: Array) -> Array:
    return drawn_GH

  def zeros(self, batch: int) -> State:
    """The state of a document that begins from nothing."""
    raise NotImplementedError

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> State:
    own = self.zeros(batch)
    given = own if memory is None or memory.state is None else memory.state
    if jax.tree.structure(given) != jax.tree.structure(own) or given.h_BH.shape != own.h_BH.shape:
      raise InputError(
        f'the decoder has a recurrence of {self.units} units where the encoder hands over the '
        'state of another'
      )
    return given

  def _input(self, x_BTD: Array, ctx: Context) -> Array:
    return (
      jnp.concatenate([x_BTD, ctx.shared[CONTEXT].astype(x_BTD.dtype)], axis=-1)
      if self.reads_context
      else x_BTD
    )

  def _weights(self) -> tuple[Array, Array, Array | None]:
    return self.w[...], self.u[...], None if self.b is None else self.b[...]

  def _out(self, y_BTH: Array) -> Array:
    y = shard(y_BTH, 'batch', 'time', 'inner')
    return y if self.w_out is None else linear(y, self.w_out[...])


class Lstm(Recurrent):
  """The LSTM with a forget gate and without peepholes (Hochreiter and Schmidhuber 1997; Gers et al.
  2000): `ops.recurrence.lstm`. One vector of offsets a gate; PyTorch's two add up to it."""

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
        '0 where there are no offsets (bias = None)',
      )

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Lstm:
      return Lstm(self, width, rngs, position)

    def state_size(self, width: int, max_len: int) -> int:
      return 2 * self.units(width)

    @classmethod
    def examples(cls) -> tuple[Lstm.Config, ...]:
      return (
        cls(),
        cls(hidden=48, recurrent_init=Orthogonal(), bias=None, forget_bias=0.0),
        cls(hidden=48, project=False, context_width=24),
      )

  def __init__(self, config: Lstm.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    self.config = config
    super().__init__(config, 4, width, rngs, position)

  def _first_bias(self, drawn_GH: Array) -> Array:
    return drawn_GH.at[FORGET].add(self.config.forget_bias)

  def zeros(self, batch: int) -> LstmState:
    zeros = jnp.zeros((batch, self.units))
    return LstmState(zeros, zeros)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: LstmState | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    first = self.zeros(B) if state is None else state
    y_BTH, (h, c) = lstm(
      self._input(x_BTD, ctx),
      *self._weights(),
      first.h_BH,
      first.c_BH,
      starts_BT(ctx.segments_BT, B, T),
    )
    return Output(self._out(y_BTH), None if state is None else LstmState(h, c))
