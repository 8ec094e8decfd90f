"""The linear state-space layer (Gu, Johnson, Goel, Saab, Dao, Rudra and Re 2021, 'Combining
Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers')."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.state_space import StateSpace, StateSpaceConfig, rates, recurrent, step_sizes
from jaxformer.ops.hippo import legs
from jaxformer.ops.ssm_systems import DenseSystem, dense_bilinear


class LSSL(StateSpace):
  """x' = A x + B u, y_m = C_m x + D_m u for m = 1 .. copies, with a dense A, by Tustin's rule, then
  GELU and a projection of all copies of all channels (Gu, Johnson et al. 2021, section 3).

  Each channel has its own step size. A and B are initialized to HiPPO-LegS; B is not trained."""

  class Config(StateSpaceConfig):
    """
    Attributes:
      transition: `fixed`: neither A nor the step sizes are trained (LSSL-fixed); `shared`: one A
        for all channels; `per_channel`: one A per channel.
      transition_lr_scale: factor on the learning rate of A; 0 if it is fixed, as `lr_scale`, that
        of the step sizes; None where it has a `transition_learning_rate`.
      transition_learning_rate: learning rate of A at the peak of the schedule, whatever that of the
        run. (In the authors' code 1e-4, and 1e-3 for the step sizes, `learning_rate` here, whatever
        the run's; the factors by default come to that in a run at 0.01.)
      copies: outputs M per channel, which read the same state.
    """

    transition: Literal['fixed', 'shared', 'per_channel'] = 'shared'
    transition_lr_scale: float | None = 0.01
    transition_learning_rate: float | None = None
    copies: int = 1

    paired: ClassVar[bool] = False

    def validate(self):
      super().validate()
      self.require_positive('copies')
      self.require_positive('transition_learning_rate')
      absolute = self.transition_learning_rate is not None
      self.require(
        (self.transition_lr_scale == 0) == (self.transition == 'fixed')
        and (self.transition_lr_scale is None) == absolute,
        'transition_lr_scale',
        '0 if the transition is fixed, none with a transition_learning_rate, else positive',
      )
      self.require(
        self.lr_scale == 0 or self.transition != 'fixed', 'lr_scale', '0 if the transition is fixed'
      )

    @classmethod
    def examples(cls):
      fixed = cls(d_state=4, transition='fixed', transition_lr_scale=0.0, lr_scale=0.0)
      return (
        cls(d_state=5, copies=2, transition='per_channel'),
        fixed.replace(copies=2, causal=False),
      )

    def mixing_flops_per_token(self, width, length, causal):
      # the recurrence
      return self.directions * width * self.d_state * (2.0 * self.d_state + 2.0 + 2.0 * self.copies)

  def __init__(self, config: LSSL.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position, outputs=config.copies, gated=False)
    c = config
    self.copies = c.copies
    a, axes = jnp.asarray(legs(c.d_state)[0], jnp.float32), ('state', None)
    if c.transition == 'per_channel':
      a, axes = jnp.broadcast_to(a[None], (width, *a.shape)), ('inner', 'state', None)
    own = rates(c.transition_lr_scale, c.transition_learning_rate)
    self.a = None if c.transition == 'fixed' else recurrent(a, axes, **own)
    self.c = recurrent(
      jax.random.normal(rngs.params(), (c.directions * c.copies, width, c.d_state)),
      (None, 'inner', 'state'),
      decay=True,
    )

  def system(self, direction: int = 0) -> DenseSystem:
    N, M = self.config.d_state, self.copies
    a, b = (jnp.asarray(v, jnp.float32) for v in legs(N))
    a = a if self.a is None else self.a[...]
    a_HNN = jnp.broadcast_to(a[None], (self.width, N, N)) if a.ndim == 2 else a
    d, bbar = dense_bilinear(
      a_HNN, jnp.broadcast_to(b[None], (self.width, N)), step_sizes(self.log_dt, self.config)
    )
    return DenseSystem(d, bbar, self.c[...][direction * M : (direction + 1) * M])
