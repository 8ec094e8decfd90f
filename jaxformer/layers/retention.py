"""Retention (RetNet; Sun et al. 2023): linear attention with one fixed decay per head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.layers.layer import Context, Output
from jaxformer.layers.linear_attention import LinearAttention, LinearAttentionConfig
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import Rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetentionState:
  """The state of each head, and how many tokens of the current document precede, by row."""

  heads_BHKV: Float[Array, 'B H K V']
  offset_B: Int[Array, ' B']


class Retention(LinearAttention):
  """S_t = g_h S_{t-1} + k_t v_t^T, y_t = (norm(q_t^T S_t) * silu(x_t W_g)) W_o over heads h = 0, 1,
  ..., with decays g_h = 1 - 2^(-5 - h) and q, k rotated by position (Sun et al. 2023, eq. 6 to 8).

  q is scaled by K^(-1/2). The rotation is that of rotary embedding, without the growing scales of
  xPos, as in the paper."""

  class Config(LinearAttentionConfig):
    """
    Attributes:
      position: the rotation of queries and keys.
    """

    heads: int = 8
    expand_v: float = 2.0
    position: Rotary = Rotary()

    rotates: ClassVar[bool] = True

    @classmethod
    def examples(cls):
      return cls(heads=4), cls(heads=2, expand_k=0.5, expand_v=1.5, norm=LayerNorm(eps=1e-3))

    def log_decays(self) -> np.ndarray:
      """The logarithm of the decay of each head, float64."""
      return np.log1p(-(2.0 ** (-5.0 - np.arange(self.heads))))

  config: Config

  def init_state(self, batch, max_len, memory=None) -> RetentionState:
    return RetentionState(self.empty_state(batch), jnp.zeros((batch,), jnp.int32))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: RetentionState | None = None
  ) -> Output:
    heads, offset_B = (None, None) if state is None else (state.heads_BHKV, state.offset_B)
    positions = ctx.positions(x_BTD, offset_B)
    q, k, v = self.qkv(x_BTD)
    q, k = (self.config.position.rotate(z, positions) for z in (q, k))
    log_decay = jnp.asarray(self.config.log_decays(), jnp.float32).reshape(1, 1, -1, 1)
    y, heads = self.attend(x_BTD, q, k, v, log_decay, heads, ctx.starts(x_BTD))
    return Output(y, None if state is None else RetentionState(heads, positions[:, -1] + 1))
