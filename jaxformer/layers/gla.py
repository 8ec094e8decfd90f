"""Gated linear attention (GLA; Yang et al. 2024): a decay per key channel that depends on the
token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.layer import Context, LayerPosition, Output
from jaxformer.layers.linear_attention import LinearAttention, LinearAttentionConfig
from jaxformer.layers.norm import LayerNorm


class GatedLinearAttention(LinearAttention):
  """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = (norm(q_t^T S_t) * silu(x_t W_g)) W_o over heads,
  with a_t = sigmoid(x_t A B + b)^(1 / tau) per key channel (Yang et al. 2024, section 4.4).

  q is scaled by K^(-1/2)."""

  class Config(LinearAttentionConfig):
    """
    Attributes:
      decay_rank: rank of A B.
      temperature: tau; the larger, the slower all states decay.
    """

    expand_k: float = 0.5
    decay_rank: int = 16
    temperature: float = 16.0

    def validate(self):
      super().validate()
      self.require_positive('decay_rank', 'temperature')

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, decay_rank=4),
        cls(heads=2, expand_k=1.0, expand_v=1.5, temperature=0.5, norm=LayerNorm(eps=1e-3)),
      )

  def __init__(
    self, config: GatedLinearAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    super().__init__(config, width, rngs, position)
    c, K = config, config.heads * self.head_sizes[0]
    dense = functools.partial(Dense, c.init, rngs=rngs, position=position)
    self.decay_a = dense((width, c.decay_rank), ('embed', 'state'))
    self.decay_b = dense((c.decay_rank, K), ('state', 'heads'), bias=True)
    self.temperature = c.temperature

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B H K V']:
    return self.empty_state(batch)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    q, k, v = self.qkv(x_BTD)
    logit = by_head(self.decay_b(self.decay_a(x_BTD)), self.head_sizes[0])
    log_decay = jax.nn.log_sigmoid(logit.astype(jnp.float32)) / self.temperature
    y, after = self.attend(x_BTD, q, k, v, log_decay, state, ctx.starts(x_BTD))
    return Output(y, None if state is None else after)
