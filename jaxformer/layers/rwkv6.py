"""RWKV-6 "Finch" (Peng et al. 2024, section 4.2): RWKV-5 with a mixing of tokens and decays that
depend on the token.

Initializations and learning rates are those of the official training code (RWKV-LM, RWKV-v5,
`x060`)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.layers.init import Uniform
from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.norm import HeadNorm
from jaxformer.layers.rwkv import LowRank, depth, move, ramp, vector
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.ops.linear import linear
from jaxformer.sharding import param

MIXED = 'wkvrg'  # the order of the low-rank matrices of the mixing within one parameter


class TimeMix6(TimeMix5):
  """S_t = diag(w_t) S_{t-1} + k_t v_t^T, y_t = (norm(r_t^T (S_{t-1} + diag(u) k_t v_t^T)) * g) W_o
  over heads, with a decay w_t that depends on the token (Peng et al. 2024, section 4.2).

  With c = shift(x) - x, for each z below, and heads of K channels:

    x'_z = x + c (mix_z + tanh((x + c mix_x) A_z) B_z)
    decay log w_t = -exp(d + tanh(x'_w A) B)
    r, k, v, g = x'_r W_r, x'_k W_k, x'_v W_v, silu(x'_g W_g)          u = bonus, per channel

  All A start at zero and all B small. The norm is over each head. `d` has twice the learning rate.
  """

  class Config(TimeMix5.Config):
    """
    Attributes:
      mix_rank: rank R of each A_z and B_z; `decay_rank`: of A and B.
    """

    mix_rank: int = 32
    decay_rank: int = 64

    def validate(self):
      super().validate()
      self.require_positive('mix_rank', 'decay_rank')

    @classmethod
    def examples(cls):
      return (cls(head_dim=8, mix_rank=4, decay_rank=6, norm=HeadNorm(eps=1e-3)),)

  def _init_mixing(
    self, config: Any, decay_D: Array, rngs: nnx.Rngs, position: LayerPosition
  ) -> None:
    D, R, small = self.width, config.mix_rank, Uniform(bound=0.01)
    deep, shallow = depth(position)
    self.mix_x, self.mix_w, self.mix_k = (vector(1.0 - ramp(D, shallow)) for _ in range(3))
    self.mix_v = vector(1.0 - (ramp(D, shallow) + 0.3 * deep))
    self.mix_r, self.mix_g = (vector(1.0 - ramp(D, 0.5 * shallow)) for _ in range(2))
    self.mix_a = param(jnp.zeros((D, len(MIXED) * R)), ('embed', 'state'), decay=False)
    drawn = small(rngs.params(), (len(MIXED), R, D), R, position)
    self.mix_b = param(drawn, (None, 'state', 'embed'), decay=False)
    self.decay = LowRank(
      D, config.decay_rank, rngs, position, decay_D, init=small, lr_scale=2.0, full_precision=True
    )

  def _mixed(self, x_BTD: Array, before_BTD: Array) -> tuple[dict[str, Array], Array]:
    change_BTD = before_BTD - x_BTD
    h = jnp.tanh(linear(move(x_BTD, change_BTD, self.mix_x), self.mix_a[...]))
    vectors = {'w': self.mix_w, 'k': self.mix_k, 'v': self.mix_v, 'r': self.mix_r, 'g': self.mix_g}
    mixed = {
      z: move(x_BTD, change_BTD, vectors[z][...][None, None] + linear(h_z, b))
      for z, h_z, b in zip(MIXED, jnp.split(h, len(MIXED), axis=-1), self.mix_b[...], strict=True)
    }
    return mixed, -jnp.exp(self.decay(mixed['w'], jnp.tanh))
