"""Lightning attention (MiniMax 2025; Qin et al. 2024): linear attention with decays that are fixed
by head and depth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import CommonConfig, Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mlp import ACTIVATIONS, ActivationName
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.ops.linear_attention import linear_attention
from jaxformer.sharding import shard

SLOPES = 'lightning_slopes'
_EPS = 1e-5  # of the authors' code, for stacks of one block and for the last block


class Slopes(nnx.Module):
  """m_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1)) for heads h = 0, 1, ... in block l of L: as in
  ALiBi, and slower in higher blocks. No parameters."""

  class Config(CommonConfig):
    heads: int

    def build(self, width: int, depth: int, rngs: nnx.Rngs) -> Slopes:
      return Slopes(self.heads, depth)

  def __init__(self, heads: int, depth: int):
    self.heads, self.depth = heads, depth

  def __call__(self, index: int | Array) -> Float[Array, ' H']:
    """Return the slopes of block `index`."""
    slopes_H = 2.0 ** (-8.0 * (jnp.arange(self.heads, dtype=jnp.float32) + 1.0) / self.heads)
    height = jnp.asarray(index, jnp.float32) / (self.depth - 1 + _EPS)
    return slopes_H * (1.0 - height + _EPS)


class LightningAttention(Layer):
  """S_t = exp(-m_h) S_{t-1} + k_t v_t^T, y_t = (norm(q_t^T S_t) * sigmoid(x_t W_g)) W_o over heads
  h, with [q, k, v] = silu(x W_qkv) and slopes m_h fixed by head and depth (MiniMax 2025, section
  2.2).

  The norm is over all heads; q is not scaled."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: H.
      head_dim: channels K of a head; None for width / heads.
      activation: on q, k and v.
      norm: of the output of all heads.
      init: of the projections in; `out_init`: of the projection out.
    """

    heads: int = 4
    head_dim: int | None = None
    activation: ActivationName = 'silu'
    norm: NormConfig = RMSNorm(eps=1e-6)
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('heads', 'head_dim')

    def head_size(self, width: int) -> int:
      """K, derived from the width if `head_dim` is None."""
      return self.head_dim or self.quotient(width, 'heads', 'width')

    def resolved(self, width: int) -> LightningAttention.Config:
      return self.replace(head_dim=self.head_size(width))

    def common(self, width):
      return {SLOPES: Slopes.Config(heads=self.heads)}

    @classmethod
    def examples(cls):
      return cls(heads=4), cls(heads=3, head_dim=6, activation='relu', norm=RMSNorm(eps=1e-3))

    def mixing_flops_per_token(self, width, length, causal):
      # decay 1, + k v and q S 2 each, per element of the state
      return 5.0 * self.heads * self.head_size(width) ** 2

  def __init__(
    self, config: LightningAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, H, K = config, config.heads, config.head_size(width)
    self.config, self.head_dim = c, K
    dense = functools.partial(Dense, rngs=rngs, position=position)
    # q, k and v of one head side by side, and the heads one after the other
    self.qkv = dense(c.init, (width, H * 3 * K), ('embed', 'heads'))
    self.g = dense(c.init, (width, H * K), ('embed', 'heads'))
    self.norm = c.norm.build(H * K)
    self.out = dense(c.out_init, (H * K, width), ('heads', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B H K V']:
    K = self.head_dim
    return jnp.zeros((batch, self.config.heads, K, K), jnp.float32)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    qkv = ACTIVATIONS[self.config.activation](by_head(self.qkv(x_BTD), 3 * self.head_dim))
    q, k, v = jnp.split(qkv, 3, axis=-1)
    log_decay = -self.common[SLOPES](self.index).reshape(1, 1, -1, 1)
    y, after = linear_attention(q, k, v, log_decay, state, ctx.starts(x_BTD))
    y = self.norm(y.reshape(*y.shape[:2], -1))
    y = checkpoint_name(y * jax.nn.sigmoid(self.g(x_BTD)), 'attention')
    after = shard(after, 'batch', 'heads', None, None)
    return Output(self.out(y), None if state is None else after)
