"""The mLSTM layer of xLSTM-7B (Beck et al. 2025): a matrix memory with exponential gates between
projections of the width."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import FanInNormal, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import Norm
from jaxformer.ops.linear import linear
from jaxformer.ops.mlstm import mlstm
from jaxformer.ops.softcap import soft_cap
from jaxformer.sharding import param, shard

COUNTED_CHUNK = 64  # the authors'; FLOPs are counted for it on every machine


class WangNormal(Init):
  """N(0, (gain / (depth sqrt(fan_in)))^2) for a stack of `depth` blocks: the output projections of
  xLSTM (the authors' code, `wang_init`)."""

  gain: float = 2.0

  def __call__(self, key, shape, fan_in, position):
    std = self.gain / position.depth / math.sqrt(fan_in)
    return std * jax.random.normal(key, shape, jnp.float32)


SMALL = FanInNormal(gain=math.sqrt(2 / 5))  # the authors' `small_init` (Nguyen and Salazar 2019)


class HeadGate(nnx.Module):
  """x W + b for a gate per head, in fp32: it is an exponent. W starts at zero."""

  def __init__(self, inputs: int, bias_H: Float[Array, ' H']):
    kernel = jnp.zeros((inputs, len(bias_H)))
    self.kernel = param(kernel, ('embed', 'heads'), full_precision=True)
    self.bias = param(bias_H, ('heads',), decay=False, full_precision=True)

  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T H']:
    gate = linear(x_BTD.astype(jnp.float32), self.kernel[...], self.bias[...])
    return shard(gate, 'batch', 'time', 'heads')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLstmState:
  """The matrix memory, the normalizer and the maximum of the gates' logarithms, fp32
  (`ops.mlstm`)."""

  C_BHKV: Float[Array, 'B H K V']
  n_BHK: Float[Array, 'B H K']
  m_BH: Float[Array, 'B H']

  @property
  def arrays(self) -> tuple[Array, Array, Array]:
    return self.C_BHKV, self.n_BHK, self.m_BH


class MLstm(Layer):
  """C_t = f C_{t-1} + i k^T v, n_t = f n_{t-1} + i k, y = (norm(q C / max(|q n|, 1)) * sigmoid(x
  W_g)) W_o with i = exp(cap(x W_i + b_i)), f = sigmoid(cap(x W_f + b_f)) (Beck et al. 2025, section
  3).

  q, k and v are projections of x, q scaled by 1 / sqrt(K). Exponentials are computed relative to
  their running maximum (`ops.mlstm`). cap(z) = c tanh(z / c). The norm is a LayerNorm of each
  head."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: number of heads H.
      key_factor, value_factor: channels of the keys and of the values in all heads, as multiples of
        the width.
      gate_cap: soft cap c of the gates' preactivations; None for none.
      input_bias: initial value of b_i; `forget_low`, `forget_high`: those of b_f in the first and
        in the last head, between which the others are evenly spaced.
      eps: added to the denominator; `norm_eps`: of the norm.
      init: of the projections in; `out_init`: of the projection out.
    """

    heads: int = 8
    key_factor: float = 0.5
    value_factor: float = 1.0
    gate_cap: float | None = 15.0
    input_bias: float = -10.0
    forget_low: float = 3.0
    forget_high: float = 6.0
    eps: float = 1e-6
    norm_eps: float = 1e-6
    init: Init = SMALL
    out_init: Init = WangNormal()

    def validate(self):
      self.require_positive('heads', 'key_factor', 'value_factor', 'gate_cap')
      self.require_not_negative('eps')

    def head_dims(self, width: int) -> tuple[int, int]:
      """K and V."""
      keys, values = int(self.key_factor * width), int(self.value_factor * width)
      return (
        self.quotient(keys, 'heads', 'the channels of the keys'),
        self.quotient(values, 'heads', 'the channels of the values'),
      )

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, input_bias=0.0, norm_eps=1e-2, init=FanInNormal()),
        cls(
          heads=4, key_factor=1.0, value_factor=1.5, gate_cap=None, forget_low=-2.0, input_bias=1.0
        ),
      )

    def mixing_flops_per_token(self, width, length, causal):
      """Scores and their products in chunks of `COUNTED_CHUNK`, and updates and reads of the
      state."""
      (K, V), chunk = self.head_dims(width), min(COUNTED_CHUNK, length)
      seen = (chunk + 1) / 2 if causal else chunk
      return self.heads * (2.0 * seen * (K + V) + 4.0 * K * V)

  def __init__(self, config: MLstm.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, H, (K, V) = config, config.heads, config.head_dims(width)
    self.config, self.head_dims = c, (K, V)
    dense = functools.partial(Dense, rngs=rngs, position=position)
    self.q, self.k = (dense(c.init, (width, H * K), ('embed', 'heads')) for _ in range(2))
    self.v, self.gate = (dense(c.init, (width, H * V), ('embed', 'heads')) for _ in range(2))
    self.input_gate = HeadGate(width, jnp.full(H, c.input_bias))
    self.forget_gate = HeadGate(width, jnp.linspace(c.forget_low, c.forget_high, H))
    self.norm = Norm(H * V, c.norm_eps, bias=False, by_head=True)
    self.out = dense(c.out_init, (H * V, width), ('heads', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> MLstmState:
    H, (K, V) = self.config.heads, self.head_dims
    return MLstmState(jnp.zeros((batch, H, K, V)), jnp.zeros((batch, H, K)), jnp.zeros((batch, H)))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MLstmState | None = None
  ) -> Output:
    c, (K, V) = self.config, self.head_dims
    q, k = by_head(self.q(x_BTD), K), by_head(self.k(x_BTD), K)
    i, f = (soft_cap(gate(x_BTD), c.gate_cap)[0] for gate in (self.input_gate, self.forget_gate))
    before = None if state is None else state.arrays
    h, after = mlstm(
      q,
      k,
      by_head(self.v(x_BTD), V),
      i,
      jax.nn.log_sigmoid(f),
      before,
      ctx.starts(x_BTD),
      eps=c.eps,
    )
    y = self.out(self.norm(h) * jax.nn.sigmoid(self.gate(x_BTD)))
    return Output(y, None if state is None else MLstmState(*after))
