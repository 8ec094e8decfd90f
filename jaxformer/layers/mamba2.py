"""Mamba-2 (Dao and Gu 2024): state-space duality between a short convolution and a gated norm."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
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


class ProjectionScales(Config):
  """Factors on what a `Mamba2` projects its input to, biases included: the muP multipliers of
  Falcon-H1 (Zuo et al. 2025), which have another effect on training than weights that are as much
  larger."""

  z: float = 1.0
  x: float = 1.0
  B: float = 1.0
  C: float = 1.0
  dt: float = 1.0

  def validate(self):
    self.require_positive('z', 'x', 'B', 'C', 'dt')


class Mamba2(Layer):
  """y = norm(ssd(x, dt, B, C) * silu(z)) W_o with z = u W_z, [x, B, C] = silu(conv(u [W_x, W_bc])),
  dt = softplus(u W_dt + b_dt) (Dao and Gu 2024, section 7.1 and figure 6).

  Every head has one rate A = -exp(A_log) and one step size per token; heads of a group share B and
  C. The norm is an RMSNorm over the channels of each group; with `norm_before_gate`, y =
  (norm(ssd(x, dt, B, C)) * silu(z)) W_o."""

  class Config(LayerConfig):
    """
    Attributes:
      d_state: state size N per channel.
      expand: channels inside the layer, as a multiple of the width, where `heads` is None.
      heads: number of heads; None for expand x width / head_dim.
      head_dim: channels of a head.
      groups: number of groups of heads; each shares B and C.
      d_conv: kernel size of the convolution.
      bias: whether the projections in and out have biases; `conv_bias`: whether the convolution
        has one.
      norm_eps: of the gated norm; None for no norm.
      norm_groups: groups of channels that the norm is over; None for `groups`.
      norm_before_gate: whether the norm precedes the gate.
      dt_min, dt_max: limits of the step sizes, to which they are clipped; None for no upper limit.
      scales: factors on the projections; None for none.
      init: of the projections, the convolution and its bias; `out_init`: of the projection out;
        `dt_init`: of b_dt; `rate_init`: of A_log.
    """

    d_state: int = 128
    expand: int = 2
    heads: int | None = None
    head_dim: int = 64
    groups: int = 1
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float | None = 1e-5
    norm_groups: int | None = None
    norm_before_gate: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    scales: ProjectionScales | None = None
    init: Init = FanInUniform()
    out_init: Init = FanInUniform(residual=True)
    dt_init: Init = StepBias()
    rate_init: Init = LogUniformRate()

    def validate(self):
      self.require_positive('d_state', 'expand', 'heads', 'head_dim', 'groups', 'd_conv')
      self.require_positive('norm_eps', 'norm_groups')
      self.require_not_negative('dt_min')
      above = self.dt_max is None or self.dt_max > self.dt_min
      self.require(above, 'dt_max', f'above dt_min = {self.dt_min}')
      derived = self.heads is None or self.expand == type(self).expand
      self.require(derived, 'expand', 'left out: the number of heads is given')
      if self.norm_eps is None:
        self.require(self.norm_groups is None, 'norm_groups', 'none where there is no norm')
        self.require(not self.norm_before_gate, 'norm_before_gate', 'false where there is no norm')

    def head_count(self, width: int) -> int:
      """H, derived from the width if `heads` is None."""
      if self.heads is None:
        heads = self.quotient(self.expand * width, 'head_dim', 'expand x width')
      else:
        heads = self.heads
      self.quotient(heads, 'groups', 'the number of heads')
      if self.norm_groups is not None:
        self.quotient(heads * self.head_dim, 'norm_groups', 'the number of channels')
      return heads

    def channels(self, width: int) -> int:
      """Channels inside the layer."""
      return self.head_count(width) * self.head_dim

    def resolved(self, width: int) -> Mamba2.Config:
      normed = None if self.norm_eps is None else self.norm_groups or self.groups
      return self.replace(
        heads=self.head_count(width), expand=type(self).expand, norm_groups=normed
      )

    @classmethod
    def examples(cls):
      return (
        cls(d_state=4, expand=3, head_dim=16, d_conv=3, norm_eps=1e-3),
        cls(d_state=8, head_dim=8, groups=4, bias=True, conv_bias=False, norm_groups=2),
        cls(
          d_state=4,
          heads=6,
          head_dim=8,
          groups=2,
          norm_before_gate=True,
          dt_min=0.01,
          dt_max=0.05,
          scales=ProjectionScales(z=0.5, x=2.0, B=0.7, C=1.5, dt=0.8),
        ),
        cls(d_state=4, heads=2, head_dim=8, norm_eps=None),
      )

    def mixing_flops_per_token(self, width, length, causal):
      """Scores and their products in chunks of `COUNTED_CHUNK`, and updates and reads of the
      state."""
      inner, chunk = self.channels(width), min(COUNTED_CHUNK, length)
      seen = (chunk + 1) / 2 if causal else chunk
      return 2.0 * seen * (self.groups * self.d_state + inner) + 4.0 * inner * self.d_state

  def __init__(self, config: Mamba2.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, H = config, config.channels(width), config.head_count(width)
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
    self.scale = None if c.norm_eps is None else param(jnp.ones(inner), ('inner',), decay=False)
    self.out = dense(c.out_init, (inner, width), ('inner', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> MambaState:
    c, dtype = self.config, self.x.dtype
    H = self.A_log.shape[-1]
    inner = H * c.head_dim
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
    z, x, bc, dt = self._projected(x_BTD)
    before, h = ((None, None), None) if state is None else (state.inputs_BJD, state.h)
    x, x_after = convolve(self.conv_x, x, before[0], starts)
    bc, bc_after = convolve(self.conv_bc, bc, before[1], starts)
    B, C = jnp.split(bc.reshape(*shape, 2 * c.groups, -1), 2, axis=2)
    y, h = ssd(
      by_head(x, c.head_dim),
      shard(dt, 'batch', 'time', 'heads'),
      -jnp.exp(self.A_log[...]),
      B,
      C,
      self.D[...],
      h,
      starts,
    )
    return Output(self._out(y, z), None if state is None else MambaState((x_after, bc_after), h))

  def _projected(self, x_BTD: Array) -> tuple[Array, Array, Array, Array]:
    """z, x, [B, C], and the step sizes in fp32."""
    c, s = self.config, self.config.scales
    z, x = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.z, self.x))
    bc, dt = self.bc(x_BTD), self.dt(x_BTD).astype(jnp.float32)
    if s is not None:
      by_map = jnp.repeat(jnp.asarray([s.B, s.C], bc.dtype), c.groups * c.d_state)
      z, x, bc, dt = s.z * z, s.x * x, by_map[None, None] * bc, s.dt * dt
    dt = jax.nn.softplus(dt + self.dt_bias[...][None, None])
    limited = c.dt_min > 0.0 or c.dt_max is not None
    return z, x, bc, jnp.clip(dt, c.dt_min, c.dt_max) if limited else dt

  def _out(self, y_BTHP: Array, z_BTD: Array) -> Array:
    """The gate and the norm, group by group, and the projection out."""
    c, gate = self.config, jax.nn.silu(z_BTD.astype(jnp.float32))
    y = y_BTHP.reshape(z_BTD.shape).astype(jnp.float32)
    y = y if c.norm_before_gate else y * gate
    if self.scale is None or c.norm_eps is None:
      return self.out(y.astype(z_BTD.dtype))
    by_group = y.reshape(*z_BTD.shape[:2], c.norm_groups or c.groups, -1)
    y = normalized(by_group, c.norm_eps, centered=False).reshape(z_BTD.shape)
    y = y * gate if c.norm_before_gate else y
    return self.out(y.astype(z_BTD.dtype) * self.scale[...][None, None])
