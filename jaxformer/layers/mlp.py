"""Feed-forward layers: a linear map, an activation, a linear map; and the gated variants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output, dropout
from jaxformer.sharding import shard

ActivationName = Literal[
  'identity', 'relu', 'squared_relu', 'gelu', 'gelu_tanh', 'gelu_sigmoid', 'silu', 'sigmoid', 'tanh'
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'identity': lambda x: x,
  'relu': jax.nn.relu,
  'squared_relu': lambda x: jnp.square(jax.nn.relu(x)),
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'gelu_sigmoid': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'silu': jax.nn.silu,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
}


class LinearMap(Layer):
  """y = x W (Vaswani et al. 2017, section 3.2.2: W_O, the last part of their attention)."""

  class Config(LayerConfig):
    """
    Attributes:
      out: width of the output; None for that of the input.
      bias: whether there is one.
      init: of W.
    """

    out: int | None = None
    bias: bool = False
    init: Init = Normal()

    def validate(self):
      self.require_positive('out')

    def out_width(self, width: int) -> int:
      return self.out or width

    @classmethod
    def examples(cls):
      return cls(), cls(out=24, bias=True)

  def __init__(self, config: LinearMap.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    shape = width, config.out_width(width)
    self.out = Dense(
      config.init, shape, (None, 'embed'), rngs=rngs, position=position, bias=config.bias
    )

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state=None) -> Output:
    return Output(self.out(x_BTD), state)


class Mlp(Layer):
  """y = act(x W_up + b) W_down + b' (Vaswani et al. 2017, section 3.3)."""

  class Config(LayerConfig):
    """
    Attributes:
      hidden: hidden units F.
      activation: the nonlinearity; `gelu` is exact, `gelu_tanh` the approximation of GPT-2,
        `gelu_sigmoid` x sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2).
      bias: whether the projections have biases.
      dropout: rate at which hidden units are dropped.
      init: of the projections in; `out_init`: of the projection out.
    """

    hidden: int = 256
    activation: ActivationName = 'gelu_tanh'
    bias: bool = False
    dropout: float = 0.0
    init: Init = Normal()
    out_init: Init = Normal()

    gated: ClassVar[bool] = False

    def validate(self):
      self.require_positive('hidden')
      self.require_rate('dropout')

    @classmethod
    def examples(cls):
      return cls(hidden=48), cls(hidden=48, activation='squared_relu', bias=True)

    def hidden_units(self, up: Array, gate: Array | None) -> Array:
      """Hidden units from what the projections in return; `gate` is None where there is none."""
      return ACTIVATIONS[self.activation](up)

  def __init__(self, config: Mlp.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, dense = config, functools.partial(Dense, rngs=rngs, position=position, bias=config.bias)
    self.config = c
    self.up = dense(c.init, (width, c.hidden), ('embed', 'mlp'))
    self.gate = dense(c.init, (width, c.hidden), ('embed', 'mlp')) if c.gated else None
    self.down = dense(c.out_init, (c.hidden, width), ('mlp', 'embed'))

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state=None) -> Output:
    gate = None if self.gate is None else self.gate(x_BTD)
    h = self.config.hidden_units(self.up(x_BTD), gate)
    h = dropout(shard(h, 'batch', 'time', 'mlp'), self.config.dropout, ctx)
    return Output(self.down(checkpoint_name(h, 'mlp_hidden')), state)


class GatedMlp(Mlp):
  """y = (act(x W_gate) * x W_up) W_down (Shazeer 2020, section 2).

  SwiGLU with `silu`, GEGLU with `gelu`, ReGLU with `relu`, GLU with `sigmoid`, bilinear with
  `identity`. Llama calls these projections w1 (gate), w3 (up) and w2 (down)."""

  class Config(Mlp.Config):
    """
    Attributes:
      limit: x W_gate is at most `limit`, and |x W_up| too, before the activation (OpenAI 2025,
        gpt-oss: 7); None for no limit.
      up_offset: added to x W_up (gpt-oss: 1).
      gate_scale: constant factor on x W_gate (Falcon-H1); None for 1.
    """

    activation: ActivationName = 'silu'
    limit: float | None = None
    up_offset: float = 0.0
    gate_scale: float | None = None

    gated: ClassVar[bool] = True

    def validate(self):
      super().validate()
      self.require_positive('limit', 'gate_scale')

    @classmethod
    def examples(cls):
      clamped = cls(hidden=48, activation='gelu_sigmoid', bias=True, limit=0.05, up_offset=1.0)
      return cls(hidden=48), clamped, cls(hidden=48, activation='gelu', gate_scale=0.7)

    def hidden_units(self, up: Array, gate: Array | None) -> Array:
      assert gate is not None
      gate = gate if self.gate_scale is None else self.gate_scale * gate
      if self.limit is not None:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
      return ACTIVATIONS[self.activation](gate) * (up + self.up_offset if self.up_offset else up)
