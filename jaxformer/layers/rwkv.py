"""Parts that the versions of RWKV share: initializations that depend on depth, token shift,
low-rank functions of the token, the state of time mixing, and channel mixing.

Dims: R rank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import Init, Orthogonal, Zeros
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import HeadNorm, Norm
from jaxformer.ops.linear import linear
from jaxformer.ops.token_shift import last_token, token_shift
from jaxformer.sharding import param, shard

# ---- initialization ----------------------------------------------------------------------------


def depth(position: LayerPosition) -> tuple[Array, Array]:
  """Return the depth of a block in two scales: from 0 to 1 over the blocks, and from 1 to almost
  0."""
  layer = jnp.asarray(position.index, jnp.float32)
  return layer / max(position.depth - 1, 1), 1.0 - layer / position.depth


def vector(value: Array, **metadata: Any) -> nnx.Param:
  """A parameter with one element per channel, without weight decay."""
  return param(value, ('norm',), decay=False, **metadata)


def ramp(width: int, exponent: Array | float) -> Float[Array, ' D']:
  """(i / D)^exponent: from 0 to almost 1. The initial weight of the current token per channel."""
  return (jnp.arange(width) / width) ** exponent


def decay_ramp(width: int, deep: Array) -> Float[Array, ' D']:
  """(i / (D - 1))^(0.7 + 1.3 deep): from 0 to 1, rising later in deeper blocks. The initial time
  decays of RWKV-4 to 6 follow it."""
  return (jnp.arange(width) / (width - 1)) ** (0.7 + 1.3 * deep)


def zigzag(width: int) -> Float[Array, ' D']:
  """0, 1, -1, 0, 1, -1, ...: makes the bonuses of neighboring channels differ."""
  return (jnp.arange(width) + 1.0) % 3 - 1.0


def head_norm(config: HeadNorm, width: int, position: LayerPosition) -> Norm:
  """The norm of heads, with a smaller scale in earlier blocks."""
  norm = config.build(width)
  norm.scale = vector(jnp.full(width, ((1.0 + position.index) / position.depth) ** 0.7))
  return norm


SMALL = Orthogonal(gain=0.1, wide=False)  # how RWKV-7 draws B, which follows an A of zeros


# ---- pieces ------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeMixState:
  """The last token's input, and what the recurrence carries, fp32: in RWKV-4 the sums aa, bb and pp
  over all tokens so far (`ops.wkv4.Wkv4State`), later a matrix per head, `[B, H, K, V]`
  (`ops.wkv6`) or `[B, H, V, K]` (`ops.wkv7`)."""

  last_BD: Float[Array, 'B D']
  carried: Any

  def after(self, x_BTD: Array, carried: Any) -> TimeMixState:
    """The state after the tokens `x_BTD`."""
    return TimeMixState(last_token(x_BTD).astype(self.last_BD.dtype), carried)


def shifted(
  x_BTD: Float[Array, 'B T D'], ctx: Context, last_BD: Float[Array, 'B D'] | None
) -> Float[Array, 'B T D']:
  """The inputs shifted by one token (`ops.token_shift`), `last_BD` first; None for zeros."""
  return token_shift(x_BTD, last_BD, ctx.starts(x_BTD))


def keep(x_BTD: Array, before_BTD: Array, mix: nnx.Param) -> Array:
  """mix x + (1 - mix) shift(x): `mix` is the weight of the current token (RWKV-4 and 5)."""
  mix_11D = mix[...][None, None]
  return x_BTD * mix_11D + before_BTD * (1 - mix_11D)


def move(x_BTD: Array, change_BTD: Array, mix: nnx.Param | Array) -> Array:
  """x + change mix, where change = shift(x) - x: `mix` is the weight of the previous token (RWKV-6
  and 7)."""
  mix = mix[...]
  return x_BTD + change_BTD * (mix[None, None] if mix.ndim == 1 else mix)


class LowRank(nnx.Module):
  """f(x) = bias + activation(x A) B, with A [D, R] initialized to zero and B [R, D] small, so that
  f starts constant."""

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
    self.a = param(jnp.zeros((width, rank)), ('embed', 'state'), decay=False)
    drawn = init(rngs.params(), (rank, width), rank, position)
    self.b = param(drawn, ('state', 'heads'), decay=False)
    self.bias = (
      None if bias is None else vector(bias, lr_scale=lr_scale, full_precision=full_precision)
    )

  def __call__(self, x_BTD: Array, activation: Callable[[Array], Array] = lambda h: h) -> Array:
    """Return f(x): fp32 with a bias, else in the dtype of x."""
    y = linear(activation(linear(x_BTD, self.a[...])), self.b[...])
    if self.bias is None:
      return y
    return y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None]


def projections(
  width: int, inits: Sequence[Init], out_init: Init, rngs: nnx.Rngs, position: LayerPosition
) -> Iterator[Dense]:
  """Square projections: those of the inputs, and that of the output."""
  dense = functools.partial(Dense, shape=(width, width), rngs=rngs, position=position)
  yield from (dense(init, axes=('embed', 'heads')) for init in inits)
  yield dense(out_init, axes=('heads', 'embed'))


# ---- channel mixing ----------------------------------------------------------------------------


class ChannelMix(Layer):
  """y = sigmoid(x'_r W_r) * relu(x'_k W_k)^2 W_v, where x' mixes x and the previous token's x; in
  RWKV-7 y = relu(x'_k W_k)^2 W_v (Peng et al. 2023, eq. 14, 15 and 18).

  x'_z = mix_z x + (1 - mix_z) shift(x) in RWKV-4 and 5, and x'_z = x + (shift(x) - x) mix_z later.
  The state is the last token's input.

  In RWKV-6 mix_z starts at 1 - (i / D)^s, with s from 1 in the first block to almost 0 in the last,
  as in the official code of 2024 up to November, from which the published models are; since then
  the code has s^3 (and RWKV-7 s^4)."""

  class Config(LayerConfig):
    """
    Attributes:
      version: of RWKV, 4 to 7; 4 and 5 are equal.
      hidden: hidden units F.
      init: of W_k: `Orthogonal()` in RWKV-4, which grows with F / D, `Orthogonal(wide=False)`
        later; `out_init`: of W_v and W_r.
    """

    version: int = 6
    hidden: int = 256
    init: Init = Orthogonal(wide=False)
    out_init: Init = Zeros()

    def validate(self):
      self.require(self.version in (4, 5, 6, 7), 'version', '4, 5, 6 or 7')
      self.require_positive('hidden')

    @classmethod
    def examples(cls):
      return tuple(cls(version=version, hidden=48) for version in (4, 6, 7))

  def __init__(
    self, config: ChannelMix.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, D, F = config, width, config.hidden
    self.width, self.version = D, c.version
    start = ramp(D, depth(position)[1] ** (4 if c.version == 7 else 1))
    start = start if c.version < 6 else 1.0 - start
    self.mix_k, self.mix_r = vector(start), vector(start) if c.version < 7 else None
    dense = functools.partial(Dense, rngs=rngs, position=position)
    self.k = dense(c.init, (D, F), ('embed', 'mlp'))
    self.v = dense(c.out_init, (F, D), ('mlp', 'embed'))
    self.r = dense(c.out_init, (D, D), ('embed', 'mlp')) if c.version < 7 else None

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B D']:
    return jnp.zeros((batch, self.width), self.k.dtype)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    before_BTD = shifted(x_BTD, ctx, state)

    def mixed(mix: nnx.Param) -> Array:
      if self.version < 6:
        return keep(x_BTD, before_BTD, mix)
      return move(x_BTD, before_BTD - x_BTD, mix)

    h = jnp.square(jax.nn.relu(self.k(mixed(self.mix_k))))
    y = self.v(checkpoint_name(shard(h, 'batch', 'time', 'mlp'), 'mlp_hidden'))
    if self.r is not None and self.mix_r is not None:
      y = jax.nn.sigmoid(self.r(mixed(self.mix_r))) * y
    return Output(y, None if state is None else last_token(x_BTD).astype(state.dtype))
