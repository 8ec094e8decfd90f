"""RWKV-6 "Finch" (Peng et al. 2024, section 4.2): RWKV-5 with a mixing of tokens and decays that
depend on the token.

Initial values and learning rates are those of the official training code (RWKV-LM, RWKV-v5,
`x060`)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.init import Uniform
from jaxformer.layers.layer import Context, LayerPosition, Output
from jaxformer.layers.norm import HeadNorm
from jaxformer.layers.rwkv import (
  ChannelMix,
  ChannelMixConfig,
  LowRank,
  depth,
  move,
  ramp,
  shifted,
  vector,
)
from jaxformer.layers.rwkv5 import MatrixMix, MatrixMixConfig, MatrixMixState
from jaxformer.ops.linear import linear
from jaxformer.sharding import param

MIXED = 'wkvrg'  # in this order the low-rank matrices of the mixing stand in one parameter


class TimeMix6(MatrixMix):
  """Time mixing of RWKV-6. With c = shift(x) - x, for each z below, and heads of K channels:

    x'_z = x + c (mix_z + tanh((x + c mix_x) A_z) B_z)                 decay log w_t = -exp(d +
    tanh(x'_w A) B) r, k, v, g = x'_r W_r, x'_k W_k, x'_v W_v, silu(x'_g W_g)          u = bonus, a
    channel

    S_t = diag(w_t) S_{t-1} + k_t v_t^T,   y = (norm by head(r_t^T (S_{t-1} + diag(u) k_t v_t^T)) *
    g) W_o

  All A start at zero and all B small. `d` learns at twice the learning rate.
  """

  class Config(MatrixMixConfig):
    """
    Attributes:
      mix_rank: rank R of each A_z and B_z; `decay_rank`: of A and B.
    """

    mix_rank: int = 32
    decay_rank: int = 64

    def validate(self):
      super().validate()
      for field in ('mix_rank', 'decay_rank'):
        self.require(getattr(self, field) > 0, field, 'positive')

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> TimeMix6:
      return TimeMix6(self, width, rngs, position)

    @classmethod
    def examples(cls) -> tuple[TimeMix6.Config, ...]:
      return (cls(head_dim=8, mix_rank=4, decay_rank=6, norm=HeadNorm.Config(eps=1e-3)),)

  def __init__(self, config: TimeMix6.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    D, R, small = width, config.mix_rank, Uniform(bound=0.01)
    deep, shallow = depth(position)
    self.mix_x, self.mix_w, self.mix_k = (vector(1.0 - ramp(D, shallow)) for _ in range(3))
    self.mix_v = vector(1.0 - (ramp(D, shallow) + 0.3 * deep))
    self.mix_r, self.mix_g = (vector(1.0 - ramp(D, 0.5 * shallow)) for _ in range(2))
    self.mix_down = param(jnp.zeros((D, len(MIXED) * R)), ('embed', 'state'), decay=False)
    self.mix_up = param(
      small(rngs.params(), (len(MIXED), R, D), R, position), (None, 'state', 'embed'), decay=False
    )
    self.decay = LowRank(
      D,
      config.decay_rank,
      rngs,
      position,
      self.first_decay(D, position),
      init=small,
      lr_scale=2.0,
      full_precision=True,
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MatrixMixState | None = None
  ) -> Output:
    change = shifted(x_BTD, ctx, state) - x_BTD
    mixed = self._mixed(x_BTD, change)
    log_decay = -jnp.exp(self.decay(mixed['w'], jnp.tanh))
    return self.recur(x_BTD, mixed, log_decay, ctx, state)

  def _mixed(self, x_BTD: Array, change_BTD: Array) -> dict[str, Array]:
    """x'_z by the letter z."""
    h = jnp.tanh(linear(move(x_BTD, change_BTD, self.mix_x), self.mix_down[...]))
    mixes = zip(MIXED, jnp.split(h, len(MIXED), axis=-1), self.mix_up[...], strict=True)
    vectors = {'w': self.mix_w, 'k': self.mix_k, 'v': self.mix_v, 'r': self.mix_r, 'g': self.mix_g}
    return {
      z: move(x_BTD, change_BTD, vectors[z][...][None, None] + linear(h_z, up))
      for z, h_z, up in mixes
    }


class ChannelMix6(ChannelMix):
  """Channel mixing of RWKV-6: y = sigmoid(x'_r W_r) * relu(x'_k W_k)^2 W_v with x'_z = x +
  (shift(x) - x) mix_z."""

  class Config(ChannelMixConfig):
    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> ChannelMix6:
      return ChannelMix6(self, width, rngs, position)

  def first_mix(self, ramp_D):
    return 1.0 - ramp_D

  def mixed(self, x_BTD, before_BTD, mix):
    return move(x_BTD, before_BTD - x_BTD, mix)
