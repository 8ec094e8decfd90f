"""RWKV-7 "Goose" (Peng et al. 2025, section 4 and appendix): time mixing with a generalized delta
rule. Its channel mixing is `rwkv.ChannelMix`.

Initializations are those of the official training code (RWKV-LM, RWKV-v7/train_temp/src/model.py):
the vectors and low-rank matrices of the modules, and the projections of `generate_init_weight`,
which draws them again after the modules have.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.dense import by_head
from jaxformer.layers.layer import Context, LayerPosition, Output
from jaxformer.layers.norm import HeadNorm
from jaxformer.layers.rwkv import (
  LowRank,
  TimeMixState,
  depth,
  head_norm,
  move,
  projections,
  ramp,
  shifted,
  vector,
)
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.ops.wkv7 import wkv7
from jaxformer.sharding import shard

FIRST_VALUES = 'rwkv7/first_values'  # the name under which the first time mixing shares its values


class TimeMix7(TimeMix5):
  """S_t = S_{t-1} (diag(w) - kappa (a kappa)^T) + v k^T, y_t = ((norm(S_t r) + (sum r k rho) v) *
  g) W_o over heads (Peng et al. 2025, section 4).

  With x'_z = x + (shift(x) - x) mix_z for each z below, and heads of K channels:

    r, k, v = x'_r W_r, x'_k W_k, x'_v W_v
    decay log w = -exp(-1/2) sigmoid(w_0 + tanh(x'_w A_w) B_w)
    rate a = sigmoid(a_0 + x'_a A_a B_a)
    gate g = sigmoid(x'_g A_g) B_g
    v += (v_first - v) sigmoid(v_0 + x'_v A_v B_v)
    removal key kappa = k * xi, normalized over each head;  then k *= 1 + (a - 1) alpha

  `v_first` are the values of the first time mixing in the stack, which shares them
  (`Context.shared`) and has no such mixing of its own."""

  class Config(TimeMix5.Config):
    """
    Attributes:
      decay_rank, rate_rank, gate_rank: rank R of A and B in w, a and g.
      value_rank: the same in the mixing of v; None for the first of the stack, which shares its
        values.
    """

    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int | None = 32
    gate_rank: int = 128

    def validate(self):
      super().validate()
      self.require_positive('decay_rank', 'rate_rank', 'value_rank', 'gate_rank')

    def reads(self, width: int) -> dict[str, int]:
      return {} if self.value_rank is None else {FIRST_VALUES: width}

    def mixing_flops_per_token(self, width, length, causal):
      # S a, + u b^T, + v k^T and S r are 2 each, the decay 1, per element of the state
      return 9.0 * width * self.head_dim

    @classmethod
    def examples(cls):
      return (
        cls(head_dim=8, decay_rank=4, value_rank=None, gate_rank=8),
        cls(head_dim=16, rate_rank=6, value_rank=5, norm=HeadNorm(eps=1e-3)),
      )

  def __init__(self, config: TimeMix7.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D, K = config, width, config.head_dim
    c.quotient(D, 'head_dim')
    self.config, self.width, self.head_dim = c, D, K
    deep, shallow = depth(position)
    self.mix_r, self.mix_w, self.mix_k = (
      vector(1.0 - ramp(D, e * shallow)) for e in (0.2, 0.9, 0.7)
    )
    self.mix_v, self.mix_a, self.mix_g = (
      vector(1.0 - ramp(D, e * shallow)) for e in (0.7, 0.9, 0.2)
    )
    place = jnp.arange(D) / (D - 1)
    line = place - 0.5
    zigzag = (jnp.arange(D) % K - (K - 1) / 2) / ((K - 1) / 2)  # within each head from -1 to 1
    zigzag = zigzag * jnp.abs(zigzag)
    self.decay = LowRank(
      D,
      c.decay_rank,
      rngs,
      position,
      -5.5 + 6.0 * place ** (1.0 + deep**0.3) + 2.5 * zigzag,
      lr_scale=2.0,
      full_precision=True,
    )
    self.rate = LowRank(D, c.rate_rank, rngs, position, -0.19 + 0.3 * zigzag + 0.4 * line)
    self.value = (
      None if c.value_rank is None else LowRank(D, c.value_rank, rngs, position, 0.73 - 0.4 * line)
    )
    self.gate = LowRank(D, c.gate_rank, rngs, position)
    self.xi, self.alpha = vector(0.71 - 0.1 * line), vector(jnp.full(D, 1.02))
    self.rho = vector(jnp.full(D, -0.04))
    inits = c.init, c.key_init, c.init
    self.r, self.k, self.v, self.o = projections(D, inits, c.out_init, rngs, position)
    self.norm = head_norm(c.norm, D, position)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: TimeMixState | None = None
  ) -> Output:
    K = self.head_dim
    last_BD, heads = (None, None) if state is None else (state.last_BD, state.carried)
    change = shifted(x_BTD, ctx, last_BD) - x_BTD

    def mixed(mix: nnx.Param) -> Array:
      return move(x_BTD, change, mix)

    def fp32(p: nnx.Param) -> Array:
      return p[...].astype(jnp.float32)[None, None]

    r, k = self.r(mixed(self.mix_r)), self.k(mixed(self.mix_k)).astype(jnp.float32)
    v = self._values(mixed(self.mix_v), ctx)
    log_decay = -math.exp(-0.5) * jax.nn.sigmoid(self.decay(mixed(self.mix_w), jnp.tanh))
    rate = jax.nn.sigmoid(self.rate(mixed(self.mix_a)))
    removal = by_head(k * fp32(self.xi), K)
    removal = removal * jax.lax.rsqrt(
      jnp.maximum(jnp.sum(jnp.square(removal), axis=-1, keepdims=True), 1e-24)
    )
    k = by_head(k * (1.0 + (rate - 1.0) * fp32(self.alpha)), K)
    r, values, rate, log_decay = (by_head(z, K) for z in (r, v, rate, log_decay))
    y, heads = wkv7(r, log_decay, k, values, -removal, rate * removal, heads, ctx.starts(x_BTD))
    rho = fp32(self.rho).reshape(1, 1, -1, K)
    bonus = jnp.sum(r.astype(jnp.float32) * k * rho, axis=-1, keepdims=True) * values.astype(
      jnp.float32
    )
    y = self.norm(y)
    y = y + bonus.astype(y.dtype).reshape(y.shape)
    y = checkpoint_name(y * self.gate(mixed(self.mix_g), jax.nn.sigmoid), 'attention')
    if state is not None:
      state = state.after(x_BTD, shard(heads, 'batch', 'heads', None, None))
    return Output(self.o(y), state, share={FIRST_VALUES: v} if self.value is None else {})

  def _values(self, x_BTD: Array, ctx: Context) -> Array:
    v = self.v(x_BTD)
    if self.value is None:
      return v
    if FIRST_VALUES not in ctx.shared:
      raise InputError(
        f'TimeMix7.value_rank = {self.config.value_rank}, but no earlier layer has shared its '
        'values: the first of a stack needs value_rank = None, in a group of its own'
      )
    return v + (ctx.shared[FIRST_VALUES] - v) * jax.nn.sigmoid(self.value(x_BTD)).astype(v.dtype)
