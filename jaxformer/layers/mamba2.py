"""Mamba-2 (Dao and Gu 2024): state-space duality between a short convolution and a gated norm."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.init import FanInUniform, Init, ResidualUniform
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  starts_BT,
)
from jaxformer.layers.mamba import StepBias
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.linear import linear
from jaxformer.ops.ssd import ssd, ssd_step
from jaxformer.sharding import param, shard

COUNTED_CHUNK = 256  # the paper's, by which FLOPs are counted whatever a machine prefers


class LogUniformRate(Init):
  """The logarithm of numbers that are uniform in [low, high]."""

  low: float = 1.0
  high: float = 16.0

  def validate(self):
    self.require(0 < self.low <= self.high, 'low', f'positive and at most high = {self.high}')

  def __call__(self, key, shape, fan_in, position):
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, self.low, self.high))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
  """What a sequence leaves behind: the last inputs of the convolutions of x and of [B, C] (J = taps
  - 1), and the state of the heads, in fp32."""

  x_BJD: Float[Array, 'B J D']
  bc_BJN: Float[Array, 'B J N']
  h_BHPN: Float[Array, 'B H P N']


class Mamba2(Layer):
  """y = W_o norm(ssd(x, dt, B, C) * silu(z)) with z = W_z u, [x, B, C] = silu(conv([W_x, W_bc] u)),
  dt = softplus(W_dt u + b_dt) (Dao and Gu 2024, section 7.1 and figure 6).

  Every head has one rate A = -exp(A_log) and one step size a token; heads of a group share B and C.
  The norm is an RMSNorm over the channels of each group."""

  class Config(LayerConfig):
    """
    Attributes:
      state: N, numbers of state a channel.
      expand: channels inside the layer, as a multiple of the width.
      head_dim: channels of a head.
      groups: of heads that share B and C.
      d_conv: of the convolution, the present input among them.
      bias: offsets on the projections in and out; `conv_bias`: of the convolution.
      norm_eps: of the gated norm.
      init: of the projections, the convolution and its bias; `out_init`: of the projection out;
        `dt_init`: of b_dt; `rate_init`: of A_log.
    """

    state: int = 128
    expand: int = 2
    head_dim: int = 64
    groups: int = 1
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    init: Init = FanInUniform()
    out_init: Init = ResidualUniform()
    dt_init: Init = StepBias()
    rate_init: Init = LogUniformRate()

    def validate(self):
      for field in ('state', 'expand', 'head_dim', 'groups', 'd_conv'):
        self.require(getattr(self, field) > 0, field, 'positive')

    def heads(self, width: int) -> int:
      """H, from the width."""
      if self.expand * width % self.head_dim:
        raise InputError(
          f'Mamba2.head_dim = {self.head_dim} does not divide the {self.expand} x {width} channels '
          'of the layer'
        )
      heads = self.expand * width // self.head_dim
      if heads % self.groups:
        raise InputError(
          f'Mamba2.groups = {self.groups} does not divide the {heads} heads of the layer'
        )
      return heads

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Mamba2:
      return Mamba2(self, width, rngs, position)

    def state_size(self, width: int, max_len: int) -> int:
      return (self.d_conv - 1) * (
        self.expand * width + 2 * self.groups * self.state
      ) + self.expand * width * self.state

    @classmethod
    def examples(cls) -> tuple[Mamba2.Config, ...]:
      return (
        cls(state=4, expand=3, head_dim=16, d_conv=3, norm_eps=1e-3),
        cls(state=8, head_dim=8, groups=4, bias=True, conv_bias=False),
      )

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      """Scores and what is read by them in chunks of `COUNTED_CHUNK`, and the update and reading of
      the state."""
      inner, chunk = self.expand * width, min(COUNTED_CHUNK, length)
      seen = (chunk + 1) / 2 if causal else chunk
      return 2.0 * seen * (self.groups * self.state + inner) + 4.0 * inner * self.state

  def __init__(self, config: Mamba2.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, H, maps = (
      config,
      config.expand * width,
      config.heads(width),
      2 * config.groups * config.state,
    )
    self.config = c

    def weight(init: Init, fan_in: int, shape: tuple[int, ...], *axes: str | None):
      return param(init(rngs.params(), shape, fan_in, position), axes)

    def bias(size: int, axis: str):
      return param(jnp.zeros(size), (axis,), decay=False) if c.bias else None

    def conv_bias(size: int, axis: str):
      return (
        param(c.init(rngs.params(), (size,), c.d_conv, position), (axis,), decay=False)
        if c.conv_bias
        else None
      )

    def vector(value: Array):
      return param(value, ('heads',), decay=False, full_precision=True)

    self.w_z, self.b_z = (
      weight(c.init, width, (width, inner), 'embed', 'inner'),
      bias(inner, 'inner'),
    )
    self.w_x, self.b_x = (
      weight(c.init, width, (width, inner), 'embed', 'inner'),
      bias(inner, 'inner'),
    )
    self.w_bc, self.b_bc = (
      weight(c.init, width, (width, maps), 'embed', 'state'),
      bias(maps, 'state'),
    )
    self.w_dt, self.b_dt_in = weight(c.init, width, (width, H), 'embed', 'heads'), bias(H, 'heads')
    self.conv_x, self.conv_b_x = (
      weight(c.init, c.d_conv, (c.d_conv, inner), 'state', 'inner'),
      conv_bias(inner, 'inner'),
    )
    self.conv_bc, self.conv_b_bc = (
      weight(c.init, c.d_conv, (c.d_conv, maps), 'state', None),
      conv_bias(maps, 'state'),
    )
    self.b_dt = vector(c.dt_init(rngs.params(), (H,), width, position))
    self.A_log = vector(c.rate_init(rngs.params(), (H,), width, position))
    self.D = vector(jnp.ones(H))
    self.scale = param(jnp.ones(inner), ('inner',), decay=False)
    self.w_out, self.b_out = (
      weight(c.out_init, inner, (inner, width), 'inner', 'embed'),
      bias(width, 'norm'),
    )

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> Mamba2State:
    c, dtype, inner, H = (
      self.config,
      self.w_x[...].dtype,
      self.scale.shape[-1],
      self.A_log.shape[-1],
    )
    return Mamba2State(
      jnp.zeros((batch, c.d_conv - 1, inner), dtype),
      jnp.zeros((batch, c.d_conv - 1, 2 * c.groups * c.state), dtype),
      jnp.zeros((batch, H, c.head_dim, c.state), jnp.float32),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Mamba2State | None = None
  ) -> Output:
    z, x, bc, dt = self._in(x_BTD)
    z, x = shard(z, 'batch', 'time', 'inner'), shard(x, 'batch', 'time', 'inner')
    starts = starts_BT(ctx.segments_BT, *x.shape[:2])
    x, bc, after = self._convolve(x, bc, state, starts)
    B, C = self._maps(bc)
    y, h = ssd(
      shard(self._by_head(x), 'batch', 'time', 'heads', None),
      shard(dt, 'batch', 'time', 'heads'),
      -jnp.exp(self.A_log[...]),
      B,
      C,
      self.D[...],
      None if state is None else state.h_BHPN,
      starts,
    )
    return Output(self._out(y, z), None if state is None else Mamba2State(*after, h))

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: Mamba2State) -> Output:
    z, x, bc, dt = self._in(x_BD)
    x, bc, after = self._convolve(x[:, None], bc[:, None], state, jnp.zeros((x.shape[0], 1), bool))
    B, C = self._maps(bc[:, 0])
    y, h = ssd_step(
      self._by_head(x[:, 0]), dt, -jnp.exp(self.A_log[...]), B, C, self.D[...], state.h_BHPN
    )
    return Output(self._out(y, z), Mamba2State(*after, h))

  def _in(self, x: Array) -> tuple[Array, Array, Array, Array]:
    """z, x, [B, C] before the convolution, and dt in fp32."""
    pairs = (
      (self.w_z, self.b_z),
      (self.w_x, self.b_x),
      (self.w_bc, self.b_bc),
      (self.w_dt, self.b_dt_in),
    )
    z, x, bc, dt = (linear(x, w[...], None if b is None else b[...]) for w, b in pairs)
    return (
      z,
      x,
      bc,
      jax.nn.softplus(
        dt.astype(jnp.float32) + self.b_dt[...].reshape((1,) * (dt.ndim - 1) + (-1,))
      ),
    )

  def _convolve(
    self, x_BTD: Array, bc_BTN: Array, state: Mamba2State | None, starts: Array
  ) -> tuple[Array, Array, tuple[Array, Array]]:
    """silu(conv(.)) of both, each channel by itself, and what the next call needs."""
    before = (None, None) if state is None else (state.x_BJD, state.bc_BJN)
    parts = (
      (x_BTD, self.conv_x, self.conv_b_x, before[0]),
      (bc_BTN, self.conv_bc, self.conv_b_bc, before[1]),
    )
    (x, x_after), (bc, bc_after) = (
      short_convolution(a, w[...], None if b is None else b[...], seen, starts)
      for a, w, b, seen in parts
    )
    dtype = self.w_x[...].dtype
    return jax.nn.silu(x), jax.nn.silu(bc), (x_after.astype(dtype), bc_after.astype(dtype))

  def _maps(self, bc: Array) -> tuple[Array, Array]:
    B, C = jnp.split(bc.reshape(*bc.shape[:-1], 2 * self.config.groups, -1), 2, axis=-2)
    return B, C

  def _by_head(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

  def _out(self, y: Array, z: Array) -> Array:
    """The norm of the gated heads, group by group, and the projection out."""
    gated = y.reshape(z.shape).astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    by_group = gated.reshape(*z.shape[:-1], self.config.groups, -1)
    normed = by_group * jax.lax.rsqrt(
      jnp.mean(jnp.square(by_group), axis=-1, keepdims=True) + self.config.norm_eps
    )
    y = normed.reshape(z.shape).astype(z.dtype) * self.scale[...].reshape(
      (1,) * (z.ndim - 1) + (-1,)
    )
    return linear(y, self.w_out[...], None if self.b_out is None else self.b_out[...])
