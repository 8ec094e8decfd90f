"""RWKV-4 (Peng et al. 2023, section 3.1): time mixing by a weighted mean over all tokens so far.
Its channel mixing is `rwkv.ChannelMix`.

Initializations and learning rates are those of the official training code (RWKV-LM, RWKV-v4neo),
which decays no weight at all: `optimizer.weight_decay` 0. Here, as in RWKV-5 and later, matrices
have weight decay and vectors have none."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.init import Init, Orthogonal, Zeros
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.rwkv import (
  TimeMixState,
  decay_ramp,
  depth,
  keep,
  projections,
  ramp,
  shifted,
  vector,
  zigzag,
)
from jaxformer.ops.wkv4 import Wkv4State, wkv4
from jaxformer.sharding import shard


class TimeMix4(Layer):
  """y = (sigmoid(r) * wkv) W_o, where wkv_t is the mean of all v_i so far weighted with e^{-(t-1-i)
  w + k_i}, and of v_t with e^{u + k_t} (Peng et al. 2023, eq. 11-13, 16 and 17).

  With x'_z = mix_z x + (1 - mix_z) shift(x) for each z below:

    r, k, v = x'_r W_r, x'_k W_k, x'_v W_v         w = exp(decay) > 0, u = bonus, per channel

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t)
            / (sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t})

  `decay` and `bonus` have 2 and 3 times the learning rate.
  """

  class Config(LayerConfig):
    """
    Attributes:
      init: of W_v; `key_init`: of W_k and W_r; `out_init`: of W_o.
    """

    init: Init = Orthogonal()
    key_init: Init = Zeros()
    out_init: Init = Zeros()

    def mixing_flops_per_token(self, width, length, causal):
      # both sums twice, with u and for the next token: 3 each with v and 2 without; and the
      # quotient
      return 11.0 * width

  def __init__(self, config: TimeMix4.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D = config, width
    if D < 2:
      raise InputError('width', D, 'at least 2 for TimeMix4')
    self.width, (deep, shallow) = D, depth(position)
    self.mix_k, self.mix_v = vector(ramp(D, shallow)), vector(ramp(D, shallow) + 0.3 * deep)
    self.mix_r = vector(ramp(D, 0.5 * shallow))
    self.decay = vector(-5.0 + 8.0 * decay_ramp(D, deep), lr_scale=2.0, full_precision=True)
    self.bonus = vector(math.log(0.3) + 0.5 * zigzag(D), lr_scale=3.0, full_precision=True)
    inits = c.key_init, c.key_init, c.init
    self.r, self.k, self.v, self.o = projections(D, inits, c.out_init, rngs, position)

  def init_state(self, batch, max_len, memory=None) -> TimeMixState:
    last_BD = jnp.zeros((batch, self.width), self.r.dtype)
    sums = Wkv4State.empty(batch, self.width)
    return TimeMixState(last_BD, (sums.aa, sums.bb, sums.pp))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: TimeMixState | None = None
  ) -> Output:
    before, sums = (None, None) if state is None else (state.last_BD, Wkv4State(*state.carried))
    before = shifted(x_BTD, ctx, before)
    r, k, v = (
      shard(dense(keep(x_BTD, before, mix)), 'batch', 'time', 'heads')
      for mix, dense in ((self.mix_r, self.r), (self.mix_k, self.k), (self.mix_v, self.v))
    )
    w_D = jnp.exp(self.decay[...].astype(jnp.float32))
    starts = ctx.starts(x_BTD)
    y, sums = wkv4(k, v, w_D, self.bonus[...], sums, starts)
    y = checkpoint_name(jax.nn.sigmoid(r) * y, 'attention')
    if state is not None:
      carried = tuple(shard(s, 'batch', 'heads') for s in (sums.aa, sums.bb, sums.pp))
      state = state.after(x_BTD, carried)
    return Output(self.o(y), state)
