"""DeltaNet (Yang et al. 2024) and its descendants: linear attention whose state is overwritten by
the delta rule. Gated DeltaNet (Yang et al. 2025) lets it decay, one decay per head; Kimi Delta
Attention (Kimi Team 2025) has one per channel.

Initializations are those of the authors' library (flash-linear-attention 0.6)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mamba import StepBias, convolve
from jaxformer.layers.mamba2 import LogUniformRate
from jaxformer.layers.norm import RMSNorm
from jaxformer.ops.delta_rule import delta_rule
from jaxformer.sharding import param, shard

UNIT_EPS = 1e-6  # added to the squared length of queries and keys, as in the authors' library


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
  """The last J = d_conv - 1 inputs of the convolutions of queries, keys and values, and the state
  of the delta rule, fp32."""

  inputs_BJD: tuple[Float[Array, 'B J D'], ...]
  S_BHVK: Float[Array, 'B H V K']


def unit(x: Float[Array, '*B K']) -> Float[Array, '*B K']:
  """x / |x| over the last axis, in fp32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)


class DeltaNet(Layer):
  """S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = norm(S_t q_t / sqrt(K)) W_o over
  heads (Yang et al. 2024, section 2.2 and appendix A).

  q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v)), where q and k are divided by
  their length; beta = sigmoid(x W_beta); the norm is an RMSNorm over each head. With more value
  heads than key heads, value head h reads key head h // (value_heads / heads)."""

  class Config(LayerConfig):
    """
    Attributes:
      heads: heads of queries and keys.
      value_heads: heads of values and states; None for one per key head.
      head_dim: K, channels of a query and a key; None for width / heads.
      value_head_dim: V, channels of a value; None for what the paper has, from head_dim.
      d_conv: kernel size of the convolutions; `conv_bias`: whether they have biases.
      negative_eigenvalues: beta = 2 sigmoid(x W_beta), so that transitions may reflect (Grazzi et
        al. 2025).
      norm_eps: of the norm of the output.
      init: of the projections and the convolutions; `out_init`: of the projection out.
    """

    heads: int = 4
    value_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    d_conv: int = 4
    conv_bias: bool = False
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5
    init: Init = Normal()
    out_init: Init = Normal()

    def validate(self):
      self.require_positive('heads', 'value_heads', 'head_dim', 'value_head_dim', 'd_conv')
      divides = self.value_heads is None or self.value_heads % self.heads == 0
      self.require(divides, 'value_heads', f'a multiple of heads = {self.heads}')

    def resolved(self, width: int) -> Self:
      K = self.head_dim or self.quotient(width, 'heads')
      return self.replace(
        value_heads=self.value_heads or self.heads,
        head_dim=K,
        value_head_dim=self.value_head_dim or self.value_size(K),
      )

    def sizes(self, width: int) -> tuple[int, int, int]:
      """H heads of values, K and V."""
      r = self.resolved(width)
      assert r.value_heads is not None
      assert r.head_dim is not None
      assert r.value_head_dim is not None
      return r.value_heads, r.head_dim, r.value_head_dim

    def value_size(self, head_dim: int) -> int:
      """V where it is not given."""
      return head_dim

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, head_dim=8, value_head_dim=6, negative_eigenvalues=True),
        cls(heads=2, value_heads=4, head_dim=4, d_conv=3, conv_bias=True, norm_eps=1e-3),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # the decay 1, and S k, + u k^T and S q 2 each, per element of the state
      H, K, V = self.sizes(width)
      return 7.0 * H * K * V

  def __init__(self, config: DeltaNet.Config, width: int, rngs, position: LayerPosition):
    c, (H, K, V) = config, config.sizes(width)
    self.config, self.sizes = c, (H, K, V)
    make = functools.partial(Dense, rngs=rngs, position=position)
    keys, values = c.heads * K, H * V
    self.q = make(c.init, (width, keys), ('embed', 'kv_heads'))
    self.k = make(c.init, (width, keys), ('embed', 'kv_heads'))
    self.v = make(c.init, (width, values), ('embed', 'heads'))
    self.beta = make(c.init, (width, H), ('embed', 'heads'))
    conv = functools.partial(make, bias=c.conv_bias)
    self.conv_q = conv(c.init, (c.d_conv, keys), ('state', 'kv_heads'))
    self.conv_k = conv(c.init, (c.d_conv, keys), ('state', 'kv_heads'))
    self.conv_v = conv(c.init, (c.d_conv, values), ('state', 'heads'))
    self.norm = RMSNorm(eps=c.norm_eps).build(V)
    self.out = make(c.out_init, (values, width), ('heads', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> DeltaState:
    H, K, V = self.sizes
    return DeltaState(
      tuple(
        jnp.zeros((batch, self.config.d_conv - 1, conv.kernel.shape[-1]), self.q.dtype)
        for conv in (self.conv_q, self.conv_k, self.conv_v)
      ),
      jnp.zeros((batch, H, V, K), jnp.float32),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: DeltaState | None = None
  ) -> Output:
    starts, (_, K, _) = ctx.starts(x_BTD), self.sizes
    before, S = ((None, None, None), None) if state is None else (state.inputs_BJD, state.S_BHVK)
    q, q_after = convolve(self.conv_q, self.q(x_BTD), before[0], starts)
    k, k_after = convolve(self.conv_k, self.k(x_BTD), before[1], starts)
    v, v_after = convolve(self.conv_v, self.v(x_BTD), before[2], starts)
    beta = jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
    y, S = delta_rule(
      self._by_value_head(unit(by_head(q, K, 'kv_heads')) / K**0.5),
      self._by_value_head(unit(by_head(k, K, 'kv_heads'))),
      by_head(v, self.sizes[2]),
      shard(2.0 * beta if self.config.negative_eigenvalues else beta, 'batch', 'time', 'heads'),
      self._log_decay(x_BTD),
      S,
      starts,
    )
    y = self._gated(self.norm(y), x_BTD)
    y = checkpoint_name(y.reshape(*y.shape[:2], -1), 'attention')
    if state is not None:
      S = shard(S, 'batch', 'heads', None, None)
      state = DeltaState((q_after, k_after, v_after), S)
    return Output(self.out(y), state)

  def _by_value_head(self, x_BTHK: Array) -> Array:
    copies = self.sizes[0] // self.config.heads
    return x_BTHK if copies == 1 else jnp.repeat(x_BTHK, copies, axis=2)

  def _log_decay(self, x_BTD: Array) -> Array | None:
    """The log decays of each head, or of each of its channels, fp32; None for no decay."""
    return None

  def _gated(self, y_BTHV: Array, x_BTD: Array) -> Array:
    """The normalized heads, gated."""
    return y_BTHV


class GatedDeltaNet(DeltaNet):
  """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = (norm(S_t q_t / sqrt(K))
  * silu(x W_g)) W_o over heads (Yang et al. 2025, eq. 10 and section 3.4).

  alpha = exp(-exp(A_log) softplus(x W_a + b_dt)), one per value head; the others as in
  `DeltaNet`."""

  class Config(DeltaNet.Config):
    """
    Attributes:
      value_head_dim: None for 2 head_dim.
      dt_init: of b_dt; `rate_init`: of A_log. (The authors draw A from U(0, 16); this one starts at
        0.01, so that its logarithm is finite.)
    """

    heads: int = 6
    head_dim: int | None = 256
    dt_init: Init = StepBias()
    rate_init: Init = LogUniformRate(low=0.01)

    def value_size(self, head_dim: int) -> int:
      return 2 * head_dim

  def __init__(self, config: GatedDeltaNet.Config, width: int, rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    c, (H, _, V) = config, self.sizes
    make = functools.partial(Dense, rngs=rngs, position=position)
    self.a = make(c.init, (width, H), ('embed', 'heads'))
    self.dt_bias = _vector(c.dt_init(rngs.params(), (H,), width, position))
    self.A_log = _vector(c.rate_init(rngs.params(), (H,), width, position))
    self.gate = make(c.init, (width, H * V), ('embed', 'heads'))

  def _log_decay(self, x_BTD):
    step = jax.nn.softplus(self.a(x_BTD).astype(jnp.float32) + self.dt_bias[...][None, None])
    return shard(-jnp.exp(self.A_log[...])[None, None] * step, 'batch', 'time', 'heads')

  def _gated(self, y_BTHV, x_BTD):
    gate = jax.nn.silu(by_head(self.gate(x_BTD), self.sizes[2]).astype(jnp.float32))
    return (y_BTHV.astype(jnp.float32) * gate).astype(y_BTHV.dtype)


class KimiDeltaAttention(DeltaNet):
  """S_t = S_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = (norm(S_t q_t /
  sqrt(K)) * sigmoid(x W_g W_g' + b_g)) W_o over heads (Kimi Team 2025, eq. 1 and section 4).

  alpha = exp(-exp(A_log) softplus(x W_a W_a' + b_dt)), one per channel of the key, where A_log is
  one per value head; the others as in `DeltaNet`."""

  class Config(DeltaNet.Config):
    """
    Attributes:
      decay_rank, gate_rank: columns of W_a and W_g; None for the channels of a value.
      gate_bias: whether there is a b_g.
      dt_init: of b_dt; `rate_init`: of A_log.
    """

    heads: int = 16
    head_dim: int | None = 128
    decay_rank: int | None = None
    gate_rank: int | None = None
    gate_bias: bool = True
    dt_init: Init = StepBias()
    rate_init: Init = LogUniformRate()

    def validate(self):
      super().validate()
      self.require_positive('decay_rank', 'gate_rank')

    def resolved(self, width: int) -> Self:
      r = super().resolved(width)
      return r.replace(
        decay_rank=self.decay_rank or r.value_head_dim, gate_rank=self.gate_rank or r.value_head_dim
      )

    @classmethod
    def examples(cls):
      return (
        cls(heads=2, head_dim=8, value_head_dim=6, decay_rank=5, gate_rank=3),
        cls(heads=2, value_heads=4, head_dim=4, d_conv=3, gate_bias=False),
      )

  def __init__(self, config: KimiDeltaAttention.Config, width: int, rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    c, (H, K, V) = config.resolved(width), self.sizes
    make = functools.partial(Dense, rngs=rngs, position=position)
    self.decay_in = make(c.init, (width, c.decay_rank), ('embed', 'state'))
    self.decay_out = make(c.init, (c.decay_rank, H * K), ('state', 'heads'))
    self.dt_bias = _vector(c.dt_init(rngs.params(), (H * K,), width, position))
    self.A_log = _vector(c.rate_init(rngs.params(), (H,), width, position))
    self.gate_in = make(c.init, (width, c.gate_rank), ('embed', 'state'))
    self.gate_out = make(c.init, (c.gate_rank, H * V), ('state', 'heads'), bias=c.gate_bias)

  def _log_decay(self, x_BTD):
    step = self.decay_out(self.decay_in(x_BTD)).astype(jnp.float32) + self.dt_bias[...][None, None]
    rate = jnp.exp(self.A_log[...])[None, None, :, None]
    return -rate * by_head(jax.nn.softplus(step), self.sizes[1])

  def _gated(self, y_BTHV, x_BTD):
    gate = by_head(self.gate_out(self.gate_in(x_BTD)), self.sizes[2])
    gate = jax.nn.sigmoid(gate.astype(jnp.float32))
    return (y_BTHV.astype(jnp.float32) * gate).astype(y_BTHV.dtype)


def _vector(value: Array):
  return param(value, ('heads',), decay=False, full_precision=True)
