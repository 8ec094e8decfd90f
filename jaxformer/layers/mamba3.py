"""Mamba-3 (Lahoti et al. 2026): a trapezoidal, complex recurrence without a short convolution, with
inputs and outputs of rank 1 (SISO) or R (MIMO)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense, by_head
from jaxformer.layers.init import FanInUniform, Init
from jaxformer.layers.layer import Context, Layer, LayerConfig, LayerPosition, Output
from jaxformer.layers.mamba import StepBias
from jaxformer.layers.norm import Norm, NormConfig, RMSNorm
from jaxformer.ops.mamba3 import mamba3
from jaxformer.sharding import param, shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba3State:
  """The state of the recurrence, fp32, in the frame of the last token; and that token's x and B,
  which enter the state once more at the next token."""

  h_BHPN: Float[Array, 'B H P N']
  x_B1HP: Float[Array, 'B 1 H P']
  B_B1GRN: Float[Array, 'B 1 G R N']


class Mamba3(Layer):
  """y = sum_r ((h C_r + D x u_r) * silu(z w_r)) o_r W_o with h_t = alpha h_{t-1} + (1 - lambda) dt
  alpha (x u)_{t-1} B_{t-1}^T + lambda dt (x u)_t B_t^T over heads and alpha = exp(dt (A - i theta))
  (Lahoti et al. 2026, section 3 and figure 2).

  With inputs v and ranks r = 1 to R:

    z, x = v W_z, v W_x, and for rank r x u_r, with u_r, w_r and o_r per channel (1 if rank is None)
    B_r, C_r = norm(v W_r) + bias, shared by the heads of a group but for the bias of each head
    dt = softplus(v W_dt + b_dt);  A = -max(softplus(v W_A), floor);  lambda = sigmoid(v W_lambda)
    theta = pi tanh(v W_theta), one angle for each rotated pair of the state, shared by all heads

  Multiplication by exp(-i dt theta) rotates pairs of the N numbers of a state."""

  class Config(LayerConfig):
    """
    Attributes:
      d_state: state size N per channel.
      expand: channels inside the layer, as a multiple of the width.
      head_dim: channels of a head.
      groups: number of groups of heads; each shares B and C but for their biases.
      rank: R, rank of the inputs and outputs (MIMO); None for 1 without expansions (SISO).
      rotary: fraction of the state that is rotated, in pairs; the rest has theta = 0.
      rate_floor: least absolute value of A.
      bias: whether the projections in and out have biases.
      map_norm: over each B_r and C_r.
      out_norm_eps: eps of an RMSNorm over each head before the gate; None for none.
      init: of the projections; `out_init`: of the projection out; `dt_init`: of b_dt.
    """

    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    groups: int = 1
    rank: int | None = None
    rotary: float = 0.5
    rate_floor: float = 1e-4
    bias: bool = False
    map_norm: NormConfig = RMSNorm()
    out_norm_eps: float | None = None
    init: Init = FanInUniform()
    out_init: Init = FanInUniform(residual=True)
    dt_init: Init = StepBias()

    def validate(self):
      self.require_positive('d_state', 'expand', 'head_dim', 'groups', 'rank', 'rate_floor')
      self.require(self.angles > 0, 'rotary', f'large enough to rotate a pair of {self.d_state}')
      self.require(self.rotary <= 1, 'rotary', 'at most 1')

    @property
    def angles(self) -> int:
      """The number of rotated pairs of a state."""
      return int(self.d_state * self.rotary) // 2

    def heads(self, width: int) -> int:
      """H, from the width."""
      heads = self.quotient(self.expand * width, 'head_dim', 'expand x width')
      self.quotient(heads, 'groups', 'the number of heads')
      return heads

    @classmethod
    def examples(cls):
      return (
        cls(d_state=8, head_dim=16, map_norm=RMSNorm(eps=1e-3)),
        cls(d_state=6, expand=3, head_dim=12, groups=2, rank=2, rotary=1.0, bias=True),
        cls(d_state=4, head_dim=32, rank=3, out_norm_eps=1e-4, rate_floor=0.1),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # per number of the state 2 R each for the update and the output, 1 for the decay, 4 for the
      # two weights of the update, 3 for the rotation
      rank, rotated = self.rank or 1, 2 * self.angles / self.d_state
      return (4.0 * rank + 5.0 + 3.0 * rotated) * self.expand * width * self.d_state

  def __init__(self, config: Mamba3.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, inner, H, R = config, config.expand * width, config.heads(width), config.rank or 1
    self.config, maps = c, c.groups * R * c.d_state

    def fp32(value: Array, **metadata: bool):
      axes = ('heads', *(None,) * (value.ndim - 1))
      return param(value, axes, decay=False, full_precision=True, **metadata)

    make = functools.partial(Dense, rngs=rngs, position=position, bias=c.bias)
    self.z = make(c.init, (width, inner), ('embed', 'inner'))
    self.x = make(c.init, (width, inner), ('embed', 'inner'))
    self.bc = make(c.init, (width, 2 * maps), ('embed', 'state'))
    self.dt = make(c.init, (width, H), ('embed', 'heads'))
    self.rate = make(c.init, (width, H), ('embed', 'heads'))
    self.trapezoid = make(c.init, (width, H), ('embed', 'heads'))
    self.theta = make(c.init, (width, c.angles), ('embed', 'state'))
    self.dt_bias = fp32(c.dt_init(rngs.params(), (H,), width, position))
    self.B_bias, self.C_bias = (fp32(jnp.ones((H, R, c.d_state)), matmul=False) for _ in range(2))
    self.B_norm, self.C_norm = c.map_norm.build(c.d_state), c.map_norm.build(c.d_state)
    self.D = fp32(jnp.ones(H))
    shape, ranked = (H, R, c.head_dim), c.rank is not None
    self.up = fp32(jnp.full(shape, 1 / R), matmul=False) if ranked else None
    self.gate = fp32(jnp.ones(shape), matmul=False) if ranked else None
    self.down = fp32(jnp.full(shape, 1 / R)) if ranked else None
    self.norm = (
      None
      if c.out_norm_eps is None
      else Norm(inner, c.out_norm_eps, centered=False, bias=False, by_head=True)
    )
    self.out = make(c.out_init, (inner, width), ('inner', 'embed'))

  def init_state(self, batch, max_len, memory=None) -> Mamba3State:
    c, H, dtype = self.config, self.D.shape[-1], self.x.dtype
    return Mamba3State(
      jnp.zeros((batch, H, c.head_dim, c.d_state), jnp.float32),
      jnp.zeros((batch, 1, H, c.head_dim), dtype),
      jnp.zeros((batch, 1, c.groups, c.rank or 1, c.d_state), dtype),
    )

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Mamba3State | None = None
  ) -> Output:
    c = self.config
    z, x = (by_head(dense(x_BTD), c.head_dim) for dense in (self.z, self.x))
    maps = self.bc(x_BTD).reshape(*x_BTD.shape[:2], 2, c.groups, c.rank or 1, c.d_state)
    B, C = self.B_norm(maps[:, :, 0]), self.C_norm(maps[:, :, 1])
    dt, rate, trapezoid = (
      shard(dense(x_BTD).astype(jnp.float32), 'batch', 'time', 'heads')
      for dense in (self.dt, self.rate, self.trapezoid)
    )
    y, h = mamba3(
      x,
      jax.nn.softplus(dt + self.dt_bias[...][None, None]),
      -jnp.maximum(jax.nn.softplus(rate), c.rate_floor),
      jax.nn.sigmoid(trapezoid),
      math.pi * jnp.tanh(self.theta(x_BTD).astype(jnp.float32)),
      B,
      C,
      self.B_bias[...],
      self.C_bias[...],
      None if self.up is None else self.up[...],
      self.D[...],
      None if state is None else (state.h_BHPN, state.x_B1HP, state.B_B1GRN),
      ctx.starts(x_BTD),
    )
    if state is not None:
      last = (a[:, -1:].astype(b.dtype) for a, b in ((x, state.x_B1HP), (B, state.B_B1GRN)))
      state = Mamba3State(h, *last)
    return Output(self.out(self._gated(y, z)), state)

  def _gated(self, y_BTHRP: Array, z_BTHP: Array) -> Array:
    """The heads, normalized if `out_norm_eps`, times their gate, and the ranks contracted, `[B, T,
    inner]`, in the dtype of z."""
    y, z = y_BTHRP.astype(jnp.float32), z_BTHP.astype(jnp.float32)[:, :, :, None]
    if self.norm is not None:
      by_rank = self.norm(jnp.swapaxes(y, 2, 3))
      y = jnp.swapaxes(by_rank.reshape(*by_rank.shape[:3], *y.shape[2::2]), 2, 3)
    if self.gate is not None:
      z = z * self.gate[...][None, None]
    y = y * jax.nn.silu(z)
    if self.down is not None:
      y = y * self.down[...][None, None]
    y = jnp.sum(y, axis=3)
    return y.reshape(*y.shape[:2], -1).astype(z_BTHP.dtype)
