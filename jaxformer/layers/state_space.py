"""Parts that the linear time-invariant state-space layers share: one system per channel, in one or
both directions, a skip connection, and the projection out."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output, dropout
from jaxformer.ops.ssm import System, ssm
from jaxformer.ops.token_shift import token_ahead
from jaxformer.sharding import param, shard


def rates(lr_scale: float | None, learning_rate: float | None) -> dict[str, Any]:
  """A learning rate, relative to that of the run or absolute, as metadata of `param`."""
  return {'lr_scale': 1.0 if lr_scale is None else lr_scale, 'learning_rate': learning_rate}


class SystemConfig(LayerConfig, abstract=True):
  """Base of the configs of layers made of linear time-invariant systems.

  Attributes:
    d_state: state size N of a system, in real numbers.
    dt_min, dt_max: each system's step size is drawn log-uniformly between them.
    dt_transform: step sizes are `exp` or `softplus` of their parameters.
    lr_scale: factor on the learning rate of the step size and of the matrices that act on the
      state; 0: they are not trained; None where they have a `learning_rate`.
    learning_rate: their learning rate at the peak of the schedule, whatever that of the run.
    dt_lr_scale: factor on the learning rate of the run for the step sizes; None for the same as of
      the matrices.
  """

  d_state: int = 64
  dt_min: float = 1e-3
  dt_max: float = 1e-1
  dt_transform: Literal['exp', 'softplus'] = 'exp'
  lr_scale: float | None = 0.1
  learning_rate: float | None = None
  dt_lr_scale: float | None = None

  paired: ClassVar[bool] = True  # whether the state is complex, in conjugate pairs

  def validate(self):
    self.require_positive('d_state', 'dt_min')
    self.require(
      not (self.paired and self.d_state % 2), 'd_state', 'positive and even: conjugate pairs'
    )
    self.require(self.dt_max >= self.dt_min, 'dt_max', f'at least dt_min = {self.dt_min}')
    self.require_not_negative('lr_scale', 'dt_lr_scale')
    self.require_positive('learning_rate')
    self.require(
      (self.lr_scale is None) == (self.learning_rate is not None),
      'lr_scale',
      'none with a learning_rate, else a number',
    )

  @property
  def rates(self) -> dict[str, Any]:
    """The learning rate of the matrices that act on the state, as metadata of `param`."""
    return rates(self.lr_scale, self.learning_rate)

  @property
  def dt_rates(self) -> dict[str, Any]:
    """The learning rate of the step sizes, as metadata of `param`."""
    return self.rates if self.dt_lr_scale is None else rates(self.dt_lr_scale, None)


class StateSpaceConfig(SystemConfig, abstract=True):
  """Base of the state-space layers' configs.

  Attributes:
    dropout: rate at which units are dropped before the projection out.
    tied_dropout: rate at which whole channels are, the same at all positions.
    causal: False adds a system that reads the sequence from its end, which excludes decoding.
  """

  dropout: float = 0.0
  tied_dropout: float = 0.0
  causal: bool = True

  def validate(self):
    super().validate()
    self.require_rate('dropout', 'tied_dropout')

  @property
  def decodes(self) -> bool:
    return self.causal

  def for_length(self, length: int) -> Self:
    """Return the config made for sequences of `length`, for layers that depend on it."""
    return self

  @property
  def directions(self) -> int:
    return 1 if self.causal else 2

  def mixing_flops_per_token(self, width, length, causal):
    # the recurrence: a complex product, an input and an output
    return self.directions * 7.0 * width * self.d_state


class ChannelSystemConfig(StateSpaceConfig, abstract=True):
  """Base of the configs with one complex system per channel.

  Attributes:
    n_ssm: number of independent A and B, each of which width / n_ssm channels share; None for one
      per channel. C and the step sizes are always per channel.
  """

  n_ssm: int | None = None

  def validate(self):
    super().validate()
    self.require_positive('n_ssm')

  def independent(self, width: int) -> int:
    """Number of independent systems."""
    if self.n_ssm is None:
      return width
    self.quotient(width, 'n_ssm')
    return self.n_ssm

  @property
  def systems_axis(self) -> str | None:
    """Logical axis of the independent systems."""
    return 'inner' if self.n_ssm is None else None


def per_channel(z_SN: Array, channels: int) -> Array:
  """The system of each channel, of S independent ones: channel h has that of h modulo S."""
  return jnp.tile(z_SN, (channels // len(z_SN), 1))


class StateSpace(Layer):
  """Base of the layers y = D u + system(u) for each channel, then dropout(gelu(y)) W + b over all
  outputs of all channels. A `gated` layer projects to twice the width and returns a * sigmoid(b) of
  the halves (GLU, Dauphin et al. 2017). `system` is what subclasses define.

  In both directions y_t also has sum_{s > t} k'_{s-t-1} u_s, with the kernel k' of a second system.
  """

  def __init__(
    self,
    config: StateSpaceConfig,
    width: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
    *,
    outputs: int = 1,
    gated: bool = True,
  ):
    c = config
    self.config, self.width, self.gated = c, width, gated
    self.log_dt = log_steps(width, c, rngs)
    self.skip = recurrent(jax.random.normal(rngs.params(), (outputs, width)), (None, 'inner'))
    self.out = Dense(
      FanInUniform(),
      (outputs * width, 2 * width if gated else width),
      ('inner', 'embed'),
      bias=FanInUniform(),
      rngs=rngs,
      position=position,
    )

  def system(self, direction: int = 0) -> System:
    """Return the discrete system of the current parameters; direction 1 reads from the end."""
    raise NotImplementedError

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B H N']:
    return jnp.zeros((batch, self.width, self.config.d_state), jnp.float32)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    starts = None if ctx.segments_BT is None else ctx.starts(x_BTD)
    u_BTH = shard(x_BTD.astype(jnp.float32), 'batch', 'time', 'inner')
    y_BTMH, last = ssm(u_BTH, self.system(), state, starts)
    if not self.config.causal:
      y_BTMH = y_BTMH + _from_the_end(u_BTH, self.system(1), starts)
    y_BTMH = y_BTMH + self.skip[...][None, None] * u_BTH[:, :, None]
    return Output(self._out(y_BTMH.astype(x_BTD.dtype), ctx), last)

  def _out(self, y_BTMH: Float[Array, 'B T M H'], ctx: Context) -> Float[Array, 'B T D']:
    y = shard(y_BTMH.reshape(*y_BTMH.shape[:2], -1), 'batch', 'time', 'inner')
    y = dropped(jax.nn.gelu(y, approximate=False), self.config, ctx)
    z = self.out(y)
    if not self.gated:
      return z
    a, b = jnp.split(z, 2, axis=-1)
    return a * jax.nn.sigmoid(b)


def dropped(y: Array, config: StateSpaceConfig, ctx: Context) -> Array:
  """Apply both kinds of dropout, by other keys than the branch's around the layer."""
  y = dropout(y, config.dropout, ctx.fold(0))
  return dropout(y, config.tied_dropout, ctx.fold(1), tied=True)


