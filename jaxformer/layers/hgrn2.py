"""HGRN2 (Qin et al. 2024): linear attention whose keys are what the decays leave over, with lower
bounds of the decays that rise over depth."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import CommonConfig, Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.ops.linear_attention import linear_attention
from jaxformer.sharding import param, shard

BOUNDS = 'lower_bounds'
_LARGEST = 80.0  # of the logits; exp(-80) is above the least number of fp32


class LowerBounds(nnx.Module):
  """b_l = sum over 0 < j <= l of softmax(logits)_j, over the blocks l = 0, 1, ... of a stack, per
  channel (Qin et al. 2023, HGRN, section 3.2): from 0 at the bottom to almost 1 at the top."""

  class Config(CommonConfig):
    def build(self, width: int, depth: int, rngs: nnx.Rngs) -> LowerBounds:
      return LowerBounds(width, depth)

  def __init__(self, width: int, depth: int):
    self.logits = param(
      jnp.zeros((depth, width)), (None, 'heads'), decay=False, full_precision=True, matmul=False
    )

  def __call__(self, index: int | Array) -> Float[Array, ' D']:
    """Return the bounds of block `index`."""
    share_LD = jax.nn.softmax(self.logits[...].astype(jnp.float32), axis=0)
    depth = jnp.arange(share_LD.shape[0]).reshape(-1, 1)
    return jnp.sum(jnp.where((depth > 0) & (depth <= index), share_LD, 0.0), axis=0)


def bounded_log_sigmoid(z: Array, bound: Array) -> Array:
  """log(b + (1 - b) sigmoid(z)) to full relative precision, for bounds b from 0 to 1. z counts as
  between -80 and 80, so that no exp of it is 0."""
  z = jnp.clip(z, -_LARGEST, _LARGEST)
  e = jnp.exp(-jnp.abs(z))
  lost = (1.0 - bound) * jax.nn.sigmoid(-z)
  # the second is for z < 0 alone
  return jnp.where(
    lost < 0.5, jnp.log1p(-jnp.minimum(lost, 0.5)), jnp.log(e + bound) - jnp.log1p(e)
  )


class Hgrn2(Layer):
  """S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, y_t = norm(q_t^T S_t) W_o over heads, with
  q = silu(x W_q), v = x W_v, f = b_l + (1 - b_l) sigmoid(x W_f) (Qin et al. 2024, section 3.2).

  The bounds b_l of all layers l of a stack are one module (`LowerBounds`). q is scaled by K^(-1/2),
  and the norm is over all heads."""

  class Config(LayerConfig):
    """
    Attributes:
      head_dim: channels K of a head, of keys and values: the expansion ratio.
      norm: of the output of all heads.
      init: of the projections in; `out_init`: of the projection out.
    """

    head_dim: int = 128
    norm: NormConfig = RMSNorm()
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('head_dim')

    def common(self, width):
      return {BOUNDS: LowerBounds.Config()}

    @classmethod
    def examples(cls):
      return (cls(head_dim=8, norm=RMSNorm(eps=1e-3)),)

    def mixing_flops_per_token(self, width, length, causal):
      # decay 1, + k v and q S 2 each, per element of the state
      return 5.0 * width * self.head_dim

  def __init__(self, config: Hgrn2.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c = config
    c.quotient(width, 'head_dim')
    self.head_dim, self.width = c.head_dim, width
    dense = functools.partial(Dense, shape=(width, width), rngs=rngs, position=position)
    self.q, self.f, self.v = (dense(c.init, axes=('embed', 'heads')) for _ in range(3))
    self.norm = c.norm.build(width)
    self.o = dense(c.out_init, axes=('heads', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B H K V']:
    K = self.head_dim
    return jnp.zeros((batch, self.width // K, K, K), jnp.float32)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    bound = self.common[BOUNDS](self.index).reshape(-1, self.head_dim)[None, None]
    q, z, v = (by_head(dense(x_BTD), self.head_dim) for dense in (self.q, self.f, self.v))
    z = z.astype(jnp.float32)
    k = ((1.0 - bound) * jax.nn.sigmoid(-z)).astype(v.dtype)
    q = jax.nn.silu(q) * jnp.asarray(1.0 / math.sqrt(self.head_dim), q.dtype)
    y, after = linear_attention(q, k, v, bounded_log_sigmoid(z, bound), state, ctx.starts(x_BTD))
    y = checkpoint_name(self.norm(y.reshape(*y.shape[:2], -1)), 'attention')
    after = shard(after, 'batch', 'heads', None, None)
    return Output(self.o(y), None if state is None else after)
