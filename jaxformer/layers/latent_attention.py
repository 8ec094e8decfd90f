"""Multi-head latent attention, whose state is one short vector per position for all heads."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.layers.position import AttentionPosition, Rotary
from jaxformer.ops.attention import Mask
from jaxformer.ops.documents import count_starts
from jaxformer.ops.latent_attention import latent_attention
from jaxformer.ops.masks import cache_mask
from jaxformer.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentState:
  """The cache of latents.

  Attributes:
    cache: latent and rotated shared key, C = R + P; position n is in slot n mod S, where S is the
      longest sequence.
    length: number of positions seen so far, the same for all rows.
    offset_B: how many of them belong to the row's current document.
  """

  cache_BSC: Float[Array, 'B S C']
  length: Int[Array, '']
  offset_B: Int[Array, ' B']


class LatentAttention(Layer):
  """y = softmax([q, rot(r)] [k, rot(x W_kr)]^T / sqrt(N + P)) v W_o over heads, with k, v = c W_ukv
  of the latent c = norm(x W_dkv), and q, r = norm(x W_dq) W_uq (DeepSeek-AI 2024, DeepSeek-V2,
  section 2.1.2-2.1.3).

  All heads share c and the rotated key rot(x W_kr), which are the state: `kv_rank` +
  `rope_head_dim` numbers per position. Training expands them to keys and values of all heads;
  decoding multiplies queries and outputs by W_ukv instead (`ops.latent_attention`)."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: H.
      head_dim: N, the channels of a query that are compared with those of a key of the latent.
      rope_head_dim: P, the channels that are compared with the shared key.
      v_head_dim: V, the channels of a value.
      kv_rank: R, the width of the latent.
      q_rank: the width of the queries' latent; None for queries x W_q.
      position: rotates the last P channels of queries, and the shared key; None for none.
      latent_norm: of both latents.
      bias: whether the projections from and to the residual stream have biases, but not x W_q.
      scale: factor on the logits; None for 1 / sqrt(head_dim + rope_head_dim).
      attention_dropout: rate at which attention weights are dropped, which then are all in memory.
      init: of the projections; `out_init`: of the output projection.
    """

    heads: int = 4
    head_dim: int = 16
    rope_head_dim: int = 8
    v_head_dim: int = 16
    kv_rank: int = 32
    q_rank: int | None = None
    position: AttentionPosition | None = Rotary(interleaved=True)
    latent_norm: NormConfig = RMSNorm(eps=1e-6)
    bias: bool = False
    scale: float | None = None
    attention_dropout: float = 0.0
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('heads', 'head_dim', 'rope_head_dim', 'v_head_dim', 'kv_rank', 'q_rank')
      self.require_rate('attention_dropout')
      if self.position is not None:
        self.position.check(self.rope_head_dim, 'LatentAttention.rope_head_dim')
        bias = self.position.slopes(self.heads) is not None
        self.require(not bias, 'position', 'one that rotates, or none')

    @property
    def query_size(self) -> int:
      """N + P, the channels of a query."""
      return self.head_dim + self.rope_head_dim

    def resolved(self, width: int) -> LatentAttention.Config:
      return self.replace(scale=self.scale or 1.0 / math.sqrt(self.query_size))

    @classmethod
    def examples(cls):
      return (
        cls(q_rank=12),
        cls(v_head_dim=24, rope_head_dim=6, bias=True, attention_dropout=0.1),
        cls(q_rank=8, rope_head_dim=5, bias=True, position=None, scale=0.5),
      )

    def mixing_flops_per_token(self, width, length, causal):
      seen = (length + 1) / 2 if causal else length
      return 2.0 * self.heads * (self.query_size + self.v_head_dim) * seen

  def __init__(
    self, config: LatentAttention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition
  ):
    c, self.config = config, config
    H, R = c.heads, c.kv_rank
    dense = functools.partial(Dense, rngs=rngs, position=position)
    # The matrices from a latent are large: 'embed' shards them as it does those from the residual
    # stream.
    low_rank = c.q_rank is not None
    self.q_down = (
      dense(c.init, (width, c.q_rank), ('embed', 'state'), bias=c.bias) if low_rank else None
    )
    self.q_norm = c.latent_norm.build(c.q_rank) if low_rank else None
    self.q = dense(c.init, (c.q_rank or width, H * c.query_size), ('embed', 'heads'))
    self.kv_down = dense(c.init, (width, R + c.rope_head_dim), ('embed', 'state'), bias=c.bias)
    self.kv_norm = c.latent_norm.build(R)
    self.kv_up = dense(c.init, (R, H * (c.head_dim + c.v_head_dim)), ('embed', 'heads'))
    self.o = dense(c.out_init, (H * c.v_head_dim, width), ('heads', 'embed'), bias=c.bias)

  def init_state(self, batch, max_len, memory=None) -> LatentState:
    size = self.config.kv_rank + self.config.rope_head_dim
    empty = jnp.zeros((batch, max_len, size), self.kv_down.dtype)
    return LatentState(empty, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: LatentState | None = None
  ) -> Output:
    c, starts, mask = self.config, ctx.starts(x_BTD), None
    positions = ctx.positions(x_BTD, None if state is None else state.offset_B)
    q, entries = self._queries(x_BTD, positions), self._entries(x_BTD, positions)
    seen = entries
    if state is not None:
      state, mask = _extend(state, entries, starts, positions)
      seen = state.cache_BSC
    if mask is None or ctx.fresh:
      segments_BT = None if ctx.segments_BT is None else count_starts(starts)
      seen, mask = entries, Mask(True, None, segments_BT)
    y = latent_attention(
      q,
      seen.astype(q.dtype),
      self.kv_up.kernel[...],
      mask,
      value_dim=c.v_head_dim,
      scale=c.scale or 1.0 / math.sqrt(c.query_size),
      dropout=c.attention_dropout,
      dropout_key=ctx.fold(0).dropout_key,
    )
    y = checkpoint_name(y.reshape(*y.shape[:2], -1), 'attention')
    return Output(self.o(y), state)

  def _queries(self, x_BTD: Array, positions: Array) -> Float[Array, 'B T H K']:
    """[q, rot(r)] of each head."""
    c = self.config
    if self.q_down is not None and self.q_norm is not None:
      x_BTD = self.q_norm(self.q_down(x_BTD))
    q = by_head(self.q(x_BTD), c.query_size)
    if c.position is None:
      return q
    rotated = c.position.rotate(q[..., c.head_dim :], positions)
    return jnp.concatenate([q[..., : c.head_dim], rotated], axis=-1)

  def _entries(self, x_BTD: Array, positions: Array) -> Float[Array, 'B T C']:
    """[c, rot(x W_kr)] of each position."""
    c, down = self.config, self.kv_down(x_BTD)
    latent, key = self.kv_norm(down[..., : c.kv_rank]), down[..., c.kv_rank :]
    if c.position is not None:
      key = c.position.rotate(key[:, :, None], positions)[:, :, 0]
    return shard(jnp.concatenate([latent, key], axis=-1), 'batch', 'time', None)


def _extend(
  state: LatentState, entries_BTC: Array, starts: Array, positions: Array
) -> tuple[LatentState, Mask]:
  """Add T positions to the cache. Return the new state, and the mask of the T queries on it."""
  T, S, n = starts.shape[1], state.cache_BSC.shape[1], state.length
  last = n + T - 1
  slots = jnp.arange(S, dtype=jnp.int32)
  index_S = last - (last - slots) % S  # the last position that maps to each slot
  new = entries_BTC.astype(state.cache_BSC.dtype)
  cache = jax.lax.dynamic_update_slice(state.cache_BSC, new, (0, n % S, 0))
  mask = cache_mask(n, state.offset_B, starts, index_S)
  return LatentState(shard(cache, 'batch', None, None), n + T, positions[:, -1] + 1), mask
