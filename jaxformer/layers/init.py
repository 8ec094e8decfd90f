"""Initialization of parameters, as data: `init(key, shape, fan_in, position)` returns fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxformer.config import Config
from jaxformer.layers.layer import LayerPosition

TRUNCATED_STD = 0.87962566103423978  # of N(0, 1) truncated at -2 and 2


class Init(Config, abstract=True):
  """Base of the initializations."""

  def __call__(
    self, key: Array, shape: Sequence[int], fan_in: int, position: LayerPosition
  ) -> Array:
    raise NotImplementedError


class Normal(Init):
  """N(0, std^2).

  Attributes:
    residual: divide by sqrt(branches), so that the sum over the residual branches of the stack
      keeps its scale at any depth: the output projections of GPT-2 (Radford et al. 2019, section
      2.3).
  """

  std: float = 0.02
  residual: bool = False

  def __call__(self, key, shape, fan_in, position):
    std = self.std / math.sqrt(position.branches) if self.residual else self.std
    return std * jax.random.normal(key, shape, jnp.float32)


class Uniform(Init):
  """U(-bound, bound), independent of the shape (Sutskever et al. 2014, section 3.4: 0.08)."""

  bound: float = 0.08

  def __call__(self, key, shape, fan_in, position):
    return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound)


class FanInNormal(Init):
  """N(0, gain^2 / fan_in) (LeCun et al. 1998).

  Attributes:
    truncated: at two standard deviations, and scaled to the same variance, as
      `jax.nn.initializers.lecun_normal`.
  """

  gain: float = 1.0
  truncated: bool = False

  def __call__(self, key, shape, fan_in, position):
    if not self.truncated:
      return self.gain / math.sqrt(fan_in) * jax.random.normal(key, shape, jnp.float32)
    drawn = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return self.gain / math.sqrt(fan_in) / TRUNCATED_STD * drawn


class FanInUniform(Init):
  """U(-gain / sqrt(fan_in), gain / sqrt(fan_in)): with gain 1 PyTorch's default for `Linear`.

  Attributes:
    residual: divide by sqrt(branches): the output projections of Mamba
      (`rescale_prenorm_residual` in the authors' code).
  """

  gain: float = 1.0
  residual: bool = False

  def __call__(self, key, shape, fan_in, position):
    bound = self.gain / math.sqrt(fan_in)
    drawn = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return drawn / math.sqrt(position.branches) if self.residual else drawn


class GlorotUniform(Init):
  """U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out)): the variance is gain^2 over the mean of
  both (Glorot and Bengio 2010, eq. 16)."""

  gain: float = 1.0

  def __call__(self, key, shape, fan_in, position):
    bound = self.gain * math.sqrt(6.0 / (fan_in + shape[-1]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Zeros(Init):
  """Zeros, for a residual branch that starts as the identity."""

  def __call__(self, key, shape, fan_in, position):
    return jnp.zeros(shape, jnp.float32)


class Ones(Init):
  """Ones."""

  def __call__(self, key, shape, fan_in, position):
    return jnp.ones(shape, jnp.float32)


class Orthogonal(Init):
  """A (semi-)orthogonal matrix [in, out], times `gain` (Saxe et al. 2014). With `wide`, times
  sqrt(out / in) where out > in as well, which is how RWKV draws the weights that its code stores as
  [out, in]."""

  gain: float = 1.0
  wide: bool = True

  def __call__(self, key, shape, fan_in, position):
    rows, columns = shape
    gain = self.gain * (math.sqrt(columns / rows) if self.wide and columns > rows else 1.0)
    # One matrix after the other where layers are built stacked: jaxlib divides a batch of QR
    # decompositions over the threads that also run the devices, and on several devices of a CPU
    # with few cores all of them then wait for each other (jaxlib 0.10.2).
    draw = jax.custom_batching.sequential_vmap(
      lambda k: jax.nn.initializers.orthogonal()(k, tuple(shape), jnp.float32)
    )
    return gain * draw(key)
