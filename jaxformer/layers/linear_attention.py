"""What layers of linear attention share: projections of heads, a norm of each head's output and a
gate."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Layer, LayerConfig, LayerPosition
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.ops.linear_attention import linear_attention
from jaxformer.sharding import shard


class LinearAttentionConfig(LayerConfig, abstract=True):
  """Base of the configs of linear attention with a state [K, V] per head.

  Attributes:
    heads: H.
    expand_k: channels of the keys of all heads, as a multiple of the width; `expand_v`: of the
      values.
    norm: of each head's output, with one scale for all heads.
    init: of the projections in; `out_init`: of the projection out.
  """

  heads: int = 4
  expand_k: float = 1.0
  expand_v: float = 1.0
  norm: NormConfig = RMSNorm()
  init: Init = Normal()
  out_init: Init = Normal()

  rotates: ClassVar[bool] = False  # whether keys are rotated, in pairs of channels

  def validate(self):
    self.require_positive('heads', 'expand_k', 'expand_v')

  def head_sizes(self, width: int) -> tuple[int, int]:
    """K and V, from the width."""
    sizes = {name: getattr(self, name) * width / self.heads for name in ('expand_k', 'expand_v')}
    for name, size in sizes.items():
      problem = f'such that {name} x width = {width} fills {self.heads} heads'
      self.require(size >= 1 and size == int(size), name, problem)
    K, V = map(int, sizes.values())
    self.require(not (self.rotates and K % 2), 'expand_k', 'such that keys have an even dimension')
    return K, V

  def mixing_flops_per_token(self, width, length, causal):
    # decay 1, + k v and q S 2 each, per element of the state
    K, V = self.head_sizes(width)
    return 5.0 * self.heads * K * V


class LinearAttention(Layer):
  """Base of layers whose heads decay, update and read a state: y = (norm(q_t S_t) * silu(x_t W_g))
  W_o with q, k, v = x W_q, x W_k, x W_v. A subclass says how the state decays."""

  def __init__(
    self, config: LinearAttentionConfig, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, H, (K, V) = config, config.heads, config.head_sizes(width)
    self.config, self.head_sizes = c, (K, V)
    dense = functools.partial(Dense, rngs=rngs, position=position)
    self.q = dense(c.init, (width, H * K), ('embed', 'heads'))
    self.k = dense(c.init, (width, H * K), ('embed', 'heads'))
    self.v = dense(c.init, (width, H * V), ('embed', 'heads'))
    self.g = dense(c.init, (width, H * V), ('embed', 'heads'))
    self.norm = c.norm.build(V)
    self.o = dense(c.out_init, (H * V, width), ('heads', 'embed'))

  def empty_state(self, batch: int) -> Float[Array, 'B H K V']:
    return jnp.zeros((batch, self.config.heads, *self.head_sizes), jnp.float32)

  def qkv(self, x_BTD: Array) -> tuple[Array, Array, Array]:
    """q, k and v by head."""
    K, V = self.head_sizes
    return by_head(self.q(x_BTD), K), by_head(self.k(x_BTD), K), by_head(self.v(x_BTD), V)

  def attend(
    self,
    x_BTD: Array,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    state: Array | None,
    starts_BT: Array,
  ) -> tuple[Array, Array]:
    """The layer's output, with q scaled by K^(-1/2), and the state after the last token."""
    scaled = q * jnp.asarray(1.0 / math.sqrt(q.shape[-1]), q.dtype)
    y, state = linear_attention(scaled, k, v, log_decay, state, starts_BT)
    y = self.norm(y).reshape(*y.shape[:2], -1)
    y = checkpoint_name(y * jax.nn.silu(self.g(x_BTD)), 'attention')
    return self.o(y), shard(state, 'batch', 'heads', None, None)
