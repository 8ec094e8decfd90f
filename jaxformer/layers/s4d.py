"""S4D: diagonal state spaces (Gu, Gupta, Goel and Re 2022, 'On the Parameterization and
Initialization of Diagonal State Space Models')."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
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
from jaxformer.ops.ssm_systems import DiagonalSystem, bilinear, zoh

SpectrumName = Literal['lin', 'inv', 'legs', 'real']
DiscretizationName = Literal['zoh', 'bilinear']

# Tustin's rule is the trapezoid over a step; with a zero-order hold the input is constant over it.
DISCRETIZATIONS = {'zoh': zoh, 'bilinear': bilinear}


# A by name for a state of N real numbers: n = 0 .. N / 2 - 1, the other half their conjugates.
_SPECTRA: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  'lin': lambda n, N: -0.5 + 1j * np.pi * n,
  'inv': lambda n, N: -0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1),
  'real': lambda n, N: -(n + 1.0) + 0j,
}


def spectrum(name: SpectrumName, d_state: int) -> tuple[np.ndarray, np.ndarray]:
  """Return the initial A and B, complex (Gu, Gupta et al. 2022, sections 4.2 and 4.3).

  `lin` (S4D-Lin): A_n = -1/2 + i pi n. `inv` (S4D-Inv), which approximates `legs`: A_n = -1/2 + i N
  / pi (N / (2n + 1) - 1). `real` (S4D-Real): A_n = -(n + 1), whose frequencies are trained from 0.
  All three with B = 1. `legs` (S4D-LegS): the diagonal part of HiPPO-LegS and its B in that
  basis (`ops.hippo.legs_dplr`)."""
  if name == 'legs':
    a, _, b = legs_dplr(d_state)
    return a, b
  n = np.arange(d_state // 2)
  return _SPECTRA[name](n, d_state), np.ones(d_state // 2)


def diagonal(
  name: SpectrumName, count: int, d_state: int, axis: str | None = 'inner', **rates: Any
) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
  """Parameters for A (`poles`) and for B of several diagonal systems."""
  a, b = (copies(v, count) for v in spectrum(name, d_state))
  return *poles(a, axis, **rates), recurrent(pairs(b), (axis, 'state', None), **rates)


class S4D(StateSpace):
  """x' = A x + B u, y = 2 Re(C x) + D u with a diagonal A per channel, then GELU and a gated
  projection (Gu, Gupta et al. 2022, section 3).

  Each channel has its own step size. A = -exp(log_decay) + i frequency stays stable. A, B and the
  step sizes have `lr_scale` and no weight decay; C is a weight like others."""

  class Config(ChannelSystemConfig):
    """
    Attributes:
      spectrum: initialization of A and B (`spectrum`).
      discretization: `zoh`, zero-order hold, or `bilinear`, Tustin's rule.
    """

    spectrum: SpectrumName = 'lin'
    discretization: DiscretizationName = 'zoh'

    @classmethod
    def examples(cls):
      return (
        cls(d_state=6, spectrum='legs', discretization='bilinear'),
        cls(d_state=4, causal=False, n_ssm=2, dt_transform='softplus'),
      )

  def __init__(self, config: S4D.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    super().__init__(config, width, rngs, position)
    c, shape = config, (width, config.d_state // 2)
    self.discretize = DISCRETIZATIONS[c.discretization]
    self.log_decay, self.frequency, self.b = diagonal(
      c.spectrum, c.independent(width), c.d_state, c.systems_axis, **c.rates
    )
    self.c = recurrent(
      pairs(complex_normal(rngs.params(), (c.directions, *shape))),
      (None, 'inner', 'state', None),
      decay=True,
    )

  def system(self, direction: int = 0) -> DiagonalSystem:
    values = stable(self.log_decay, self.frequency), paired(self.b)
    a, b = (per_channel(v, self.width) for v in values)
    log_a, b = self.discretize(a, b, step_sizes(self.log_dt, self.config))
    return DiagonalSystem(log_a, b, paired(self.c)[direction : direction + 1])
