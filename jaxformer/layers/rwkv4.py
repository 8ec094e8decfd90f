"""RWKV-4 (Peng et al. 2023, section 3.1): time mixing by a weighted mean over all tokens so far,
and channel mixing.

Initial values and learning rates are those of the official training code (RWKV-LM, RWKV-v4neo),
which decays no weight at all: `optimizer.weight_decay` 0. Here as in RWKV-5 and later, matrices
would decay and vectors would not."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.init import Init, Orthogonal, Zeros
from jaxformer.layers.layer import (
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  starts_BT,
)
from jaxformer.layers.rwkv import (
  ChannelMix,
  ChannelMixConfig,
  decay_ramp,
  depth,
  keep,
  ramp,
  shifted,
  vector,
  zigzag,
)
from jaxformer.ops.linear import linear
from jaxformer.ops.token_shift import last_token
from jaxformer.ops.wkv4 import Wkv4State, wkv4
from jaxformer.sharding import param, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeMix4State:
  """The last token's input, and the sums over all tokens so far in fp32: aa e^pp of values, bb e^pp
  of weights (`ops.wkv4`)."""

  last_BD: Float[Array, 'B D']
  aa_BD: Float[Array, 'B D']
  bb_BD: Float[Array, 'B D']
  pp_BD: Float[Array, 'B D']


class TimeMix4(Layer):
  """Time mixing of RWKV-4 (equations 11 to 13, 16 and 17). With x'_z = mix_z x + (1 - mix_z)
  shift(x) for each z below:

    r, k, v = x'_r W_r, x'_k W_k, x'_v W_v         w = exp(decay) > 0, u = bonus, a channel

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i}
    + e^{u + k_t})

    y = (sigmoid(r) * wkv) W_o

  `decay` and `bonus` learn at 2 and 3 times the learning rate.
  """

  class Config(LayerConfig):
    """
    Attributes:
      init: of W_v; `key_init`: of W_k and W_r; `out_init`: of W_o.
    """

    init: Init = Orthogonal()
    key_init: Init = Zeros()
    out_init: Init = Zeros()

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> TimeMix4:
      return TimeMix4(self, width, rngs, position)

    def state_size(self, width: int, max_len: int) -> int:
      return 4 * width

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      # both sums twice, with u and for the next token: 3 each with v and 2 without; and the
      # quotient
      return 11.0 * width

  def __init__(self, config: TimeMix4.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D = config, width
    if D < 2:
      raise InputError(f'width = {D}: TimeMix4 needs at least 2')
    deep, shallow = depth(position)
    self.mix_k, self.mix_v = vector(ramp(D, shallow)), vector(ramp(D, shallow) + 0.3 * deep)
    self.mix_r = vector(ramp(D, 0.5 * shallow))
    self.decay = vector(-5.0 + 8.0 * decay_ramp(D, deep), lr_scale=2.0, full_precision=True)
    self.bonus = vector(math.log(0.3) + 0.5 * zigzag(D), lr_scale=3.0, full_precision=True)
    self.wr = param(c.key_init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wk = param(c.key_init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wv = param(c.init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wo = param(c.out_init(rngs.params(), (D, D), D, position), ('heads', 'embed'))

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> TimeMix4State:
    D = self.wr.shape[0]
    sums = Wkv4State.empty(batch, D)
    return TimeMix4State(jnp.zeros((batch, D), self.wr[...].dtype), sums.aa, sums.bb, sums.pp)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: TimeMix4State | None = None
  ) -> Output:
    B, T, _ = x_BTD.shape
    before = shifted(x_BTD, ctx, state)
    r, k, v = (
      shard(linear(keep(x_BTD, before, mix), w[...]), 'batch', 'time', 'heads')
      for mix, w in ((self.mix_r, self.wr), (self.mix_k, self.wk), (self.mix_v, self.wv))
    )
    w_D = jnp.exp(self.decay[...].astype(jnp.float32))
    sums = None if state is None else Wkv4State(state.aa_BD, state.bb_BD, state.pp_BD)
    y, sums = wkv4(k, v, w_D, self.bonus[...], sums, starts_BT(ctx.segments_BT, B, T))
    y = checkpoint_name(jax.nn.sigmoid(r) * y, 'attention')
    if state is not None:
      aa, bb, pp = (shard(s, 'batch', 'heads') for s in (sums.aa, sums.bb, sums.pp))
      state = TimeMix4State(last_token(x_BTD).astype(state.last_BD.dtype), aa, bb, pp)
    return Output(linear(y, self.wo[...]), state)


class ChannelMix4(ChannelMix):
  """Channel mixing of RWKV-4 and 5: y = sigmoid(x'_r W_r) * relu(x'_k W_k)^2 W_v with x'_z = mix_z
  x + (1 - mix_z) shift(x).

  RWKV-4 draws W_k with `Orthogonal()`, whose numbers grow with F / D; RWKV-5 with
  `Orthogonal(wide=False)`."""

  class Config(ChannelMixConfig):
    """
    Attributes:
      init: of W_k.
    """

    init: Init = Orthogonal()

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> ChannelMix4:
      return ChannelMix4(self, width, rngs, position)

  def first_mix(self, ramp_D):
    return ramp_D

  def mixed(self, x_BTD, before_BTD, mix):
    return keep(x_BTD, before_BTD, mix)
