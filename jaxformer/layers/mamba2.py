"""Mamba-2 (Dao and Gu 2024): state-space duality between a short convolution and a gated norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import FanInUniform, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mamba import MambaState, StepBias, convolve
from jaxformer.layers.norm import normalized
from jaxformer.ops.ssd import ssd
from jaxformer.sharding import param, shard

COUNTED_CHUNK = 256  # the paper's; FLOPs are counted for it on every machine


class LogUniformRate(Init):
  """The logarithm of values uniform in [low, high]."""

  low: float = 1.0
  high: float = 16.0

  def validate(self):
    self.require(0 < self.low <= self.high, 'low', f'positive and at most high = {self.high}')

  def __call__(self, key, shape, fan_in, position):
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, self.low, self.high))


class Mamba2(Layer):
  """y = norm(ssd(x, dt, B, C) * silu(z)) W_o with z = u W_z, [x, B, C] = silu(conv(u [W_x, W_bc])),
  dt = softplus(u W_dt + b_dt) (Dao and Gu 2024, section 7.1 and figure 6).

  Every head has one rate A = -exp(A_log) and one step size per token; heads of a group share B and
  C. The norm is an RMSNorm over the channels of each group."""

  class Config(LayerConfig):
    """
    Attributes:
      d_state: state size N per channel.
      expand: channels inside the layer, as a multiple of the width.
      head_dim: channels of a head.
      groups: number of groups of heads; each shares B and C.
      d_conv: kernel size of the convolution.
      bias: whether the projections in and out have biases; `conv_bias`: whether the convolution
        has one.
      norm_eps: of the gated norm.
      init: of the projections, the convolution and its bias; `out_init`: of the projection out;
        `dt_init`: of b_dt; `rate_init`: of A_log.
    """

    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    groups: int = 1
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    init: Init = FanInUniform()
    out_init: Init = FanInUniform(residual=True)
    dt_init: Init = StepBias()
    rate_init: Init = LogUniformRate()

    def validate(self):
      self.require_positive('d_state', 'expand', 'head_dim', 'groups', 'd_conv')

    def heads(self, width: int) -> int:
      """H, from the width."""
      heads = self.quotient(self.expand * width, 'head_dim', 'expand x width')
      self.quotient(heads, 'groups', 'the number of heads')
      return heads

    @classmethod
    def examples(cls):
      return (
        cls(d_state=4, expand=3, head_dim=16, d_conv=3, norm_eps=1e-3),
        cls(d_state=8, head_dim=8, groups=4, bias=True, conv_bias=False),
      )

    def mixing_flops_per_token(self, width, length, causal):
      """Scores and their products in chunks of `COUNTED_CHUNK`, and updates and reads of the
      state."""
      inner, chunk = self.expand * width, min(COUNTED_CHUNK, length)
      seen = (chunk + 1) / 2 if causal else chunk
      return 2.0 * seen * (self.groups * self.d_state + inner) + 4.0 * inner * self.d_state

  def __init__(self, config: Mamba2.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, H = config, config.expand * width, config.heads(width)
    self.config, maps = c, 2 * c.groups * c.d_state

    def vector(value: Array):
      return param(value, ('heads',), decay=False, full_precision=True)

    make = functools.partial(Dense, rngs=rngs, position=position)
    dense = functools.partial(make, bias=c.bias)
    conv = functools.partial(make, bias=c.init if c.conv_bias else False)
    self.z = dense(c.init, (width, inner), ('embed', 'inner'))
    self.x = dense(c.init, (width, inner), ('embed', 'inner'))
    self.bc = dense(c.init, (width, maps), ('embed', 'state'))
    self.dt = dense(c.init, (width, H), ('embed', 'heads'))
    self.conv_x = conv(c.init, (c.d_conv, inner), ('state', 'inner'))
    self.conv_bc = conv(c.init, (c.d_conv, maps), ('state', 'state'))
    self.dt_bias = vector(c.dt_init(rngs.params(), (H,), width, position))
    self.A_log = vector(c.rate_init(rngs.params(), (H,), width, position))
    self.D = vector(jnp.ones(H))
    self.scale = param(jnp.ones(inner), ('inner',), decay=False)
    self.out = dense(c.out_init, (inner, width), ('inner', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> MambaState:
    c, dtype = self.config, self.x.dtype
    inner, H = self.scale.shape[-1], self.A_log.shape[-1]
    return MambaState(
      tuple(
        jnp.zeros((batch, c.d_conv - 1, channels), dtype)
        for channels in (inner, 2 * c.groups * c.d_state)
      ),
      jnp.zeros((batch, H, c.head_dim, c.d_state), jnp.float32),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MambaState | None = None
  ) -> Output:
    c, shape, starts = self.config, x_BTD.shape[:2], ctx.starts(x_BTD)
    z, x = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.z, self.x))
    dt = self.dt(x_BTD).astype(jnp.float32) + self.dt_bias[...][None, None]
    before, h = ((None, None), None) if state is None else (state.inputs_BJD, state.h)
    x, x_after = convolve(self.conv_x, x, before[0], starts)
    bc, bc_after = convolve(self.conv_bc, self.bc(x_BTD), before[1], starts)
    B, C = jnp.split(bc.reshape(*shape, 2 * c.groups, -1), 2, axis=2)
    y, h = ssd(
      by_head(x, c.head_dim),
      shard(jax.nn.softplus(dt), 'batch', 'time', 'heads'),
      -jnp.exp(self.A_log[...]),
      B,
      C,
      self.D[...],
      h,
      starts,
    )
    return Output(self._out(y, z), None if state is None else MambaState((x_after, bc_after), h))

  def _out(self, y_BTHP: Array, z_BTD: Array) -> Array:
    """The norm of the gated heads, group by group, and the projection out."""
    gated = y_BTHP.reshape(z_BTD.shape).astype(jnp.float32) * jax.nn.silu(z_BTD.astype(jnp.float32))
    by_group = gated.reshape(*z_BTD.shape[:2], self.config.groups, -1)
    y = normalized(by_group, self.config.norm_eps, centered=False).reshape(z_BTD.shape)
    return self.out(y.astype(z_BTD.dtype) * self.scale[...][None, None])
