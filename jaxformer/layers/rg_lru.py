"""The recurrent block of Griffin and RecurrentGemma (De et al. 2024): a real-gated linear recurrent
unit between a short convolution and a gate."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.layers.dense import BlockDense, Dense, by_head
from jaxformer.layers.init import FanInNormal, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mlp import ACTIVATIONS, ActivationName
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.diagonal_scan import gated_scan
from jaxformer.sharding import param, shard

EXPONENT = 8.0  # c of the paper
LARGEST_GRADIENT = 1000.0  # of the square root, as in the authors' code


class DecayRadius(Init):
  """L such that exp(-softplus(L)), the decay a^(1 / c) of an open gate, has a square uniform in
  [low^2, high^2] (De et al. 2024, section 2.4; the authors' code, `rnn_param_init`)."""

  low: float = 0.9
  high: float = 0.999

  def validate(self):
    self.require(0 < self.low <= self.high < 1, 'low', f'positive and at most high = {self.high}')

  def __call__(self, key, shape, fan_in, position):
    square = jax.random.uniform(key, shape, jnp.float32, self.low**2, self.high**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))  # the inverse of softplus


class DepthNormal(Init):
  """N(0, 2 / (depth fan_in)) for a stack of `depth` blocks: the output projections of Griffin (the
  authors' code, `final_w_init_variance_scale`)."""

  def __call__(self, key, shape, fan_in, position):
    return math.sqrt(2 / position.depth / fan_in) * jax.random.normal(key, shape, jnp.float32)


@jax.custom_jvp
def bounded_sqrt(x: Float[Array, '*B']) -> Float[Array, '*B']:
  """The square root, whose derivative is at most `LARGEST_GRADIENT`."""
  return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return bounded_sqrt(x), dx * jax.lax.rsqrt(jnp.maximum(4.0 * x, LARGEST_GRADIENT**-2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RgLruState:
  """The last J = d_conv - 1 inputs of the convolution, the recurrence's state, fp32, and whether
  any token of the document has been read."""

  inputs_BJD: Float[Array, 'B J D']
  h_BD: Float[Array, 'B D']
  begun_B: Bool[Array, ' B']


class RgLru(Layer):
  """y = (h * gelu(u W_y)) W_o with h_t = a h_{t-1} + sqrt(1 - a^2) (i * x_t), x = conv(u W_x),
  log a = -8 softplus(L) r, r, i = sigmoid(x A_r), sigmoid(x A_i) (De et al. 2024, section 2.4).

  The matrices A are block-diagonal, and all projections have biases. At the first token of a
  document the square root is 1. Its derivative is bounded, as in the authors' code. The convolution
  has no activation."""

  class Config(LayerConfig):
    """
    Attributes:
      hidden: channels of the recurrence; None for the width.
      heads: number of blocks of A_r and A_i.
      d_conv: kernel size of the convolution.
      activation: of the gate.
      init: of the projections in; `conv_init`: of the convolution; `gate_init`: of A_r and A_i;
        `decay_init`: of L; `out_init`: of the projection out.
    """

    hidden: int | None = None
    heads: int = 8
    d_conv: int = 4
    activation: ActivationName = 'gelu_tanh'
    init: Init = FanInNormal()
    conv_init: Init = FanInNormal(gain=0.1)
    gate_init: Init = FanInNormal()
    decay_init: Init = DecayRadius()
    out_init: Init = DepthNormal()

    def validate(self):
      self.require_positive('hidden', 'heads', 'd_conv')

    def channels(self, width: int) -> int:
      """Channels of the recurrence."""
      channels = self.hidden or width
      self.quotient(channels, 'heads', 'the number of channels')
      return channels

    def resolved(self, width: int) -> RgLru.Config:
      return self.replace(hidden=self.channels(width))

    @classmethod
    def examples(cls):
      return cls(heads=4), cls(hidden=48, heads=2, d_conv=3, activation='silu')

    def mixing_flops_per_token(self, width, length, causal):
      # the decay, its square root and the products with h and x
      return 8.0 * self.channels(width)

  def __init__(self, config: RgLru.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, N = config, config.channels(width)
    self.config, block = c, N // c.heads
    dense = functools.partial(Dense, rngs=rngs, position=position, bias=True)
    gate = functools.partial(
      BlockDense, c.gate_init, (c.heads, block, block), rngs=rngs, position=position, bias=True
    )
    self.x = dense(c.init, (width, N), ('embed', 'inner'))
    self.y = dense(c.init, (width, N), ('embed', 'inner'))
    self.conv = dense(c.conv_init, (c.d_conv, N), ('state', 'inner'))
    self.input_gate, self.decay_gate = gate(), gate()
    decay = c.decay_init(rngs.params(), (N,), N, position)
    self.decay = param(decay, ('inner',), decay=False, full_precision=True)
    self.out = dense(c.out_init, (N, width), ('inner', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> RgLruState:
    N = self.decay.shape[-1]
    return RgLruState(
      jnp.zeros((batch, self.config.d_conv - 1, N), self.x.dtype),
      jnp.zeros((batch, N), jnp.float32),
      jnp.zeros(batch, bool),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: RgLruState | None = None
  ) -> Output:
    starts = ctx.starts(x_BTD)
    gate, x = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.y, self.x))
    before, h = (None, None) if state is None else (state.inputs_BJD, state.h_BD)
    conv_bias = None if self.conv.bias is None else self.conv.bias[...]
    x, after = short_convolution(x, self.conv.kernel[...], conv_bias, before, starts)
    new = jnp.ones(len(x_BTD), bool) if state is None else ~state.begun_B
    v, log_a = self._gated(x, starts.at[:, 0].set(starts[:, 0] | new))
    h, last = gated_scan(v, log_a, h, starts)
    y = self.out(h.astype(x_BTD.dtype) * ACTIVATIONS[self.config.activation](gate))
    if state is not None:
      state = RgLruState(after.astype(state.inputs_BJD.dtype), last, jnp.ones_like(new))
    return Output(y, state)

  def _gated(self, x_BTN: Array, first_BT: Bool[Array, 'B T']) -> tuple[Array, Array]:
    """The inputs and the logarithms of the decays of the recurrence, in fp32; `first_BT` is True at
    the first token of a document."""
    by_block = by_head(x_BTN, x_BTN.shape[-1] // self.config.heads)

    def gate(dense: BlockDense) -> Array:
      preactivation = dense(by_block).astype(jnp.float32).reshape(x_BTN.shape)
      return jax.nn.sigmoid(shard(preactivation, 'batch', 'time', 'inner'))

    rate = EXPONENT * jax.nn.softplus(self.decay[...])[None, None]
    log_a = -rate * gate(self.decay_gate)
    scale = jnp.where(first_BT[..., None], 1.0, bounded_sqrt(-jnp.expm1(2.0 * log_a)))
    return scale * gate(self.input_gate) * x_BTN.astype(jnp.float32), log_a
