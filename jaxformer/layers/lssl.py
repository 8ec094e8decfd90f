"""The linear state-space layer (Gu, Johnson, Goel, Saab, Dao, Rudra and Re 2021, 'Combining
Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers')."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.config import Config
from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.state_space import StateSpace, StateSpaceConfig, recurrent
from jaxformer.ops.hippo import legs
from jaxformer.ops.ssm_systems import DenseSystem, dense_bilinear


class Transition(Config, abstract=True):
  """Base of the ways to hold A, which starts as HiPPO-LegS."""

  def start(self, a_NN: Array, width: int) -> nnx.Param | None:
    """The parameter: [N, N], [H, N, N], or None."""
    raise NotImplementedError


class Fixed(Transition):
  """A stays as it is (LSSL-fixed)."""

  def start(self, a_NN, width):
    return None


class Shared(Transition):
  """One A is learned for all channels, whose steps differ; `lr_scale` is the factor on its learning
  rate."""

  lr_scale: float = 0.01

  def start(self, a_NN, width):
    return recurrent(a_NN, ('state', None), self.lr_scale)


class PerChannel(Transition):
  """Each channel learns its own A; `lr_scale` is the factor on its learning rate."""

  lr_scale: float = 0.01

  def start(self, a_NN, width):
    return recurrent(
      jnp.broadcast_to(a_NN[None], (width, *a_NN.shape)), ('inner', 'state', None), self.lr_scale
    )


class LSSL(StateSpace):
  """x' = A x + B u, y_m = C_m x + D_m u for m = 1 .. copies, with a dense A, by Tustin's rule with
  each channel's own step; then GELU and a projection of all copies of all channels to the width.

  A and B start as HiPPO-LegS; B is not learned.
  """

  class Config(StateSpaceConfig):
    """
    Attributes:
      transition: `Fixed`, `Shared` or `PerChannel`: what of A is learned.
      copies: outputs M a channel, which read the same state.
    """

    transition: Transition = Shared()
    copies: int = 1

    def validate(self):
      super().validate()
      self.require(self.copies > 0, 'copies', 'positive')

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> LSSL:
      return LSSL(self, width, rngs, position)

    @classmethod
    def examples(cls) -> tuple[LSSL.Config, ...]:
      return cls(d_state=5, copies=2, transition=PerChannel()), cls(
        d_state=4, transition=Fixed(), copies=2, causal=False
      )

    def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
      # the recurrence
      return self.directions * width * self.d_state * (2.0 * self.d_state + 2.0 + 2.0 * self.copies)

  def __init__(self, config: LSSL.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position, outputs=config.copies, gated=False)
    c = config
    self.copies = c.copies
    self.a = c.transition.start(jnp.asarray(legs(c.d_state)[0], jnp.float32), width)
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
      a_HNN, jnp.broadcast_to(b[None], (self.width, N)), jnp.exp(self.log_dt[...])
    )
    return DenseSystem(d, bbar, self.c[...][direction * M : (direction + 1) * M])
