"""S5 (Smith, Warrington and Linderman 2023, 'Simplified State Space Layers for Sequence
Modeling')."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInNormal
from jaxformer.layers.layer import Context, Layer, LayerPosition, Output
from jaxformer.layers.state_space import (
  StateSpaceConfig,
  document_ends,
  dropped,
  log_steps,
  paired,
  pairs,
  recurrent,
  step_sizes,
)
from jaxformer.ops.diagonal_scan import diagonal_scan
from jaxformer.ops.hippo import legs_basis
from jaxformer.ops.linear import linear
from jaxformer.ops.ssm_systems import zoh
from jaxformer.sharding import param, shard


class S5(Layer):
  """x' = Lambda x + B u, y = 2 Re(C x) + D u, one diagonal system over all channels; then g =
  gelu(y) and g * sigmoid(g W + b) (Smith et al. 2023, section 3 and appendix B).

  By zero-order hold, with a step size per state. Lambda is initialized to the diagonal of
  HiPPO-LegS of size N / blocks, `blocks` times; B and C are random matrices in that basis, of real
  numbers of variance 1 / N and of complex ones of variance 2 / N. Lambda, B and the step sizes
  have `lr_scale` and no weight decay. GELU is the tanh approximation, and the gate as a flax
  `Dense`, as in the authors' code (lindermanlab/S5)."""

  class Config(StateSpaceConfig):
    """
    Attributes:
      blocks: number of blocks J of the initial state matrix.
    """

    blocks: int = 1

    def validate(self):
      super().validate()
      fits = self.blocks > 0 and self.d_state % (2 * self.blocks) == 0
      self.require(fits, 'blocks', f'such that d_state = {self.d_state} is an even number for each')

    def mixing_flops_per_token(self, width, length, causal):
      return self.directions * 4.0 * self.d_state  # a complex product and a sum

    @classmethod
    def examples(cls):
      return cls(d_state=8, blocks=2), cls(d_state=4, causal=False)

  def __init__(self, config: S5.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    c, (N, J), H = config, (config.d_state, config.blocks), width
    self.config, self.width = c, width
    a, v = legs_basis(N // J)
    a, v_NP = jnp.asarray(np.tile(a, J), jnp.complex64), jnp.asarray(v, jnp.complex64)
    self.decay = recurrent(a.real, ('inner',), **c.rates)
    self.frequency = recurrent(a.imag, ('inner',), **c.rates)
    self.log_dt = log_steps(N // 2, c, rngs)
    lecun_normal = FanInNormal(truncated=True)
    b_JNH = lecun_normal(rngs.params(), (J, N // J, H), N, position)
    b = jnp.einsum('np,jnh->hjp', v_NP.conj(), b_JNH, precision='highest').reshape(H, N // 2)
    self.b = param(pairs(b), ('embed', 'inner', None), decay=False, full_precision=True, **c.rates)
    c_2JNRH = lecun_normal(rngs.params(), (2, J, N // J, c.directions, H), N, position)
    c_JNRH = jax.lax.complex(*c_2JNRH)
    c_PRH = jnp.einsum('np,jnrh->jprh', v_NP, c_JNRH, precision='highest').reshape(
      N // 2, c.directions, H
    )
    self.c = param(pairs(c_PRH), ('inner', None, 'embed', None), full_precision=True)
    self.skip = recurrent(jax.random.normal(rngs.params(), (H,)), ('norm',))
    self.gate = Dense(
      lecun_normal, (H, H), ('embed', None), bias=True, rngs=rngs, position=position
    )

  def init_state(self, batch, max_len, memory=None) -> Float[Array, 'B N']:
    return jnp.zeros((batch, self.config.d_state), jnp.float32)

  def __call__(
    self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: Array | None = None
  ) -> Output:
    starts = None if ctx.segments_BT is None else ctx.starts(x_BTD)
    # stable for any parameters
    a = jax.lax.complex(jnp.minimum(self.decay[...], -1e-4), self.frequency[...])
    log_a, scale = zoh(a[:, None], jnp.ones_like(a)[:, None], step_sizes(self.log_dt, self.config))
    b = paired(self.b) * scale[:, 0][None]
    u = x_BTD.astype(jnp.float32)
    v_BTN = shard(linear(u, jnp.concatenate([b.real, b.imag], axis=1)), 'batch', 'time', None)
    x_BTN, last = diagonal_scan(v_BTN, log_a[:, 0], state, starts)
    y = linear(x_BTN, self._reading(0)) + self.skip[...][None, None] * u
    if not self.config.causal:
      after = document_ends(starts)
      x_BTN, _ = diagonal_scan(v_BTN, log_a[:, 0], None, after, reverse=True)
      y = y + linear(x_BTN, self._reading(1))
    return Output(self._gated(y.astype(x_BTD.dtype), ctx), last)

  def _reading(self, direction: int) -> Array:
    """2 Re(C x) as a product with the real state: [N, H]."""
    c = paired(self.c)[:, direction]
    return jnp.concatenate([2 * c.real, -2 * c.imag], axis=0)

  def _gated(self, y: Array, ctx: Context) -> Array:
    g = dropped(jax.nn.gelu(y, approximate=True), self.config, ctx.fold(0))
    return dropped(g * jax.nn.sigmoid(self.gate(g)), self.config, ctx.fold(1))
