"""H3 (Fu et al. 2023, 'Hungry Hungry Hippos'): two state-space models with products between them,
in the place of attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init, Normal
from jaxformer.layers.layer import Context, Layer, LayerPosition, Output
from jaxformer.layers.s4d import DISCRETIZATIONS, DiscretizationName, SpectrumName, diagonal
from jaxformer.layers.state_space import (
  SystemConfig,
  complex_normal,
  log_steps,
  paired,
  pairs,
  recurrent,
  stable,
  step_sizes,
)
from jaxformer.ops.ssm import ssm, toeplitz
from jaxformer.ops.ssm_systems import DiagonalSystem, ShiftSystem
from jaxformer.sharding import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class H3State:
  """The last N keys of each channel, newest first, and the states of the diagonal systems, one for
  each of the J = K K pairs of a key dimension and a value dimension of a head. fp32."""

  keys_BDN: Float[Array, 'B D N']
  kv_BJHN: Float[Array, 'B J H N']


class H3(Layer):
  """y = (q * diag(shift(k) * v)) W_o over heads, with a shift SSM of the keys and a diagonal SSM of
  their products with the values (Fu et al. 2023, section 3.2, algorithm 1).

  With D / K heads of K dimensions:

    q, k, v = x W_q + b_q, x W_k + b_k, x W_v + b_v
    k'_t    = sum_i f_i k_{t-i} + skip_k k_t           the shift system: N weights per channel
    z_t     = k'_t v_t^T                                  [K, K] per head
    s_t     = diag(z)_t + skip z_t                        S4D, one system per head, all K x K
    y_t     = (q_t^T s_t) W_o + b_o                       channels in the order (value dim, head)

  The shift system has matrices B and C: its state is B u_t + the state shifted by one, so f_i =
  sum_j B_j C_{j+i}. The paper fixes B = e_1, which makes them C; the published models start there
  and train B too, as this layer does. The state kept here is that of B = e_1, the keys themselves,
  for any B."""

  class Config(SystemConfig):
    """
    Attributes:
      head_dim: K.
      d_state: state size N: the length of the shift system, and of each diagonal system in real
        numbers. There is one diagonal system per head.
      spectrum, discretization: of the diagonal systems, as in `S4D`.
      init: of the four projections.
    """

    head_dim: int = 1
    spectrum: SpectrumName = 'lin'
    discretization: DiscretizationName = 'bilinear'
    lr_scale: float | None = 1.0
    init: Init = Normal()

    def validate(self):
      super().validate()
      self.require_positive('head_dim')

    def heads(self, width: int) -> int:
      """D / K."""
      return self.quotient(width, 'head_dim')

    @classmethod
    def examples(cls):
      return cls(d_state=8), cls(head_dim=4, d_state=6, dt_min=0.01, dt_max=0.5)

    def mixing_flops_per_token(self, width, length, causal):
      # the shift system; the recurrence, a complex product with an input and an output; and the
      # products with keys, values, queries
      return width * (2.0 * self.d_state + self.head_dim * (7.0 * self.d_state + 5.0))

  def __init__(self, config: H3.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, D, H, N = config, width, config.heads(width), config.d_state
    self.config, self.heads = c, H
    dense = functools.partial(Dense, c.init, (D, D), bias=True, rngs=rngs, position=position)
    self.q, self.k, self.v = (dense(('embed', 'inner')) for _ in range(3))
    self.o = dense(('inner', 'embed'))
    self.shift_b = recurrent(jnp.zeros((D, N)).at[:, 0].set(1.0), ('inner', 'state'), **c.rates)
    self.shift_c = recurrent(
      FanInUniform()(rngs.params(), (D, N), N, position), ('inner', 'state'), decay=True
    )
    self.shift_skip = recurrent(jax.random.normal(rngs.params(), (D,)), ('inner',))
    self.log_dt = log_steps(H, c, rngs)
    self.log_decay, self.frequency, self.b = diagonal(c.spectrum, H, N, **c.rates)
    self.c = recurrent(
      pairs(complex_normal(rngs.params(), (H, N // 2))), ('inner', 'state', None), decay=True
    )
    self.skip = recurrent(jax.random.normal(rngs.params(), (H,)), ('inner',))

  def systems(self) -> tuple[ShiftSystem, DiagonalSystem]:
    """Return the discrete systems of the current parameters: of the keys, and of their products
    with the values."""
    filter_DN = jnp.sum(toeplitz(self.shift_b[...]) * self.shift_c[...][:, None], axis=-1)
    a = stable(self.log_decay, self.frequency)
    discretize = DISCRETIZATIONS[self.config.discretization]
    log_a, b = discretize(a, paired(self.b), step_sizes(self.log_dt, self.config))
    return ShiftSystem(filter_DN[None]), DiagonalSystem(log_a, b, paired(self.c)[None])

  def init_state(self, batch, max_len, memory=None) -> H3State:
    (D, N), K = self.shift_b.shape, self.config.head_dim
    return H3State(jnp.zeros((batch, D, N)), jnp.zeros((batch, K * K, self.heads, N)))

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: H3State | None = None
  ) -> Output:
    B, J = len(x_BTD), self.config.head_dim**2
    q, k, v = self._qkv(x_BTD)
    starts = None if ctx.segments_BT is None else ctx.starts(x_BTD)
    pair_starts = None if starts is None else jnp.repeat(starts, J, axis=0)
    shift, diagonal = self.systems()
    k_BTMD, keys = ssm(k, shift, None if state is None else state.keys_BDN, starts)
    z = self._products(k_BTMD[:, :, 0] + self.shift_skip[...][None, None] * k, v)
    before = None if state is None else state.kv_BJHN.reshape(B * J, self.heads, -1)
    s_BTMH, kv = ssm(z, diagonal, before, pair_starts)
    y = self._read(q, s_BTMH[:, :, 0] + self.skip[...][None, None] * z)
    y = self.o(shard(y.astype(x_BTD.dtype), 'batch', 'time', 'inner'))
    if keys is None or kv is None:
      return Output(y)
    return Output(y, H3State(keys, kv.reshape(B, J, self.heads, -1)))

  def _qkv(self, x_BTD: Array) -> tuple[Array, Array, Array]:
    q, k, v = (
      shard(dense(x_BTD), 'batch', 'time', 'inner').astype(jnp.float32)
      for dense in (self.q, self.k, self.v)
    )
    return q, k, v

  def _products(self, k_BTD: Array, v_BTD: Array) -> Array:
    """Return k v^T of every head, with one row per entry: [B K K, T, H]."""
    k_BKTH, v_BKTH = self._split(k_BTD), self._split(v_BTD)
    return (k_BKTH[:, :, None] * v_BKTH[:, None]).reshape(-1, *k_BKTH.shape[2:])

  def _read(self, q_BTD: Array, s_BTH: Array) -> Array:
    """Return the sum of q times k v^T over the key dimensions: [B, T, D]."""
    q_BKTH = self._split(q_BTD)
    s_BKKTH = s_BTH.reshape(q_BKTH.shape[0], self.config.head_dim, *q_BKTH.shape[1:])
    return jnp.swapaxes(jnp.sum(q_BKTH[:, :, None] * s_BKKTH, axis=1), 1, 2).reshape(q_BTD.shape)

  def _split(self, x_BTD: Array) -> Array:
    """Channels (h d) as [B, K, T, H]."""
    return x_BTD.reshape(*x_BTD.shape[:2], self.heads, -1).transpose(0, 3, 1, 2)
