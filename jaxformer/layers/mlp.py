"""Feed-forward layers: linear, activation, linear; and the gated linear unit family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output, dropout
from jaxformer.ops.linear import linear
from jaxformer.sharding import param, shard

ActivationName = Literal[
  'identity', 'relu', 'squared_relu', 'gelu', 'gelu_tanh', 'silu', 'sigmoid', 'tanh'
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'identity': lambda x: x,
  'relu': jax.nn.relu,
  'squared_relu': lambda x: jnp.square(jax.nn.relu(x)),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
}


class MlpConfig(LayerConfig, abstract=True):
  """What the two feed-forward layers share.

  Attributes:
    hidden: hidden units F.
    activation: the nonlinearity; `gelu` is exact, `gelu_tanh` the approximation of GPT-2.
    bias: offsets on all projections.
    dropout: rate at which hidden units are dropped.
    init: of the projections in; `out_init`: of the projection out.
  """

  hidden: int = 256
  activation: ActivationName = 'gelu_tanh'
  bias: bool = False
  dropout: float = 0.0
  init: Init = Normal()
  out_init: Init = Normal()

  def validate(self):
    self.require(self.hidden > 0, 'hidden', 'positive')
    self.require(0 <= self.dropout < 1, 'dropout', 'at least 0 and below 1')

  @classmethod
  def examples(cls) -> tuple[MlpConfig, ...]:
    return cls(hidden=48), cls(hidden=48, activation='squared_relu', bias=True)


class FeedForward(Layer):
  """Base of the two: one with a gate and one without."""

  def __init__(
    self, config: MlpConfig, width: int, rngs: nnx.Rngs, position: LayerPosition, *, gated: bool
  ):
    c, F = config, config.hidden
    self.config = c

    def weight_in():
      return param(c.init(rngs.params(), (width, F), width, position), ('embed', 'mlp'))

    def bias(size: int, axis: str):
      return param(jnp.zeros(size), (axis,), decay=False) if c.bias else None

    self.w_in, self.b_in = weight_in(), bias(F, 'mlp')
    self.w_gate, self.b_gate = (weight_in(), bias(F, 'mlp')) if gated else (None, None)
    self.w_out, self.b_out = (
      param(c.out_init(rngs.params(), (F, width), F, position), ('mlp', 'embed')),
      bias(width, 'norm'),
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state=None) -> Output:
    return Output(self._run(x_BTD, ctx), state)

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state) -> Output:
    return Output(self._run(x_BD, ctx), state)

  def _run(self, x: Array, ctx: Context) -> Array:
    def project(w: nnx.Param, b: nnx.Param | None) -> Array:
      return linear(x, w[...], None if b is None else b[...])

    act, h = ACTIVATIONS[self.config.activation], project(self.w_in, self.b_in)
    h = act(h) if self.w_gate is None else act(project(self.w_gate, self.b_gate)) * h
    h = shard(h, 'batch', *('time',) * (x.ndim - 2), 'mlp')
    h = checkpoint_name(dropout(h, self.config.dropout, ctx), 'mlp_hidden')
    return linear(h, self.w_out[...], None if self.b_out is None else self.b_out[...])


class Mlp(FeedForward):
  """y = act(x W_in + b_in) W_out + b_out (Vaswani et al. 2017, section 3.3)."""

  class Config(MlpConfig):
    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Mlp:
      return Mlp(self, width, rngs, position, gated=False)


class GatedMlp(FeedForward):
  """y = (act(x W_gate) * x W_in) W_out (Shazeer 2020): SwiGLU with `silu`, GEGLU with `gelu`,
  ReGLU, GLU with `sigmoid`, bilinear with `identity`. Llama names these projections w1 (gate), w3
  (in) and w2 (out)."""

  class Config(MlpConfig):
    activation: ActivationName = 'silu'

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> GatedMlp:
      return GatedMlp(self, width, rngs, position, gated=True)
