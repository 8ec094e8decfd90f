"""RWKV-5.2 "Eagle" (Peng et al. 2024, section 4.1): time mixing whose state is a matrix per head.
Its channel mixing is RWKV-4's.

Initializations and learning rates are those of the official training code (RWKV-LM, RWKV-v5,
`x052`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import by_head
from jaxformer.layers.init import Init, Orthogonal, Zeros
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.norm import HeadNorm
from jaxformer.layers.rwkv import (
  TimeMixState,
  decay_ramp,
  depth,
  head_norm,
  keep,
  projections,
  ramp,
  shifted,
  vector,
  zigzag,
)
from jaxformer.ops.wkv6 import wkv6
from jaxformer.sharding import shard


class TimeMix5(Layer):
  """S_t = diag(w) S_{t-1} + k_t v_t^T, y_t = (norm(r_t^T (S_{t-1} + diag(u) k_t v_t^T)) * g) W_o
  over heads, with a decay w per channel (Peng et al. 2024, section 4.1).

  With x'_z = mix_z x + (1 - mix_z) shift(x) for each z below, and heads of K channels:

    r, k, v, g = x'_r W_r, x'_k W_k, x'_v W_v, silu(x'_g W_g)
    w = exp(-exp(decay)), u = bonus, per channel

  The norm is over each head. `decay` has twice the learning rate.
  """

  class Config(LayerConfig):
    """
    Attributes:
      head_dim: channels of a head; they divide the width.
      norm: of the heads' outputs. The official one has eps 1e-5 after a division by 8, which is
        64e-5 without it.
      init: of W_r and W_v; `key_init`: of W_k and W_g; `out_init`: of W_o.
    """

    head_dim: int = 64
    norm: HeadNorm = HeadNorm(eps=64e-5)
    init: Init = Orthogonal(wide=False)
    key_init: Init = Orthogonal(gain=0.1, wide=False)
    out_init: Init = Zeros()

    def validate(self):
      self.require(self.head_dim > 1, 'head_dim', 'at least 2')

    @classmethod
    def examples(cls):
      return (cls(head_dim=8, norm=HeadNorm(eps=1e-3)),)

    def mixing_flops_per_token(self, width, length, causal):
      # r^T S and + k v^T are 2 each and the decay 1, per element of the state; r u k summed and
      # times v are 5 per channel
      return 5.0 * width * self.head_dim + 5.0 * width

  def __init__(self, config: TimeMix5.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D, deep = config, width, depth(position)[0]
    c.quotient(D, 'head_dim')
    self.width, self.head_dim = D, c.head_dim
    self.bonus = vector(
      deep * (1.0 - jnp.arange(D) / (D - 1)) + 0.1 * zigzag(D), full_precision=True
    )
    inits = c.init, c.key_init, c.init, c.key_init
    self.r, self.k, self.v, self.g, self.o = projections(D, inits, c.out_init, rngs, position)
    self.norm = head_norm(c.norm, D, position)
    self._init_mixing(c, -6.0 + 5.0 * decay_ramp(D, deep), rngs, position)

  def _init_mixing(
    self, config: Any, decay_D: Array, rngs: nnx.Rngs, position: LayerPosition
  ) -> None:
    """Make the parameters of the mixing of tokens and of the decay, which starts at `decay_D` =
    log(-log w)."""
    D, (deep, shallow) = self.width, depth(position)
    self.mix_r, self.mix_g = (vector(ramp(D, 0.5 * shallow)) for _ in range(2))
    self.mix_k, self.mix_v = vector(ramp(D, shallow)), vector(ramp(D, shallow) + 0.3 * deep)
    self.decay = vector(decay_D, lr_scale=2.0, full_precision=True)

  def _mixed(self, x_BTD: Array, before_BTD: Array) -> tuple[dict[str, Array], Array]:
    """x'_z by the letter z, and log w in fp32, `[#B, #T, D]`."""
    mixes = {'r': self.mix_r, 'k': self.mix_k, 'v': self.mix_v, 'g': self.mix_g}
    log_decay = -jnp.exp(self.decay[...].astype(jnp.float32))[None, None]
    return {z: keep(x_BTD, before_BTD, mix) for z, mix in mixes.items()}, log_decay

  def init_state(self, batch, max_len, memory=None) -> TimeMixState:
    D, K = self.width, self.head_dim
    last_BD = jnp.zeros((batch, D), self.r.dtype)
    return TimeMixState(last_BD, jnp.zeros((batch, D // K, K, K), jnp.float32))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: TimeMixState | None = None
  ) -> Output:
    last_BD, heads = (None, None) if state is None else (state.last_BD, state.carried)
    mixed, log_decay = self._mixed(x_BTD, shifted(x_BTD, ctx, last_BD))

    r, k, v = (
      by_head(dense(mixed[z]), self.head_dim)
      for z, dense in (('r', self.r), ('k', self.k), ('v', self.v))
    )
    log_decay = log_decay.reshape(*log_decay.shape[:2], *r.shape[2:])
    bonus = self.bonus[...].reshape(r.shape[2:])
    starts = ctx.starts(x_BTD)
    y, heads = wkv6(r, k, v, log_decay, bonus, heads, starts)
    y = checkpoint_name(self.norm(y) * jax.nn.silu(self.g(mixed['g'])), 'attention')
    if state is not None:
      state = state.after(x_BTD, shard(heads, 'batch', 'heads', None, None))
    return Output(self.o(y), state)
