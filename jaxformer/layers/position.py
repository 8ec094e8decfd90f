"""Position encodings: rotary and ALiBi inside attention, learned and sinusoidal added to the
embeddings."""

from __future__ import annotations

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import Config, InputError
from jaxformer.layers.dense import EmbeddingTable
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.rotary_scaling import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  RotaryScaling,
  YarnScaling,
)

__all__ = [
  'Alibi',
  'AttentionPosition',
  'DynamicScaling',
  'LearnedPositions',
  'LinearScaling',
  'Llama3Scaling',
  'LogTemperature',
  'PositionConfig',
  'Rotary',
  'RotaryScaling',
  'SinusoidalPositions',
  'YarnScaling',
]

# ---- inside attention --------------------------------------------------------------------------


class AttentionPosition(Config, abstract=True):
  """Base of the position encodings inside attention: `Rotary` rotates queries and keys, `Alibi`
  adds a bias to the logits, `LogTemperature` scales queries."""

  def check(self, head_dim: int, field: str) -> None:
    """Raise `InputError` for `field` if heads of this dimension cannot be encoded."""

  def rotate(
    self, x: Float[Array, 'B T H K'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    """Return queries or keys, rotated by their positions."""
    return x

  def scale_queries(
    self, q: Float[Array, 'B T H K'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    """Return queries times a factor of their positions."""
    return q

  def slopes(self, heads: int) -> np.ndarray | None:
    """Return the slope of each head's linear bias; None for no bias."""
    return None


class Rotary(AttentionPosition):
  """Rotary position embedding (Su et al. 2021, section 3.2): of the R channels of a head that are
  rotated, pair (i, i + R/2) is rotated by position x theta^(-2i/R).

  Halves are paired as in the Hugging Face checkpoints; Meta's originals pair neighbors
  (`interleaved`), which is the same up to a permutation of each head's query and key rows.

  Attributes:
    theta: the base.
    scaling: of the frequencies; None for none.
    fraction: of the channels of a head that are rotated, the first ones: R = fraction x K.
    interleaved: whether neighbors (2i, 2i + 1) are paired (DeepSeek, Llama 4).
  """

  theta: float = 10000.0
  scaling: RotaryScaling | None = None
  fraction: float = 1.0
  interleaved: bool = False

  def validate(self) -> None:
    self.require(0 < self.theta < math.inf, 'theta', 'positive and finite')
    self.require(0 < self.fraction <= 1, 'fraction', 'above 0 and at most 1')

  def check(self, head_dim: int, field: str) -> None:
    if self.fraction == 1 and head_dim % 2:
      raise InputError(field, head_dim, 'even with rotary positions')
    rotated = self.rotated(head_dim)
    if not rotated or rotated % 2:
      problem = (
        f'rotates {rotated} of {head_dim} channels of a head, must be an even number above 0'
      )
      raise InputError('Rotary.fraction', self.fraction, problem=problem)

  def rotated(self, head_dim: int) -> int:
    """R, the number of channels that are rotated."""
    return int(head_dim * self.fraction)

  def frequencies(self, head_dim: int) -> np.ndarray:
    """The R/2 angular frequencies, float64."""
    R = self.rotated(head_dim)
    f = self.theta ** (-np.arange(0, R, 2, dtype=np.float64) / R)
    return f if self.scaling is None else self.scaling.apply(f, self.theta)

  def rotate(
    self, x: Float[Array, 'B T H K'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    R = self.rotated(x.shape[-1])
    frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if self.scaling is not None and self.scaling.amplitude != 1.0:
      cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
    turned, kept = x[..., :R].astype(jnp.float32), x[..., R:]
    if self.interleaved:
      pairs = turned.reshape(*turned.shape[:-1], -1, 2)
      a, b = pairs[..., 0], pairs[..., 1]
      y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
      a, b = turned[..., : R // 2], turned[..., R // 2 :]
      y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    y = y.astype(x.dtype)
    return y if x.shape[-1] == R else jnp.concatenate([y, kept], axis=-1)


class Alibi(AttentionPosition):
  """Attention with linear biases (Press et al. 2022): head h adds -m_h |t - s| to its logits, m_h =
  2^(-8 h / H), h = 1..H.

  If the number of heads is no power of two, the slopes of the next lower power are followed by
  every second slope of the next higher one, as in the authors' code."""

  def slopes(self, heads: int) -> np.ndarray:
    lower = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
    finer = 2.0 ** (-8 * np.arange(1, 2 * lower + 1) / (2 * lower))
    return np.concatenate([slopes, finer[0::2][: heads - lower]]).astype(np.float32)


class LogTemperature(AttentionPosition):
  """No positions but a temperature: queries at position p = 0, 1, ... are multiplied by 1 + rate
  log(1 + floor((p + 1) / interval)), so that attention over long sequences does not flatten
  (Nakanishi 2025, "Scalable-softmax is superior for attention"; in this form Llama 4)."""

  interval: int = 8192
  rate: float = 0.1

  def validate(self) -> None:
    self.require_positive('interval', 'rate')

  def scale_queries(self, q, positions):
    steps = jnp.floor_divide(positions + 1, self.interval).astype(jnp.float32)
    factor = 1.0 + self.rate * jnp.log1p(steps)
    return (q * factor[:, :, None, None]).astype(q.dtype)


# ---- added to embeddings -----------------------------------------------------------------------


class PositionConfig(Config, abstract=True):
  """Base of the configs of positions that are added to embeddings."""

  bounded: ClassVar[bool] = False  # whether positions end at the model's context length

  def build(self, width: int, context_length: int, rngs: nnx.Rngs) -> nnx.Module:
    raise NotImplementedError


class LearnedPositions(PositionConfig):
  """A table with one trained vector per position up to the model's context length (GPT-2)."""

  init: Init = Normal(std=0.01)

  bounded: ClassVar[bool] = True

  def build(self, width: int, context_length: int, rngs: nnx.Rngs) -> EmbeddingTable:
    return EmbeddingTable(self.init, (context_length, width), ('positions', 'embed'), rngs=rngs)


class SinusoidalPositions(nnx.Module):
  """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(the same) (Vaswani et al. 2017, section
  3.5), interleaved as in the paper."""

  class Config(PositionConfig):
    """
    Attributes:
      halves: True puts all sines before all cosines, as in the authors' code and in Marian: the
        same up to the order of the channels.
    """

    halves: bool = False

    def build(self, width: int, context_length: int, rngs: nnx.Rngs) -> SinusoidalPositions:
      return SinusoidalPositions(self, width)

  def __init__(self, config: SinusoidalPositions.Config, width: int):
    self.width, self.axis = width, -2 if config.halves else -1

  def __call__(self, positions: Int[Array, '*B']) -> Float[Array, '*B D']:
    f = 10000.0 ** (-np.arange(0, self.width, 2, dtype=np.float64) / self.width)
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(f, jnp.float32).reshape(
      (1,) * positions.ndim + (-1,)
    )
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=self.axis).reshape(
      *positions.shape, -1
    )[..., : self.width]
