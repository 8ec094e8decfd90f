"""What the versions of RWKV share: how initial values depend on the depth of a block, functions of
the token of low rank, what a token shift remembers, and the channel mixing with a receptance.

Dims: R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.init import Init, Orthogonal, Zeros
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  starts_BT,
)
from jaxformer.ops.linear import linear
from jaxformer.ops.token_shift import last_token, token_shift
from jaxformer.sharding import param, shard

# ---- initial values ----------------------------------------------------------------------------


def depth(position: LayerPosition) -> tuple[Array, Array]:
  """How deep a block lies: from 0 to 1 over the blocks, and from 1 to almost 0."""
  layer = jnp.asarray(position.index, jnp.float32)
  return layer / max(position.depth - 1, 1), 1.0 - layer / position.depth


def vector(value: Array, **metadata: Any) -> nnx.Param:
  """A number a channel, which weight decay leaves alone."""
  return param(value, ('norm',), decay=False, **metadata)


def ramp(width: int, exponent: Array | float) -> Float[Array, ' D']:
  """(i / D)^exponent: from 0 to almost 1. How much of the present token a channel sees to begin
  with."""
  return (jnp.arange(width) / width) ** exponent


def decay_ramp(width: int, deep: Array) -> Float[Array, ' D']:
  """(i / (D - 1))^(0.7 + 1.3 deep): from 0 to 1, later in deeper blocks. Time decays of RWKV-4 to 6
  begin on it."""
  return (jnp.arange(width) / (width - 1)) ** (0.7 + 1.3 * deep)


def zigzag(width: int) -> Float[Array, ' D']:
  """0, 1, -1, 0, 1, -1, ...: keeps the bonuses of neighbours apart."""
  return (jnp.arange(width) + 1.0) % 3 - 1.0


SMALL = Orthogonal(gain=0.1, wide=False)  # how RWKV-7 draws what follows a matrix of zeros


# ---- pieces ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastToken:
  """The last token's input: all that a token shift remembers."""

  last_BD: Float[Array, 'B D']


def shifted(x_BTD: Float[Array, 'B T D'], ctx: Context, state: Any) -> Float[Array, 'B T D']:
  """The inputs one token back (`ops.shift`), before them what `state.last_BD` holds; None for
  nothing."""
  B, T, _ = x_BTD.shape
  return token_shift(
    x_BTD, None if state is None else state.last_BD, starts_BT(ctx.segments_BT, B, T)
  )


def keep(x_BTD: Array, before_BTD: Array, mix: nnx.Param) -> Array:
  """mix x + (1 - mix) shift(x): `mix` is how much of the present token stays (RWKV-4 and 5)."""
  mix_11D = mix[...][None, None]
  return x_BTD * mix_11D + before_BTD * (1 - mix_11D)


def move(x_BTD: Array, change_BTD: Array, mix: nnx.Param | Array) -> Array:
  """x + change mix, where change = shift(x) - x: `mix` is how far to go towards the token before
  (RWKV-6 and 7)."""
  mix = mix[...]
  return x_BTD + change_BTD * (mix[None, None] if mix.ndim == 1 else mix)


class LowRank(nnx.Module):
  """f(x) = bias + activation(x A) B, with A [D, R] from zero and B [R, D] small: a function of
  the token that starts constant."""

  def __init__(
    self,
    width: int,
    rank: int,
    rngs: nnx.Rngs,
    position: LayerPosition,
    bias: Array | None = None,
    *,
    init: Init = SMALL,
    lr_scale: float = 1.0,
    full_precision: bool = False,
  ):
    """`init` is that of B; `lr_scale` and `full_precision` are those of the bias."""
    self.down = param(jnp.zeros((width, rank)), ('embed', 'state'), decay=False)
    self.up = param(
      init(rngs.params(), (rank, width), rank, position), ('state', 'heads'), decay=False
    )
    self.bias = (
      None if bias is None else vector(bias, lr_scale=lr_scale, full_precision=full_precision)
    )

  def __call__(self, x_BTD: Array, activation: Callable[[Array], Array] = lambda h: h) -> Array:
    """In fp32 where there is a bias, else in the type of x."""
    y = linear(activation(linear(x_BTD, self.down[...])), self.up[...])
    return (
      y
      if self.bias is None
      else y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None]
    )


# ---- channel mixing with a receptance ----------------------------------------------------------


class ChannelMixConfig(LayerConfig, abstract=True):
  """
  Attributes:
    hidden: hidden units F.
    init: of W_k; `out_init`: of W_v and W_r.
  """

  hidden: int = 256
  init: Init = Orthogonal(wide=False)
  out_init: Init = Zeros()

  def validate(self):
    self.require(self.hidden > 0, 'hidden', 'positive')

  def state_size(self, width: int, max_len: int) -> int:
    return width

  @classmethod
  def examples(cls) -> tuple[LayerConfig, ...]:
    return (cls(hidden=48),)


class ChannelMix(Layer):
  """Base of the channel mixing of RWKV-4 to 6: y = sigmoid(x'_r W_r) * relu(x'_k W_k)^2 W_v (Peng
  et al. 2023, equations 14, 15 and 18).

  The versions differ in how x' is mixed of x and shift(x), and thus in what the vectors of mixing
  hold."""

  def first_mix(self, ramp_D: Array) -> Array:
    """What a vector of mixing begins with, if `ramp_D` of the present token is to stay."""
    raise NotImplementedError

  def mixed(self, x_BTD: Array, before_BTD: Array, mix: nnx.Param) -> Array:
    """x'."""
    raise NotImplementedError

  def __init__(self, config: ChannelMixConfig, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D, F = config, width, config.hidden
    begin = self.first_mix(ramp(D, depth(position)[1]))
    self.mix_k, self.mix_r = vector(begin), vector(begin)
    self.wk = param(c.init(rngs.params(), (D, F), D, position), ('embed', 'mlp'))
    self.wv = param(c.out_init(rngs.params(), (F, D), F, position), ('mlp', 'embed'))
    self.wr = param(c.out_init(rngs.params(), (D, D), D, position), ('embed', 'mlp'))

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> LastToken:
    return LastToken(jnp.zeros((batch, self.wk.shape[0]), self.wk[...].dtype))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: LastToken | None = None
  ) -> Output:
    before = shifted(x_BTD, ctx, state)
    h = linear(self.mixed(x_BTD, before, self.mix_k), self.wk[...])
    h = checkpoint_name(shard(jnp.square(jax.nn.relu(h)), 'batch', 'time', 'mlp'), 'mlp_hidden')
    y = jax.nn.sigmoid(linear(self.mixed(x_BTD, before, self.mix_r), self.wr[...])) * linear(
      h, self.wv[...]
    )
    return Output(
      y, None if state is None else LastToken(last_token(x_BTD).astype(state.last_BD.dtype))
    )
