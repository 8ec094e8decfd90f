"""The mLSTM layers of xLSTM: a matrix memory with exponential gates, between projections of the
width (xLSTM-7B, Beck et al. 2025), and within an up-projection (Beck et al. 2024)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import BlockDense, Dense, by_head
from jaxformer.layers.init import FanInNormal, FanInUniform, Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import Norm
from jaxformer.ops.convolution import short_convolution
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


def head_flops(K: int, V: int, length: int, causal: bool) -> float:
  """FLOPs per token of a head: scores and their products in chunks of `COUNTED_CHUNK`, and updates
  and reads of the state."""
  chunk = min(COUNTED_CHUNK, length)
  seen = (chunk + 1) / 2 if causal else chunk
  return 2.0 * seen * (K + V) + 4.0 * K * V


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
      return self.heads * head_flops(*self.head_dims(width), length, causal)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreUpMLstmState:
  """The last J = d_conv - 1 inputs of the convolution, and the memory."""

  inputs_BJN: Float[Array, 'B J N']
  memory: MLstmState


class PreUpMLstm(Layer):
  """y = ((norm(mlstm(q, k, v)) + s * x') * silu(u W_z)) W_o with x = u W_x, x' = silu(conv(x)), q =
  x' W_q, k = x' W_k, v = x W_v, s learnt (Beck et al. 2024, section 2.3 and appendix A.2).

  The memory is that of `MLstm`, with gates exp([q, k, v] W_i + b_i) and sigmoid([q, k, v] W_f +
  b_f). W_q, W_k and W_v are block-diagonal with small blocks. This is a complete block: there is no
  feed-forward layer beside it."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: number of heads H.
      factor: channels of x and z, as a multiple of the width.
      block: channels of a block of W_q, W_k and W_v.
      d_conv: kernel size of the causal depthwise convolution.
      forget_low, forget_high: initial values of b_f in the first and in the last head, between
        which the others are evenly spaced.
      eps: added to the denominator; `norm_eps`: of the norm.
      init: of the projections in, and of W_q, W_k and W_v with the width as fan-in;
        `input_init`: of b_i; `conv_init`: of the convolution and its bias; `out_init`: of the
        projection out.
    """

    heads: int = 4
    factor: float = 2.0
    block: int = 4
    d_conv: int = 4
    forget_low: float = 3.0
    forget_high: float = 6.0
    eps: float = 1e-6
    norm_eps: float = 1e-5
    init: Init = SMALL
    input_init: Init = Normal(std=0.1)
    conv_init: Init = FanInUniform()
    out_init: Init = WangNormal(gain=2 * math.sqrt(2))  # as for an input of the width

    def validate(self):
      self.require_positive('heads', 'factor', 'block', 'd_conv')
      self.require_not_negative('eps')

    def channels(self, width: int) -> int:
      """N, of x and z."""
      channels = int(self.factor * width)
      for field in ('heads', 'block'):
        self.quotient(channels, field, 'the number of channels')
      return channels

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, norm_eps=1e-2, init=FanInNormal(gain=2.0)),
        cls(
          factor=1.5,
          block=8,
          d_conv=3,
          forget_low=-2.0,
          forget_high=2.0,
          norm_eps=1e-3,
          init=FanInNormal(gain=2.0),
          input_init=Normal(std=1.0),
        ),
      )

    def mixing_flops_per_token(self, width, length, causal):
      K = self.channels(width) // self.heads
      return self.heads * head_flops(K, K, length, causal)

  def __init__(
    self, config: PreUpMLstm.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, N = config, config.channels(width)
    self.config, self.head_dim = c, N // c.heads
    dense = functools.partial(Dense, rngs=rngs, position=position)
    shape = N // c.block, c.block, c.block
    block = functools.partial(BlockDense, c.init, shape, rngs=rngs, position=position, fan_in=width)
    self.x, self.z = (dense(c.init, (width, N), ('embed', 'inner')) for _ in range(2))
    self.conv = dense(c.conv_init, (c.d_conv, N), ('state', 'inner'), bias=c.conv_init)
    self.q, self.k, self.v = (block() for _ in range(3))
    self.input_gate = HeadGate(3 * N, c.input_init(rngs.params(), (c.heads,), 3 * N, position))
    self.forget_gate = HeadGate(3 * N, jnp.linspace(c.forget_low, c.forget_high, c.heads))
    self.norm = Norm(N, c.norm_eps, bias=False, by_head=True)
    self.skip = param(jnp.ones(N), ('inner',), decay=False)
    self.out = dense(c.out_init, (N, width), ('inner', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> PreUpMLstmState:
    H, K, J = self.config.heads, self.head_dim, self.config.d_conv - 1
    zeros = jnp.zeros((batch, H, K, K)), jnp.zeros((batch, H, K)), jnp.zeros((batch, H))
    return PreUpMLstmState(jnp.zeros((batch, J, H * K), self.x.dtype), MLstmState(*zeros))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: PreUpMLstmState | None = None
  ) -> Output:
    c, starts = self.config, ctx.starts(x_BTD)
    x, z = (shard(dense(x_BTD), 'batch', 'time', 'inner') for dense in (self.x, self.z))
    inputs, memory = (None, None) if state is None else (state.inputs_BJN, state.memory.arrays)
    conv = self.conv
    convolved, inputs_after = short_convolution(x, conv.kernel[...], conv.bias[...], inputs, starts)
    convolved = jax.nn.silu(convolved)

    def projected(dense: BlockDense, x: Array) -> Array:
      return shard(dense(by_head(x, c.block)).reshape(x.shape), 'batch', 'time', 'inner')

    qkv = projected(self.q, convolved), projected(self.k, convolved), projected(self.v, x)
    joined = jnp.concatenate(qkv, axis=-1)
    h, memory_after = mlstm(
      *(by_head(a, self.head_dim) for a in qkv),
      self.input_gate(joined),
      jax.nn.log_sigmoid(self.forget_gate(joined)),
      memory,
      starts,
      eps=c.eps,
    )
    y = self.norm(h) + self.skip[...][None, None] * convolved
    y = self.out(y * jax.nn.silu(z))
    if state is None:
      return Output(y)
    inputs = inputs_after.astype(state.inputs_BJN.dtype)
    return Output(y, PreUpMLstmState(inputs, MLstmState(*memory_after)))
