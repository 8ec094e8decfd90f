"""S4D: diagonal state spaces (Gu, Gupta, Goel and Re 2022, 'On the Parameterization and
Initialization of Diagonal State Space Models')."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxformer.config import Config
from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.state_space import (
  PairedConfig,
  StateSpace,
  complex_normal,
  paired,
  pairs,
  recurrent,
)
from jaxformer.ops.hippo import legs_dplr
from jaxformer.ops.ssm_systems import DiagonalSystem, bilinear, zoh


class Spectrum(Config, abstract=True):
  """Base of the initial values of A and B for N real numbers of state: N / 2 complex numbers, the
  other half their conjugates."""

  def values(self, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B, complex."""
    raise NotImplementedError


class Lin(Spectrum):
  """A_n = -1/2 + i pi n, B = 1 (section 4.3, S4D-Lin)."""

  def values(self, size):
    n = np.arange(size // 2)
    return -0.5 + 1j * np.pi * n, np.ones(size // 2)


class Inv(Spectrum):
  """A_n = -1/2 + i N / pi (N / (2n + 1) - 1), B = 1 (section 4.3, S4D-Inv), which approximates
  `LegS`."""

  def values(self, size):
    n = np.arange(size // 2)
    return -0.5 + 1j * size / np.pi * (size / (2 * n + 1) - 1), np.ones(size // 2)


class LegS(Spectrum):
  """The diagonal part of HiPPO-LegS and its B in that basis (section 4.2, S4D-LegS)."""

  def values(self, size):
    a, _, b = legs_dplr(size)
    return a, b


class Real(Spectrum):
  """A_n = -(n + 1), B = 1 (section 4.3, S4D-Real). Frequencies start at 0 and are learned like
  those of the others."""

  def values(self, size):
    n = np.arange(size // 2)
    return -(n + 1.0) + 0j, np.ones(size // 2)


class Discretisation(Config, abstract=True):
  """Base of the rules that make a continuous system discrete."""

  def __call__(self, a_HP: Array, b_HP: Array, dt_H: Array) -> tuple[Array, Array]:
    """log Abar and Bbar."""
    raise NotImplementedError


class Zoh(Discretisation):
  """Zero-order hold: the input is constant over a step."""

  def __call__(self, a_HP, b_HP, dt_H):
    return zoh(a_HP, b_HP, dt_H)


class Bilinear(Discretisation):
  """Tustin's rule: the trapezoid over a step."""

  def __call__(self, a_HP, b_HP, dt_H):
    return bilinear(a_HP, b_HP, dt_H)


class S4D(StateSpace):
  """x' = A x + B u, y = 2 Re(C x) + D u with diagonal A for each channel, discretised with the
  channel's own step; then GELU and a gated projection.

  A = -exp(log_decay) + i frequency stays stable. A, B and the step learn with `lr_scale` and
  without weight decay; C is a weight like others."""

  class Config(PairedConfig):
    """
    Attributes:
      spectrum: where A and B start: `Lin`, `Inv`, `LegS` or `Real`.
      discretisation: `Zoh` or `Bilinear`.
    """

    spectrum: Spectrum = Lin()
    discretisation: Discretisation = Zoh()

    def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> S4D:
      return S4D(self, width, rngs, position)

    @classmethod
    def examples(cls) -> tuple[S4D.Config, ...]:
      return cls(d_state=6, spectrum=LegS(), discretisation=Bilinear()), cls(
        d_state=4, causal=False
      )

  def __init__(self, config: S4D.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    c, shape = config, (width, config.d_state // 2)
    self.discretisation = c.discretisation
    a, b = (
      jnp.broadcast_to(jnp.asarray(v, jnp.complex64)[None], shape)
      for v in c.spectrum.values(c.d_state)
    )
    self.log_decay = recurrent(jnp.log(-a.real), ('inner', 'state'), c.lr_scale)
    self.frequency = recurrent(a.imag, ('inner', 'state'), c.lr_scale)
    self.b = recurrent(pairs(b), ('inner', 'state', None), c.lr_scale)
    self.c = recurrent(
      pairs(complex_normal(rngs.params(), (c.directions, *shape))),
      (None, 'inner', 'state', None),
      decay=True,
    )

  def system(self, direction: int = 0) -> DiagonalSystem:
    a = jax.lax.complex(-jnp.exp(self.log_decay[...]), self.frequency[...])
    log_a, b = self.discretisation(a, paired(self.b), jnp.exp(self.log_dt[...]))
    return DiagonalSystem(log_a, b, paired(self.c)[direction : direction + 1])
