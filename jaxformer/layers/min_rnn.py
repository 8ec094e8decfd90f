"""Minimal LSTMs and GRUs (Feng et al. 2024): gates that read the input alone, so that a scan
computes all steps at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.diagonal_scan import gated_scan
from jaxformer.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinRnnState:
  """h after the last token, fp32, and the last J = d_conv - 1 inputs of the convolution, None
  without one."""

  h_BN: Float[Array, 'B N']
  inputs_BJD: Float[Array, 'B J D'] | None


def positive(x: Array) -> Array:
  """g(x) = x + 1/2 for x >= 0, sigmoid(x) below (Feng et al. 2024, appendix B): above 0, so that it
  has a logarithm, in which the authors compute."""
  return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


class MinRnnConfig(LayerConfig, abstract=True):
  """Base of the configs of both.

  Attributes:
    hidden: units N of the state; None for as many as the input has channels, which are then the
      output, without a projection.
    d_conv: kernel size of a causal depthwise convolution of the input; None for none.
    init: of projections, convolution and biases.
  """

  hidden: int | None = None
  d_conv: int | None = None
  init: Init = FanInUniform()

  gates: ClassVar[int]

  def validate(self):
    self.require_positive('hidden', 'd_conv')

  @classmethod
  def examples(cls):
    return cls(), cls(hidden=48, d_conv=3)

  def mixing_flops_per_token(self, width, length, causal):
    # of the recurrence, a product and a sum per unit; of the convolution, one per channel and tap
    return 2.0 * (self.hidden or width) + 2.0 * (self.d_conv or 0) * width


class MinRnn(Layer):
  """Base of both. `_gates` makes of the gates' logits, `[B, T, N]` each and fp32, the logarithm of
  the factor on h and the factor on the candidate."""

  def __init__(self, config: MinRnnConfig, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, N = config, config.hidden or width
    self.width, self.units, self.d_conv = width, N, c.d_conv
    dense = functools.partial(Dense, c.init, rngs=rngs, position=position, bias=c.init)
    self.conv = dense((c.d_conv, width), ('state', 'inner')) if c.d_conv else None
    self.gates = nnx.List([dense((width, N), ('embed', 'inner')) for _ in range(c.gates)])
    self.candidate = dense((width, N), ('embed', 'inner'))
    self.out = dense((N, width), ('inner', 'embed')) if c.hidden else None

  def _gates(self, *logits: Array) -> tuple[Array, Array]:
    raise NotImplementedError

  def init_state(self, batch, max_len, memory=None) -> MinRnnState:
    inputs = None
    if self.d_conv:
      inputs = jnp.zeros((batch, self.d_conv - 1, self.width), self.candidate.dtype)
    return MinRnnState(jnp.zeros((batch, self.units), jnp.float32), inputs)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MinRnnState | None = None
  ) -> Output:
    starts, dtype = ctx.starts(x_BTD), x_BTD.dtype
    h, inputs = (None, None) if state is None else (state.h_BN, state.inputs_BJD)
    if self.conv is not None:
      kernel, bias = self.conv.kernel[...], self.conv.bias[...]
      x_BTD, after = short_convolution(x_BTD, kernel, bias, inputs, starts)
      inputs = after if inputs is None else after.astype(inputs.dtype)
    logits = (
      shard(dense(x_BTD), 'batch', 'time', 'inner').astype(jnp.float32)
      for dense in (*self.gates, self.candidate)
    )
    *gates, candidate = logits
    log_decay, factor = self._gates(*gates)
    y, h = gated_scan(factor * positive(candidate), log_decay, h, starts)
    y = y.astype(dtype)
    y = y if self.out is None else self.out(y)
    return Output(y, None if state is None else MinRnnState(h, inputs))


class MinGru(MinRnn):
  """h_t = (1 - z_t) h_{t-1} + z_t g(x_t W_h + b_h) with z = sigmoid(x W_z + b_z) and g(x) = x + 1/2
  for x >= 0, sigmoid(x) below (Feng et al. 2024, section 3.1 and appendix B).

  1 - z is sigmoid of the negative logit, and no logarithm of a state is taken: the numbers of the
  authors' form in logarithms, which starts from g(0) = 1/2 where this one starts from 0."""

  class Config(MinRnnConfig):
    gates: ClassVar[int] = 1

  def _gates(self, *logits):
    (z,) = logits
    return jax.nn.log_sigmoid(-z), jax.nn.sigmoid(z)


class MinLstm(MinRnn):
  """h_t = f'_t h_{t-1} + i'_t g(x_t W_h + b_h) with f, i = sigmoid(x W + b), f' = f / (f + i),
  i' = i / (f + i) and g(x) = x + 1/2 for x >= 0, sigmoid(x) below (Feng et al. 2024, section 3.2
  and appendix B).

  f / (f + i) is sigmoid(log f - log i)."""

  class Config(MinRnnConfig):
    gates: ClassVar[int] = 2

  def _gates(self, *logits):
    f, i = logits
    difference = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
    return jax.nn.log_sigmoid(difference), jax.nn.sigmoid(-difference)
