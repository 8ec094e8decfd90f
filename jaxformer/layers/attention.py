"""Multi-head, grouped-query and multi-query self-attention, with a key/value cache as its state."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import NormConfig, RMSNorm, build_norm
from jaxformer.layers.position import (
  Alibi,
  AttentionPosition,
  Llama3Scaling,
  LogTemperature,
  Rotary,
  YarnScaling,
)
from jaxformer.ops.attention import Mask, attention
from jaxformer.ops.documents import count_starts
from jaxformer.ops.masks import cache_mask
from jaxformer.sharding import param, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionState:
  """The key/value cache.

  Attributes:
    k, v: position n is in slot n mod S, where S is the longest sequence, or the window or chunk if
      there is one; C is the head dim of the values.
    length: number of positions seen so far, the same for all rows.
    offset_B: how many of them belong to the row's current document.
  """

  k_BSGK: Float[Array, 'B S G K']
  v_BSGC: Float[Array, 'B S G C']
  length: Int[Array, '']
  offset_B: Int[Array, ' B']


class Attention(Layer):
  """y = softmax(q k^T / sqrt(K) + position bias) v W_o over heads, with q, k, v = x W_q, x W_k, x
  W_v (Vaswani et al. 2017, section 3.2).

  `kv_heads` < `heads` is grouped-query attention (Ainslie et al. 2023), 1 is multi-query (Shazeer
  2019): query head h reads key/value head h // (heads / kv_heads). With `output_gate`, y =
  (softmax(...) v * sigmoid(x W_g)) W_o (Qiu et al. 2025, "Gated attention for large language
  models"; Qwen3-Next)."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: query heads.
      kv_heads: key/value heads; None for one per query head.
      head_dim: None for width / heads.
      v_head_dim: of the values; None for that of queries and keys.
      out_size: width of the output; None for that of the input.
      position: `Rotary`, `Alibi` or `LogTemperature`; None where positions are embedded elsewhere
        or not at all.
      causal: False lets every position attend to every other, which excludes decoding.
      window: sliding window: a query attends to itself and the window - 1 positions before it;
        None for all.
      chunk: a document is cut into chunks of so many positions, and a query attends to itself and
        the positions before it in its chunk (Llama 4); None for no chunks.
      bias: whether the projections have biases (GPT-2).
      out_bias: whether the output projection has one; None for as `bias` says (Qwen2 has biases on
        queries, keys and values alone).
      qk_norm: norm of queries and keys (Henry et al. 2020; Llama-style models use RMSNorm); None
        for none.
      qk_norm_over: what is normalized: the channels of each head, or of all heads together (OLMo
        2).
      output_gate: whether a sigmoid of another projection of the input, `gate`, multiplies the
        heads' outputs.
      sinks: whether each head has a trained logit, `sink`, that takes part in the softmax with a
        value of 0: a head can attend to nothing (gpt-oss).
      softcap: logits become c tanh(logits / c) (Gemma 2); None for none.
      scale: factor on the logits; None for 1 / sqrt(head_dim).
      attention_dropout: rate at which attention weights are dropped (GPT-2's `attn_pdrop`), which
        then are all in memory.
      init: of the query, key and value projections; `out_init`: of the output projection.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    out_size: int | None = None
    position: AttentionPosition | None = None
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    bias: bool = False
    out_bias: bool | None = None
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal['head', 'width'] = 'head'
    output_gate: bool = False
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    attention_dropout: float = 0.0
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('heads', 'head_dim', 'v_head_dim', 'out_size')
      self.require_positive('window', 'chunk', 'softcap')
      self.require_rate('attention_dropout')
      divides = self.kv_heads is None or (self.kv_heads > 0 and self.heads % self.kv_heads == 0)
      self.require(divides, 'kv_heads', f'a divisor of heads = {self.heads}')
      alone = self.chunk is None or (self.causal and self.window is None)
      self.require(alone, 'chunk', 'none with a window, or where attention is not causal')
      normed = self.qk_norm is not None or self.qk_norm_over == 'head'
      self.require(normed, 'qk_norm_over', "'head' without a qk_norm")

    def head_size(self, width: int) -> int:
      """K, derived from the width if `head_dim` is None."""
      size = self.head_dim or self.quotient(width, 'heads', 'width')
      if self.position is not None:
        self.position.check(size, 'Attention.head_dim')
      return size

    def resolved(self, width: int) -> Attention.Config:
      K = self.head_size(width)
      return self.replace(
        kv_heads=self.kv_heads or self.heads,
        head_dim=K,
        v_head_dim=self.v_head_dim or K,
        out_bias=self.bias if self.out_bias is None else self.out_bias,
        scale=self.scale or 1.0 / math.sqrt(K),
      )

    def out_width(self, width: int) -> int:
      return self.out_size or width

    @property
    def decodes(self) -> bool:
      return self.causal

    @property
    def reach(self) -> int | None:
      """The most positions that a query attends to; None for all."""
      return self.window if self.chunk is None else self.chunk

    @classmethod
    def examples(cls):
      return (
        cls(heads=4),
        cls(heads=4, kv_heads=2, position=Rotary(), bias=True, attention_dropout=0.1),
        cls(
          heads=4,
          kv_heads=1,
          head_dim=16,
          position=Rotary(theta=100.0, scaling=Llama3Scaling(original_context=16)),
          qk_norm=RMSNorm(),
        ),
        cls(heads=4, kv_heads=2, window=5, position=Rotary(), sinks=True, softcap=5.0),
        cls(
          heads=4,
          kv_heads=2,
          v_head_dim=12,
          position=Rotary(fraction=0.5, interleaved=True, scaling=YarnScaling(original_context=16)),
          bias=True,
          out_bias=False,
          qk_norm=RMSNorm(unit_offset=True),
          qk_norm_over='width',
          output_gate=True,
        ),
        cls(heads=4, chunk=5, position=LogTemperature(interval=4), qk_norm=RMSNorm(scale=False)),
        cls(heads=6, head_dim=8, kv_heads=6, out_size=24, position=Alibi(), scale=0.2),
        cls(heads=4, causal=False),
        cls(heads=4, causal=False, window=4, position=Alibi()),
      )

    def mixing_flops_per_token(self, width, length, causal):
      seen = length if self.reach is None else min(self.reach, length)
      if causal and self.chunk is not None:
        chunks, rest = divmod(length, seen)
        seen = (chunks * seen * (seen + 1) + rest * (rest + 1)) / 2 / length
      elif causal and self.causal:
        # the first queries attend to fewer keys
        seen = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
      K = self.head_size(width)
      return 2.0 * self.heads * (K + (self.v_head_dim or K)) * seen

  def __init__(self, config: Attention.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, K = config, config.head_size(width)
    H, G, C = c.heads, c.kv_heads or c.heads, c.v_head_dim or K
    self.config, self.head_dim, self.v_head_dim, self.kv_heads = c, K, C, G
    dense = functools.partial(Dense, rngs=rngs, position=position)
    self.q = dense(c.init, (width, H * K), ('embed', 'heads'), bias=c.bias)
    self.k = dense(c.init, (width, G * K), ('embed', 'kv_heads'), bias=c.bias)
    self.v = dense(c.init, (width, G * C), ('embed', 'kv_heads'), bias=c.bias)
    out_bias = c.bias if c.out_bias is None else c.out_bias
    self.o = dense(c.out_init, (H * C, c.out_width(width)), ('heads', 'embed'), bias=out_bias)
    self.gate = (
      dense(c.init, (width, H * C), ('embed', 'heads'), bias=c.bias) if c.output_gate else None
    )
    sink = c.init(rngs.params(), (H,), width, position) if c.sinks else None
    self.sink = None if sink is None else param(sink, ('heads',), decay=False, full_precision=True)
    every_head = c.qk_norm_over == 'width'
    self.q_norm = build_norm(c.qk_norm, H * K if every_head else K)
    self.k_norm = build_norm(c.qk_norm, G * K if every_head else K)

  def init_state(self, batch, max_len, memory=None) -> AttentionState:
    S = max_len if self.config.reach is None else min(self.config.reach, max_len)
    k, v = (
      jnp.zeros((batch, S, self.kv_heads, size), self.k.dtype)
      for size in (self.head_dim, self.v_head_dim)
    )
    return AttentionState(k, v, jnp.zeros((), jnp.int32), jnp.zeros((batch,), jnp.int32))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: AttentionState | None = None
  ) -> Output:
    starts = ctx.starts(x_BTD)
    positions = ctx.positions(x_BTD, None if state is None else state.offset_B)
    q, k, v = self._qkv(x_BTD, positions)
    c, mask, one = self.config, None, ctx.segments_BT is None
    if c.chunk is not None:
      # To the mask every chunk is a document. That it reaches no further than its length too lets
      # implementations skip what is always hidden.
      one = one and x_BTD.shape[1] <= c.chunk
      starts = starts | (positions % c.chunk == 0)
    if state is not None:
      state, k_seen, v_seen, mask = _extend(state, k, v, starts, positions, c)
    if mask is None or ctx.fresh:
      # Numbered by their borders: a number that recurs is another document, as it is for every
      # layer with a state.
      segments_BT = None if one else count_starts(starts)
      window = None if one and c.chunk is not None else c.reach
      k_seen, v_seen, mask = k, v, Mask(c.causal, window, segments_BT)
    slopes = None if c.position is None else c.position.slopes(c.heads)
    y = attention(
      q,
      k_seen,
      v_seen,
      mask,
      scale=1.0 / math.sqrt(self.head_dim) if c.scale is None else c.scale,
      softcap=c.softcap,
      slopes_H=None if slopes is None else jnp.asarray(slopes),
      sinks_H=None if self.sink is None else self.sink[...],
      dropout=c.attention_dropout,
      dropout_key=ctx.fold(0).dropout_key,
    )
    y = checkpoint_name(y.reshape(*y.shape[:2], -1), 'attention')
    if self.gate is not None:
      y = y * jax.nn.sigmoid(self.gate(x_BTD))
    return Output(self.o(y), state)

  def _qkv(self, x_BTD: Array, positions: Array) -> tuple[Array, Array, Array]:
    q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
    over = self.config.qk_norm_over
    if over == 'width':
      q, k = self._normed(q, k)
    q = by_head(q, self.head_dim)
    k, v = by_head(k, self.head_dim, 'kv_heads'), by_head(v, self.v_head_dim, 'kv_heads')
    if over == 'head':
      q, k = self._normed(q, k)
    if (encoding := self.config.position) is not None:
      q, k = encoding.rotate(q, positions), encoding.rotate(k, positions)
      q = encoding.scale_queries(q, positions)
    return q, k, v

  def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
    if self.q_norm is None or self.k_norm is None:
      return q, k
    return self.q_norm(q), self.k_norm(k)


def _extend(
  state: AttentionState,
  k_new: Array,
  v_new: Array,
  starts: Array,
  positions: Array,
  config: Attention.Config,
) -> tuple[AttentionState, Array, Array, Mask]:
  """Add T positions to the cache. Return the new state, and keys, values and mask for the T
  queries. `starts` are those of documents, or of their chunks."""
  window, T, S, n = config.reach, starts.shape[1], state.k_BSGK.shape[1], state.length
  slots = jnp.arange(S, dtype=jnp.int32)
  index_new = n + jnp.arange(T, dtype=jnp.int32)
  # what each slot held before: the last position that maps to it
  index_old = n - 1 - (n - 1 - slots) % S
  last = n + T - 1
  index_now = last - (last - slots) % S  # and what it holds after
  if window is None or T == 1:
    at = (0, n % S, 0, 0)
    k_all = jax.lax.dynamic_update_slice(state.k_BSGK, k_new.astype(state.k_BSGK.dtype), at)
    v_all = jax.lax.dynamic_update_slice(state.v_BSGC, v_new.astype(state.v_BSGC.dtype), at)
    k_kept, v_kept, index_S = k_all, v_all, index_now
  else:
    # The first queries still attend to positions that the last ones push out of the window:
    # concatenate old and new.
    k_all = jnp.concatenate([state.k_BSGK, k_new.astype(state.k_BSGK.dtype)], axis=1)
    v_all = jnp.concatenate([state.v_BSGC, v_new.astype(state.v_BSGC.dtype)], axis=1)
    source = jnp.where(index_now >= n, S + index_now - n, slots)
    k_kept, v_kept = jnp.take(k_all, source, axis=1), jnp.take(v_all, source, axis=1)
    index_S = jnp.concatenate([index_old, index_new])
  before_B = state.offset_B if config.chunk is None else state.offset_B % config.chunk
  mask = cache_mask(n, before_B, starts, index_S, window)
  kept = AttentionState(
    shard(k_kept, 'batch', None, 'kv_heads', None),
    shard(v_kept, 'batch', None, 'kv_heads', None),
    n + T,
    positions[:, -1] + 1,
  )
  return kept, k_all, v_all, mask
