"""S4 (Gu, Goel and Re 2022, 'Efficiently Modeling Long Sequences with Structured State Spaces')."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.state_space import (
  ChannelSystemConfig,
  StateSpace,
  complex_normal,
  copies,
  paired,
  pairs,
  per_channel,
  poles,
  recurrent,
  stable,
  step_sizes,
)
from jaxformer.ops.hippo import legs_dplr
from jaxformer.ops.ssm_dplr import DplrSystem, dense_dplr, dplr, truncated


class S4(StateSpace):
  """x' = (Lambda - p p^*) x + B u, y = 2 Re(C x) + D u per channel, by Tustin's rule, then GELU and
  a gated projection (Gu, Goel and Re 2022, section 3).

  Each channel has its own step size. It is initialized to HiPPO-LegS in the basis in which that is
  diagonal plus rank one (`ops.hippo.legs_dplr`). The parameter of the output is
  C~ = C (I - Abar^length), made once from a random C; Lambda, p, B and the step sizes have
  `lr_scale` and no weight decay, C~ is a weight like others."""

  class Config(ChannelSystemConfig):
    """
    Attributes:
      length: the sequence length that C~ is made for; kernels of shorter sequences are cut from it.
        Longer ones are exact too, but cost an N x N solve per channel.
    """

    length: int = 1024

    def validate(self):
      super().validate()
      self.require_positive('length')

    def for_length(self, length: int) -> S4.Config:
      return self.replace(length=length)

    @classmethod
    def examples(cls):
      return (
        cls(d_state=8, length=64),
        cls(d_state=4, length=16, causal=False, n_ssm=2, dt_transform='softplus'),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # the recurrence with real matrices
      return self.directions * width * self.d_state * (2.0 * self.d_state + 4.0)

  def __init__(self, config: S4.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    c, shape = config, (width, config.d_state // 2)
    self.length = c.length
    a, p, b = (copies(v, c.independent(width)) for v in legs_dplr(c.d_state))
    self.log_decay, self.frequency = poles(a, c.systems_axis, **c.rates)
    self.p = recurrent(pairs(p), (c.systems_axis, 'state', None), **c.rates)
    self.b = recurrent(pairs(b), (c.systems_axis, 'state', None), **c.rates)
    start = complex_normal(rngs.params(), (c.directions, *shape))
    a, p, b = (per_channel(v, width) for v in (a, p, b))
    d, _ = dense_dplr(a, p, b, step_sizes(self.log_dt, c))
    tilde = truncated(jnp.concatenate([2 * start.real, -2 * start.imag], axis=-1), d, c.length)
    self.c_tilde = recurrent(pairs(tilde), (None, 'inner', 'state', None), decay=True)

  def system(self, direction: int = 0) -> DplrSystem:
    values = stable(self.log_decay, self.frequency), paired(self.p), paired(self.b)
    a, p, b = (per_channel(v, self.width) for v in values)
    tilde = paired(self.c_tilde)[direction : direction + 1]
    return dplr(a, p, b, tilde, step_sizes(self.log_dt, self.config), self.length)
