"""The sLSTM layer of xLSTM (Beck et al. 2024): a scalar memory with exponential gates, mixed within
each head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import BlockDense, Dense, by_head
from jaxformer.layers.init import FanInNormal, FanInUniform, Init, Uniform, Zeros
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mlstm import SMALL
from jaxformer.layers.norm import Norm
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.slstm import slstm
from jaxformer.sharding import param, shard

GATES = ('i', 'f', 'z', 'o')


class ForgetPowerLaw(Init):
  """start + (end - start) (k / (K - 1))^p over the K channels of a head, with an exponent p that
  rises from `first` in the first block of the stack to `last` in the last one: the biases of the
  forget gates (the authors' code, `powerlaw_blockdependent`)."""

  start: float = 5.0
  end: float = -7.0
  first: float = 0.3
  last: float = 1.6

  def validate(self):
    self.require_positive('first', 'last')

  def __call__(self, key, shape, fan_in, position):
    depth = position.index / max(position.depth - 1, 1)
    exponent = self.first + (self.last - self.first) * depth
    along = jnp.arange(shape[-1]) / max(shape[-1] - 1, 1)
    return jnp.broadcast_to(self.start + (self.end - self.start) * along**exponent, shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SLstmState:
  """Output, memory, normalizer and the maximum of the gates' logarithms, fp32 (`ops.slstm`); and
  the last J = d_conv - 1 inputs of the convolution, None without one."""

  h_BHK: Float[Array, 'B H K']
  c_BHK: Float[Array, 'B H K']
  n_BHK: Float[Array, 'B H K']
  m_BHK: Float[Array, 'B H K']
  inputs_BJD: Float[Array, 'B J D'] | None

  @property
  def arrays(self) -> tuple[Array, Array, Array, Array]:
    return self.h_BHK, self.c_BHK, self.n_BHK, self.m_BHK


class SLstm(Layer):
  """c_t = f c_{t-1} + i tanh(a_z), n_t = f n_{t-1} + i, h_t = sigmoid(a_o) c_t / n_t, y = norm(h)
  with i = exp(a_i), f = sigmoid(a_f), a = x W + h_{t-1} U + b (Beck et al. 2024, section 2.2).

  W and U are block-diagonal, with a block per head. The gates i and f read silu(conv(x)) in place
  of x. Exponentials are computed relative to their running maximum (`ops.slstm`). The norm is a
  LayerNorm of each head."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: number of heads H.
      d_conv: kernel size of the causal depthwise convolution; None for none.
      norm_eps: of the norm.
      init: of W, with the width as fan-in; `recurrent_init`: of U, with the channels of a head as
        fan-in; `forget_init`: of the forget gates' biases (others start at 0); `conv_init`: of the
        convolution and its bias.
    """

    heads: int = 4
    d_conv: int | None = 4
    norm_eps: float = 1e-5
    init: Init = SMALL
    recurrent_init: Init = Zeros()
    forget_init: Init = ForgetPowerLaw()
    conv_init: Init = FanInUniform()

    def validate(self):
      self.require_positive('heads', 'd_conv')

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, init=FanInNormal(), recurrent_init=FanInNormal()),
        cls(
          heads=8,
          d_conv=None,
          norm_eps=1e-2,
          recurrent_init=Uniform(bound=0.5),
          forget_init=Uniform(bound=2.0),
        ),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # per unit: memory and normalizer five, the output two
      return 7.0 * width

  def __init__(self, config: SLstm.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, H, K = config, config.heads, config.quotient(width, 'heads')
    self.config, self.head_dim = c, K
    block = functools.partial(
      BlockDense, c.init, (H, K, K), rngs=rngs, position=position, fan_in=width
    )
    self.i, self.f, self.z, self.o = (block() for _ in GATES)
    drawn = [c.recurrent_init(rngs.params(), (H, K, K), K, position) for _ in GATES]
    self.recurrent_kernel = param(jnp.stack(drawn, axis=2), ('heads', None, None, None))
    forget = c.forget_init(rngs.params(), (H, K), width, position)
    bias = jnp.stack([forget if g == 'f' else jnp.zeros((H, K)) for g in GATES], axis=1)
    self.bias = param(bias, ('heads', None, None), decay=False, full_precision=True, matmul=False)
    conv = functools.partial(Dense, c.conv_init, rngs=rngs, position=position, bias=c.conv_init)
    self.conv = None if c.d_conv is None else conv((c.d_conv, width), ('state', 'inner'))
    self.norm = Norm(width, c.norm_eps, bias=False, by_head=True)

  def init_state(self, batch, max_len, memory=None) -> SLstmState:
    zeros = jnp.zeros((batch, self.config.heads, self.head_dim), jnp.float32)
    inputs = None
    if self.conv is not None:
      J, width = self.conv.kernel.shape[0] - 1, self.conv.kernel.shape[1]
      inputs = jnp.zeros((batch, J, width), self.conv.dtype)
    return SLstmState(zeros, zeros, zeros, zeros, inputs)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: SLstmState | None = None
  ) -> Output:
    first = self.init_state(len(x_BTD), 1) if state is None else state
    starts, convolved, inputs = ctx.starts(x_BTD), x_BTD, first.inputs_BJD
    if self.conv is not None and inputs is not None:
      kernel, bias = self.conv.kernel[...], self.conv.bias[...]
      convolved, after = short_convolution(x_BTD, kernel, bias, inputs, starts)
      convolved, inputs = jax.nn.silu(convolved), after.astype(inputs.dtype)
    x, gated = by_head(x_BTD, self.head_dim), by_head(convolved, self.head_dim)
    preactivations = [self.i(gated), self.f(gated), self.z(x), self.o(x)]
    gates = jnp.stack([a.astype(jnp.float32) for a in preactivations], axis=3)
    gates = shard(gates + self.bias[...][None, None], 'batch', 'time', 'heads', None, None)
    h, after = slstm(gates, self.recurrent_kernel[...], first.arrays, starts)
    y = self.norm(h.astype(x_BTD.dtype))
    return Output(y, None if state is None else SLstmState(*after, inputs))
