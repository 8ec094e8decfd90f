"""Normalization over the width or over each head. Statistics are taken in fp32; the result is cast
back and then scaled, as in Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.sharding import param


class NormConfig(Config, abstract=True):
  """Base of the configs of norms.

  Attributes:
    eps: added to the variance.
  """

  eps: float = 1e-5

  def build(self, width: int) -> nnx.Module:
    raise NotImplementedError


def _normalized(x: Array, eps: float, centered: bool = True) -> Array:
  """x over the root of its mean square along the last axis, without its mean if `centered`."""
  x32 = x.astype(jnp.float32)
  if centered:
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return y.astype(x.dtype)


def _row(vector: nnx.Param, ndim: int) -> Array:
  return vector[...].reshape((1,) * (ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, eq. 4)."""

  class Config(NormConfig):
    def build(self, width: int) -> RMSNorm:
      return RMSNorm(self, width)

  def __init__(self, config: RMSNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    return _normalized(x, self.eps, centered=False) * _row(self.scale, x.ndim)


class LayerNorm(nnx.Module):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, eq. 4)."""

  class Config(NormConfig):
    """
    Attributes:
      bias: False for a scale alone.
    """

    bias: bool = True

    def build(self, width: int) -> LayerNorm:
      return LayerNorm(self, width)

  def __init__(self, config: LayerNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)
    self.bias = param(jnp.zeros(width), ('norm',), decay=False) if config.bias else None

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    y = _normalized(x, self.eps) * _row(self.scale, x.ndim)
    return y if self.bias is None else y + _row(self.bias, x.ndim)


class HeadNorm(nnx.Module):
  """y_h = (x_h - mean(x_h)) / sqrt(var(x_h) + eps), flattened, then * scale + bias: GroupNorm with
  one group per head (Wu and He 2018, section 3.1; RWKV-5 to 7)."""

  class Config(NormConfig):
    def build(self, width: int) -> HeadNorm:
      return HeadNorm(self, width)

  def __init__(self, config: HeadNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)
    self.bias = param(jnp.zeros(width), ('norm',), decay=False)

  def __call__(self, x: Float[Array, '*B H K']) -> Float[Array, '*B D']:
    y = _normalized(x, self.eps).reshape(*x.shape[:-2], -1)
    return y * _row(self.scale, y.ndim) + _row(self.bias, y.ndim)
