"""RWKV-5.2 "Eagle" (Peng et al. 2024, section 4.1): time mixing with a matrix as each head's state.
Its channel mixing is RWKV-4's.

Initial values and learning rates are those of the official training code (RWKV-LM, RWKV-v5,
`x052`)."""

from __future__ import annotations

import dataclasses

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
from jaxformer.layers.norm import HeadNorm
from jaxformer.layers.rwkv import decay_ramp, depth, keep, ramp, shifted, vector, zigzag
from jaxformer.ops.linear import linear
from jaxformer.ops.token_shift import last_token
from jaxformer.ops.wkv6 import wkv6
from jaxformer.sharding import param, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixMixState:
  """The last token's input, and each head's matrix, in fp32 (`jaxformer.ops.wkv6`)."""

  last_BD: Float[Array, 'B D']
  heads_BHKV: Float[Array, 'B H K V']


class MatrixMixConfig(LayerConfig, abstract=True):
  """
  Attributes:
    head_dim: channels of a head; they divide the width.
    norm: of the heads' outputs. The official one is eps 1e-5 after a division by 8, which is 64e-5
      without it.
    init: of W_r and W_v; `key_init`: of W_k and W_g; `out_init`: of W_o.
  """

  head_dim: int = 64
  norm: HeadNorm.Config = HeadNorm.Config(eps=64e-5)
  init: Init = Orthogonal(wide=False)
  key_init: Init = Orthogonal(gain=0.1, wide=False)
  out_init: Init = Zeros()

  def validate(self):
    self.require(self.head_dim > 0, 'head_dim', 'positive')

  def state_size(self, width: int, max_len: int) -> int:
    return width + width * self.head_dim

  def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
    # r^T S and + k v^T are 2 each and the decay 1, for each number of the state; r u k summed and
    # times v are 5 a channel.
    return 5.0 * width * self.head_dim + 5.0 * width


class MatrixMix(Layer):
  """Base of the time mixing of RWKV-5 and 6: everything but how inputs are mixed and where the
  decays come from."""

  def __init__(self, config: MatrixMixConfig, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D, K = config, width, config.head_dim
    if D % K or D < 2:
      raise InputError(f'width = {D} is not a multiple of {c.tag}.head_dim = {K}')
    self.config = c
    deep = depth(position)[0]
    self.bonus = vector(
      deep * (1.0 - jnp.arange(D) / (D - 1)) + 0.1 * zigzag(D), full_precision=True
    )
    self.wr = param(c.init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wk = param(c.key_init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wv = param(c.init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wg = param(c.key_init(rngs.params(), (D, D), D, position), ('embed', 'heads'))
    self.wo = param(c.out_init(rngs.params(), (D, D), D, position), ('heads', 'embed'))
    self.norm = c.norm.build(D)
    self.norm.scale = vector(jnp.full(D, ((1.0 + position.index) / position.depth) ** 0.7))

  def first_decay(self, width: int, position: LayerPosition) -> Float[Array, ' D']:
    """What the decays begin with, as log(-log)."""
    return -6.0 + 5.0 * decay_ramp(width, depth(position)[0])

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> MatrixMixState:
    D, K = self.wr.shape[0], self.config.head_dim
    return MatrixMixState(
      jnp.zeros((batch, D), self.wr[...].dtype), jnp.zeros((batch, D // K, K, K), jnp.float32)
    )

  def recur(
    self,
    x_BTD: Array,
    mixed: dict[str, Array],
    log_decay: Float[Array, '#B #T D'],
    ctx: Context,
    state: MatrixMixState | None,
  ) -> Output:
    """From the mixed inputs of r, k, v and g, and the logs of the decays in fp32, to the layer's
    output."""
    B, T, D = x_BTD.shape
    K = self.config.head_dim

    def by_head(z: Array) -> Array:
      return z.reshape(*z.shape[:-1], D // K, K)

    r, k, v = (
      shard(by_head(linear(mixed[z], w[...])), 'batch', 'time', 'heads', None)
      for z, w in (('r', self.wr), ('k', self.wk), ('v', self.wv))
    )
    y, heads_BHKV = wkv6(
      r,
      k,
      v,
      by_head(log_decay),
      by_head(self.bonus[...]),
      None if state is None else state.heads_BHKV,
      starts_BT(ctx.segments_BT, B, T),
    )
    y = checkpoint_name(self.norm(y) * jax.nn.silu(linear(mixed['g'], self.wg[...])), 'attention')
    if state is not None:
      state = MatrixMixState(
        last_token(x_BTD).astype(state.last_BD.dtype),
        shard(heads_BHKV, 'batch', 'heads', None, None),
      )
    return Output(linear(y, self.wo[...]), state)


class TimeMix5(MatrixMix):
  """Time mixing of RWKV-5.2. With x'_z = mix_z x + (1 - mix_z) shift(x) for each z below, and heads
  of K channels:

    r, k, v, g = x'_r W_r, x'_k W_k, x'_v W_v, silu(x'_g W_g)          w = exp(-exp(decay)), u =
    bonus, a channel

    S_t = diag(w) S_{t-1} + k_t v_t^T,   y = (norm by head(r_t^T (S_{t-1} + diag(u) k_t v_t^T)) * g)
    W_o

  `decay` learns at twice the learning rate.
  """

  class Config(MatrixMixConfig):
    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> TimeMix5:
      return TimeMix5(self, width, rngs, position)

    @classmethod
    def examples(cls) -> tuple[TimeMix5.Config, ...]:
      return (cls(head_dim=8, norm=HeadNorm.Config(eps=1e-3)),)

  def __init__(self, config: TimeMix5.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    deep, shallow = depth(position)
    self.mix_r, self.mix_k = vector(ramp(width, 0.5 * shallow)), vector(ramp(width, shallow))
    self.mix_v, self.mix_g = (
      vector(ramp(width, shallow) + 0.3 * deep),
      vector(ramp(width, 0.5 * shallow)),
    )
    self.decay = vector(self.first_decay(width, position), lr_scale=2.0, full_precision=True)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: MatrixMixState | None = None
  ) -> Output:
    before = shifted(x_BTD, ctx, state)
    mixes = {'r': self.mix_r, 'k': self.mix_k, 'v': self.mix_v, 'g': self.mix_g}
    log_decay = -jnp.exp(self.decay[...].astype(jnp.float32))[None, None]
    return self.recur(
      x_BTD, {z: keep(x_BTD, before, mix) for z, mix in mixes.items()}, log_decay, ctx, state
    )
