"""Normalization over the width or over each head. Statistics are taken in fp32; the result is cast
back and then scaled, as in Llama, or scaled first, as in Gemma (`RMSNorm.unit_offset`).

Each norm is a type of config; all share one module, `Norm`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import Config
from jaxformer.sharding import param


def normalized(x: Float[Array, '*B D'], eps: float, *, centered: bool) -> Float[Array, '*B D']:
  """Return x over the root of its mean square along the last axis, in fp32 and without its mean if
  `centered`."""
  x = x.astype(jnp.float32)
  if centered:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis.

  Args:
    centered: False leaves the mean in x, and divides by the root of the mean square.
    bias: False for a scale alone.
    by_head: inputs are `[*B, H, K]`; each head is normalized, then all are flattened to the width
      and scaled.
    unit_offset: the factor is 1 + scale, with a scale that starts at 0, and is applied in fp32.
    scale: False for no parameters at all.
  """

  def __init__(
    self,
    width: int,
    eps: float,
    *,
    centered: bool = True,
    bias: bool = True,
    by_head: bool = False,
    unit_offset: bool = False,
    scale: bool = True,
  ):
    self.eps, self.centered, self.by_head = eps, centered, by_head
    self.unit_offset = unit_offset
    start = jnp.zeros(width) if unit_offset else jnp.ones(width)
    self.scale = param(start, ('norm',), decay=False) if scale else None
    self.bias = param(jnp.zeros(width), ('norm',), decay=False) if bias else None

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    y = normalized(x, self.eps, centered=self.centered)
    if not self.unit_offset:
      y = y.astype(x.dtype)
    if self.by_head:
      y = y.reshape(*x.shape[:-2], -1)
    row = (1,) * (y.ndim - 1) + (-1,)
    if self.scale is not None:
      scale = self.scale[...].reshape(row)
      y = (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype) if self.unit_offset else y * scale
    return y if self.bias is None else y + self.bias[...].reshape(row)


class NormConfig(Config, abstract=True):
  """Base of the norms.

  Attributes:
    eps: added to the variance.
  """

  eps: float = 1e-5

  def build(self, width: int) -> Norm:
    raise NotImplementedError


def build_norm(config: NormConfig | None, width: int) -> Norm | None:
  """Build a norm, if there is one."""
  return None if config is None else config.build(width)


class RMSNorm(NormConfig):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, eq. 4).

  Attributes:
    unit_offset: the factor is 1 + scale, with a scale that starts at 0, and is applied in fp32
      before the result is cast back (Gemma).
    scale: False for no factor: queries and keys in Llama 4. A norm of each head without one does
      not change with a rotation, so it is the same before rotary positions and after them.
  """

  unit_offset: bool = False
  scale: bool = True

  def validate(self):
    self.require(self.scale or not self.unit_offset, 'unit_offset', 'False without a scale')

  def build(self, width: int) -> Norm:
    options = {'unit_offset': self.unit_offset, 'scale': self.scale}
    return Norm(width, self.eps, centered=False, bias=False, **options)


class LayerNorm(NormConfig):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, eq. 4).

  Attributes:
    bias: False for a scale alone.
  """

  bias: bool = True

  def build(self, width: int) -> Norm:
    return Norm(width, self.eps, bias=self.bias)


class HeadNorm(Config):
  """y_h = (x_h - mean(x_h)) / sqrt(var(x_h) + eps), flattened, then * scale + bias: GroupNorm with
  one group per head (Wu and He 2018, section 3.1; RWKV-5 to 7). No `NormConfig`: its input has an
  axis of heads.

  Attributes:
    eps: added to the variance.
  """

  eps: float = 1e-5

  def build(self, width: int) -> Norm:
    return Norm(width, self.eps, by_head=True)
