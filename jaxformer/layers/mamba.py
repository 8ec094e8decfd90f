"""Mamba (Gu and Dao 2023): a selective scan between a short convolution and a gate."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.selective_scan import selective_scan
from jaxformer.sharding import param, shard


class StepBias(Init):
  """Biases b such that softplus(b), the step size for an input of 0, is log-uniform in [low, high]
  and at least `floor` (Gu and Dao 2023, section 3.6)."""

  low: float = 1e-3
  high: float = 1e-1
  floor: float = 1e-4

  def validate(self):
    self.require(0 < self.low <= self.high, 'low', f'positive and at most high = {self.high}')
    self.require_positive('floor')

  def __call__(self, key, shape, fan_in, position):
    log = jax.random.uniform(key, shape, jnp.float32, math.log(self.low), math.log(self.high))
    step = jnp.maximum(jnp.exp(log), self.floor)
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus


def convolve(
  conv: Dense,
  x_BTD: Float[Array, 'B T D'],
  before_BJD: Float[Array, 'B J D'] | None,
  starts: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B J D']]:
  """Return silu of the causal depthwise convolution (`ops.convolution`), and its
  last J = d_conv - 1 inputs; `before_BJD` are those before. The kernel of `conv` is `[d_conv,
  channels]`; its last row multiplies the current input."""
  bias = None if conv.bias is None else conv.bias[...]
  y, after = short_convolution(x_BTD, conv.kernel[...], bias, before_BJD, starts)
  return jax.nn.silu(y), after.astype(conv.dtype if before_BJD is None else before_BJD.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
  """The last J = d_conv - 1 inputs of each convolution (in Mamba that of x, in Mamba-2 those of x
  and of [B, C]), and the state of the recurrence, fp32."""

  inputs_BJD: tuple[Float[Array, 'B J D'], ...]
  h: Float[Array, 'B D N'] | Float[Array, 'B H P N']


class Mamba(Layer):
  """y = (scan(x) * silu(z)) W_o with x = silu(conv(u W_x)), z = u W_z (Gu and Dao 2023, figure 3
  and algorithm 2).

  The scan's step sizes dt = softplus(dt' W_dt + b_dt) and its maps B, C are functions of x: [dt',
  B, C] = x W_s. Its rates are A = -exp(A_log), one for each of the N states of each channel."""

  class Config(LayerConfig):
    """
    Attributes:
      d_state: state size N per channel.
      expand: channels inside the layer, as a multiple of the width.
      d_conv: kernel size of the convolution.
      dt_rank: size of dt'; None for width / 16, rounded up.
      bias: whether the projections in and out have biases; `conv_bias`: whether the convolution
        has one.
      inner_norm: norm over each of dt', B and C (Jamba); None for none.
      init: of the projections, the convolution and its bias; `out_init`: of the projection out;
        `dt_init`: of b_dt.
    """

    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    inner_norm: NormConfig | None = None
    init: Init = FanInUniform()
    out_init: Init = FanInUniform(residual=True)
    dt_init: Init = StepBias()

    def validate(self):
      self.require_positive('d_state', 'expand', 'd_conv', 'dt_rank')

    def rank(self, width: int) -> int:
      """The size of dt', derived from the width if `dt_rank` is None."""
      return self.dt_rank or -(-width // 16)

    def resolved(self, width: int) -> Mamba.Config:
      return self.replace(dt_rank=self.rank(width))

    @classmethod
    def examples(cls):
      return (
        cls(d_state=4, expand=3, d_conv=3, dt_rank=5),
        cls(d_state=3, bias=True, conv_bias=False, inner_norm=RMSNorm()),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # 3 for the decay, 4 for the update, 2 for the output
      return 9.0 * self.expand * width * self.d_state

  def __init__(self, config: Mamba.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, R = config, config.expand * width, config.rank(width)
    self.config, self.rank = c, R
    dense = functools.partial(Dense, rngs=rngs, position=position)
    conv_bias = c.init if c.conv_bias else False
    self.x = dense(c.init, (width, inner), ('embed', 'inner'), bias=c.bias)
    self.z = dense(c.init, (width, inner), ('embed', 'inner'), bias=c.bias)
    self.conv = dense(c.init, (c.d_conv, inner), ('state', 'inner'), bias=conv_bias)
    self.selection = dense(c.init, (inner, R + 2 * c.d_state), ('inner', 'state'))
    self.dt = dense(c.init, (R, inner), ('state', 'inner'))
    self.dt_bias = param(
      c.dt_init(rngs.params(), (inner,), R, position), ('inner',), decay=False, full_precision=True
    )
    rates = jnp.broadcast_to(jnp.arange(1.0, c.d_state + 1)[None], (inner, c.d_state))  # S4D-Real
    self.A_log = param(
      jnp.log(rates), ('inner', 'state'), decay=False, full_precision=True, matmul=False
    )
    self.D = param(jnp.ones(inner), ('inner',), decay=False, full_precision=True)
    self.out = dense(c.out_init, (inner, width), ('inner', 'embed'), bias=c.bias)
    self.norms = (
      None
      if c.inner_norm is None
      else nnx.List([c.inner_norm.build(n) for n in (R, c.d_state, c.d_state)])
    )

  def init_state(self, batch, max_len, memory=None) -> MambaState:
    inner, N = self.A_log.shape[-2:]
    return MambaState(
      (jnp.zeros((batch, self.config.d_conv - 1, inner), self.x.dtype),),
      jnp.zeros((batch, inner, N), jnp.float32),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MambaState | None = None
  ) -> Output:
    (before,), h = ((None,), None) if state is None else (state.inputs_BJD, state.h)
    starts = ctx.starts(x_BTD)
    x, z = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.x, self.z))
    x, after = convolve(self.conv, x, before, starts)
    dt, B, C = self._selection(x)
    dt = shard(dt, 'batch', 'time', 'inner')
    y, h = selective_scan(x, dt, -jnp.exp(self.A_log[...]), B, C, self.D[...], h, starts)
    y = self.out(y * jax.nn.silu(z))
    return Output(y, None if state is None else MambaState((after,), h))

  def _selection(self, x_BTD: Array) -> tuple[Array, Array, Array]:
    """dt in fp32, B and C."""
    R, N = self.rank, self.config.d_state
    parts = jnp.split(self.selection(x_BTD), (R, R + N), axis=-1)
    if self.norms is not None:
      parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
    dt, B, C = parts
    dt = self.dt(dt).astype(jnp.float32) + self.dt_bias[...][None, None]
    return jax.nn.softplus(dt), B, C
