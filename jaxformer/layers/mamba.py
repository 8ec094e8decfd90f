"""Mamba (Gu and Dao 2023): a selective scan between a short convolution and a gate."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

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
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.linear import linear
from jaxformer.ops.selective_scan import selective_scan, selective_scan_step
from jaxformer.sharding import param, shard


class StepBias(Init):
  """Offsets b such that softplus(b), the step size for an input of 0, is log-uniform in [low, high]
  and at least `floor` (Mamba, section 3.6)."""

  low: float = 1e-3
  high: float = 1e-1
  floor: float = 1e-4

  def validate(self):
    self.require(0 < self.low <= self.high, 'low', f'positive and at most high = {self.high}')
    self.require(self.floor > 0, 'floor', 'positive')

  def __call__(self, key, shape, fan_in, position):
    log = jax.random.uniform(key, shape, jnp.float32, math.log(self.low), math.log(self.high))
    step = jnp.maximum(jnp.exp(log), self.floor)
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
  """What a sequence leaves behind: the last inputs of the convolution (J = taps - 1), and the state
  of the scan, in fp32."""

  conv_BJD: Float[Array, 'B J D']
  h_BDN: Float[Array, 'B D N']


class Mamba(Layer):
  """y = W_o (scan(x) * silu(z)) with x = silu(conv(W_x u)), z = W_z u (Gu and Dao 2023, figure 3
  and algorithm 2).

  The scan's step sizes dt = softplus(W_dt dt' + b_dt) and its maps B, C are functions of x: [dt',
  B, C] = W_s x. Its rates are A = -exp(A_log), one for each of N states of each channel."""

  class Config(LayerConfig):
    """
    Attributes:
      state: N, numbers of state a channel.
      expand: channels inside the layer, as a multiple of the width.
      d_conv: of the convolution, the present input among them.
      dt_rank: size of dt'; None for width / 16, rounded up.
      bias: offsets on the projections in and out; `conv_bias`: of the convolution.
      inner_norm: norm over dt', B and C each (Jamba); None for none.
      init: of the projections, the convolution and its bias; `out_init`: of the projection out;
        `dt_init`: of b_dt.
    """

    state: int = 16
    expand: int = 2
    d_conv: int = 4
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    inner_norm: NormConfig | None = None
    init: Init = FanInUniform()
    out_init: Init = ResidualUniform()
    dt_init: Init = StepBias()

    def validate(self):
      for field in ('state', 'expand', 'd_conv'):
        self.require(getattr(self, field) > 0, field, 'positive')
      self.require(self.dt_rank is None or self.dt_rank > 0, 'dt_rank', 'positive')

    def rank(self, width: int) -> int:
      """The size of dt', from the width where it is not given."""
      return self.dt_rank or -(-width // 16)

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Mamba:
      return Mamba(self, width, rngs, position)

    def state_size(self, width: int, max_len: int) -> int:
      return self.expand * width * (self.d_conv - 1 + self.state)

    @classmethod
    def examples(cls) -> tuple[Mamba.Config, ...]:
      return (
        cls(state=4, expand=3, d_conv=3, dt_rank=5),
        cls(state=3, bias=True, conv_bias=False, inner_norm=RMSNorm.Config()),
      )

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      # 3 for the decay, 4 for the update, 2 for the output
      return 9.0 * self.expand * width * self.state

  def __init__(self, config: Mamba.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, R = config, config.expand * width, config.rank(width)
    self.config, self.rank = c, R

    def weight(init: Init, fan_in: int, shape: tuple[int, ...], *axes: str):
      return param(init(rngs.params(), shape, fan_in, position), axes)

    def bias(size: int, axis: str):
      return param(jnp.zeros(size), (axis,), decay=False) if c.bias else None

    self.w_x, self.b_x = (
      weight(c.init, width, (width, inner), 'embed', 'inner'),
      bias(inner, 'inner'),
    )
    self.w_z, self.b_z = (
      weight(c.init, width, (width, inner), 'embed', 'inner'),
      bias(inner, 'inner'),
    )
    self.w_conv = weight(c.init, c.d_conv, (c.d_conv, inner), 'state', 'inner')
    self.b_conv = (
      param(c.init(rngs.params(), (inner,), c.d_conv, position), ('inner',), decay=False)
      if c.conv_bias
      else None
    )
    self.w_s = weight(c.init, inner, (inner, R + 2 * c.state), 'inner', 'state')
    self.w_dt = weight(c.init, R, (R, inner), 'state', 'inner')
    self.b_dt = param(
      c.dt_init(rngs.params(), (inner,), R, position), ('inner',), decay=False, full_precision=True
    )
    rates = jnp.broadcast_to(jnp.arange(1.0, c.state + 1)[None], (inner, c.state))  # S4D-Real
    self.A_log = param(
      jnp.log(rates), ('inner', 'state'), decay=False, full_precision=True, matmul=False
    )
    self.D = param(jnp.ones(inner), ('inner',), decay=False, full_precision=True)
    self.w_out, self.b_out = (
      weight(c.out_init, inner, (inner, width), 'inner', 'embed'),
      bias(width, 'norm'),
    )
    self.norms = (
      None
      if c.inner_norm is None
      else nnx.List([c.inner_norm.build(n) for n in (R, c.state, c.state)])
    )

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> MambaState:
    inner, N = self.A_log.shape[-2:]
    return MambaState(
      jnp.zeros((batch, self.config.d_conv - 1, inner), self.w_x[...].dtype),
      jnp.zeros((batch, inner, N), jnp.float32),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MambaState | None = None
  ) -> Output:
    starts = starts_BT(ctx.segments_BT, *x_BTD.shape[:2])
    x, z = (shard(a, 'batch', 'time', 'inner') for a in self._in(x_BTD))
    bias = None if self.b_conv is None else self.b_conv[...]
    x, after = short_convolution(
      x, self.w_conv[...], bias, None if state is None else state.conv_BJD, starts
    )
    x = jax.nn.silu(x)
    dt, B, C = self._selection(x)
    y, h = selective_scan(
      x,
      shard(dt, 'batch', 'time', 'inner'),
      -jnp.exp(self.A_log[...]),
      B,
      C,
      self.D[...],
      None if state is None else state.h_BDN,
      starts,
    )
    return Output(
      self._out(y * jax.nn.silu(z)),
      None if state is None else MambaState(after.astype(state.conv_BJD.dtype), h),
    )

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: MambaState) -> Output:
    x, z = self._in(x_BD)
    bias = None if self.b_conv is None else self.b_conv[...]
    x, after = short_convolution(
      x[:, None], self.w_conv[...], bias, state.conv_BJD, jnp.zeros((x.shape[0], 1), bool)
    )
    x = jax.nn.silu(x[:, 0])
    dt, B, C = self._selection(x)
    y, h = selective_scan_step(x, dt, -jnp.exp(self.A_log[...]), B, C, self.D[...], state.h_BDN)
    return Output(self._out(y * jax.nn.silu(z)), MambaState(after.astype(state.conv_BJD.dtype), h))

  def _in(self, x: Array) -> tuple[Array, Array]:
    pairs = (self.w_x, self.b_x), (self.w_z, self.b_z)
    x, z = (linear(x, w[...], None if b is None else b[...]) for w, b in pairs)
    return x, z

  def _selection(self, x: Array) -> tuple[Array, Array, Array]:
    """dt in fp32, B and C."""
    R, N = self.rank, self.config.state
    parts = jnp.split(linear(x, self.w_s[...]), (R, R + N), axis=-1)
    if self.norms is not None:
      parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
    dt, B, C = parts
    dt = linear(dt, self.w_dt[...]).astype(jnp.float32) + self.b_dt[...].reshape(
      (1,) * (x.ndim - 1) + (-1,)
    )
    return jax.nn.softplus(dt), B, C

  def _out(self, y: Array) -> Array:
    return linear(y, self.w_out[...], None if self.b_out is None else self.b_out[...])