def _from_the_end(u_BTH: Array, system: System, starts: Array | None) -> Array:
  """Return sum_{s > t} k_{s-t-1} u_s over the positions of a document."""
  after = document_ends(starts)
  y, _ = ssm(u_BTH, system, None, after, reverse=True)
  y = token_ahead(y)
  return y if after is None else jnp.where(after[:, :, None, None], 0.0, y)


def document_ends(starts_BT: Array | None) -> Bool[Array, 'B T'] | None:
  """Return True where another document starts at the next position; None for None."""
  return None if starts_BT is None else jnp.pad(starts_BT[:, 1:], ((0, 0), (0, 1)))


def log_steps(size: int, config: SystemConfig, rngs: nnx.Rngs) -> nnx.Param:
  """The parameters of step sizes: their logarithms, or the inverse of softplus."""
  low, high = math.log(config.dt_min), math.log(config.dt_max)
  drawn = jax.random.uniform(rngs.params(), (size,), jnp.float32, low, high)
  if config.dt_transform == 'softplus':
    drawn = jnp.log(jnp.expm1(jnp.exp(drawn)))
  return recurrent(drawn, ('inner',), **config.dt_rates)


def step_sizes(log_dt: nnx.Param, config: SystemConfig) -> Float[Array, ' H']:
  """The step sizes of these parameters."""
  return (jnp.exp if config.dt_transform == 'exp' else jax.nn.softplus)(log_dt[...])


def recurrent(
  value: Array, axes: tuple[str | None, ...], decay: bool = False, **rates: Any
) -> nnx.Param:
  """A parameter of a system: fp32, by default without weight decay, not multiplied with tokens
  directly; `rates` are metadata of `param`."""
  return param(value, axes, decay=decay, full_precision=True, matmul=False, **rates)


def copies(values: np.ndarray, count: int) -> Complex[Array, 'S N']:
  """The same complex numbers for each of several systems."""
  return jnp.broadcast_to(jnp.asarray(values, jnp.complex64)[None], (count, len(values)))


def poles(a_HN: Array, axis: str | None = 'inner', **rates: Any) -> tuple[nnx.Param, nnx.Param]:
  """Parameters for the diagonal a of a continuous system: log(-Re a) and Im a."""
  log_decay = recurrent(jnp.log(-a_HN.real), (axis, 'state'), **rates)
  return log_decay, recurrent(a_HN.imag, (axis, 'state'), **rates)


def stable(log_decay: nnx.Param, frequency: nnx.Param) -> Complex[Array, 'H N']:
  """The diagonal of these parameters. Its real part is negative for any of them."""
  return jax.lax.complex(-jnp.exp(log_decay[...]), frequency[...])


def pairs(z: Array) -> Array:
  """Complex numbers as real ones with a last axis of 2, the form of parameters."""
  return jnp.stack([z.real, z.imag], axis=-1).astype(jnp.float32)


def paired(p: nnx.Param) -> Array:
  """The complex numbers of such a parameter."""
  return jax.lax.complex(p[...][..., 0], p[...][..., 1])


def complex_normal(key: Array, shape: tuple[int, ...]) -> Array:
  """Complex numbers of unit variance, half of it in each part."""
  return jax.random.normal(key, shape, jnp.complex64)
