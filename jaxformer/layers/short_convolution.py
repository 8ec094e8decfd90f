"""The gated short convolution of LFM2: a layer whose memory is a few inputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.ops.convolution import short_convolution
from jaxformer.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShortConvolutionState:
  """The last J = d_conv - 1 inputs of the convolution."""

  inputs_BJD: Float[Array, 'B J D']


class ShortConvolution(Layer):
  """y = (c * conv(b * x)) W_o with b = u W_b, c = u W_c, x = u W_x (Liquid AI 2025, LFM2).

  The convolution is causal and depthwise: each channel has a kernel of its own. Both gates are
  linear, without an activation."""

  class Config(LayerConfig):
    """
    Attributes:
      d_conv: kernel size of the convolution.
      bias: whether the projections have biases; `conv_bias`: whether the convolution has one.
      init: of the projections in; `out_init`: of the projection out; `conv_init`: of the
        convolution and its bias.
    """

    d_conv: int = 3
    bias: bool = False
    conv_bias: bool = False
    init: Init = Normal()
    out_init: Init = Normal()
    conv_init: Init = FanInUniform()

    def validate(self):
      self.require_positive('d_conv')

    @classmethod
    def examples(cls):
      return cls(), cls(d_conv=5, bias=True, conv_bias=True)

  def __init__(
    self, config: ShortConvolution.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c = config
    self.config = c
    make = functools.partial(Dense, rngs=rngs, position=position)
    dense = functools.partial(make, c.init, (width, width), ('embed', 'inner'), bias=c.bias)
    self.b, self.c, self.x = dense(), dense(), dense()
    self.conv = make(
      c.conv_init, (c.d_conv, width), ('state', 'inner'), bias=c.conv_init if c.conv_bias else False
    )
    self.out = make(c.out_init, (width, width), ('inner', 'embed'), bias=c.bias)

  def init_state(self, batch, max_len, memory=None) -> ShortConvolutionState:
    J, width = self.config.d_conv - 1, self.conv.kernel[...].shape[-1]
    return ShortConvolutionState(jnp.zeros((batch, J, width), self.x.dtype))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: ShortConvolutionState | None = None
  ) -> Output:
    b, c, x = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.b, self.c, self.x))
    bias = None if self.conv.bias is None else self.conv.bias[...]
    before = None if state is None else state.inputs_BJD
    y, after = short_convolution(b * x, self.conv.kernel[...], bias, before, ctx.starts(x_BTD))
    if before is None:
      return Output(self.out(c * y))
    return Output(self.out(c * y), ShortConvolutionState(after.astype(before.dtype)))
