"""Normalisation over the width. Statistics are taken in fp32, the result is cast back and then
scaled, as Llama does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.sharding import param


class NormConfig(Config, abstract=True):
  """Base of the norms' configs."""

  eps: float = 1e-5

  def build(self, width: int) -> nnx.Module:
    raise NotImplementedError


def _scaled(x: Array, scale: Array) -> Array:
  return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class RMSNorm(nnx.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, eq. 4)."""

  class Config(NormConfig):
    def build(self, width: int) -> RMSNorm:
      return RMSNorm(self, width)

  def __init__(self, config: RMSNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return _scaled(y.astype(x.dtype), self.scale[...])


class LayerNorm(nnx.Module):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016); `bias` False leaves
  out the bias."""

  class Config(NormConfig):
    bias: bool = True

    def build(self, width: int) -> LayerNorm:
      return LayerNorm(self, width)

  def __init__(self, config: LayerNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)
    self.bias = param(jnp.zeros(width), ('norm',), decay=False) if config.bias else None

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
    y = _scaled(y.astype(x.dtype), self.scale[...])
    return y if self.bias is None else y + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


class HeadNorm(nnx.Module):
  """LayerNorm of each head by itself, with a scale and a bias for every channel of all heads (Wu
  and He 2018 with a group a head; RWKV-5 to 7): y_h = (x_h - mean(x_h)) / sqrt(var(x_h) + eps),
  flattened, then * scale + bias."""

  class Config(NormConfig):
    def build(self, width: int) -> HeadNorm:
      return HeadNorm(self, width)

  def __init__(self, config: HeadNorm.Config, width: int):
    self.eps = config.eps
    self.scale = param(jnp.ones(width), ('norm',), decay=False)
    self.bias = param(jnp.zeros(width), ('norm',), decay=False)

  def __call__(self, x: Float[Array, '*B H K']) -> Float[Array, '*B D']:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
    y = _scaled(y.astype(x.dtype).reshape(*x.shape[:-2], -1), self.scale[...])
    return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))
