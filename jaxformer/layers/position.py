"""Position encodings: rotary and ALiBi inside attention, learned and sinusoidal added to the
embeddings."""

from __future__ import annotations

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import Config
from jaxformer.layers.dense import EmbeddingTable
from jaxformer.layers.init import Init, Normal

# ---- inside attention --------------------------------------------------------------------------


class AttentionPosition(Config, abstract=True):
  """Base of the position encodings inside attention: `Rotary` rotates queries and keys, `Alibi`
  adds a bias to the logits."""

  rotates: ClassVar[bool] = False  # which needs an even head dimension

  def rotate(
    self, x: Float[Array, 'B T H K'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    """Return queries or keys, rotated by their positions."""
    return x

  def slopes(self, heads: int) -> np.ndarray | None:
    """Return the slope of each head's linear bias; None for no bias."""
    return None


class Llama3Scaling(Config):
  """Llama 3.1's scaling of rotary frequencies to longer contexts.

  With wavelength 2 pi / f: frequencies whose wavelength is below `original_context / high` are
  kept, those above `original_context / low` are divided by `factor`, and between them f' = (1 - s)
  f / factor + s f with s = (original_context / wavelength - low) / (high - low)."""

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original_context: int = 8192

  def validate(self) -> None:
    self.require_positive('factor', 'low', 'original_context')
    self.require(self.high > self.low, 'high', f'above low, {self.low:g}')

  def apply(self, frequencies: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    s = np.clip((self.original_context / wavelength - self.low) / (self.high - self.low), 0.0, 1.0)
    return (1 - s) * frequencies / self.factor + s * frequencies


class Rotary(AttentionPosition):
  """Rotary position embedding (Su et al. 2021, section 3.2): pair (i, i + K/2) of a head is rotated
  by position x theta^(-2i/K).

  Halves are paired as in the Hugging Face checkpoints; Meta's originals pair neighbors, which is
  the same up to a permutation of each head's query and key rows."""

  theta: float = 10000.0
  scaling: Llama3Scaling | None = None

  rotates: ClassVar[bool] = True

  def validate(self) -> None:
    self.require(0 < self.theta < math.inf, 'theta', 'positive and finite')

  def frequencies(self, head_dim: int) -> np.ndarray:
    """The K/2 angular frequencies, float64."""
    f = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return f if self.scaling is None else self.scaling.apply(f)

  def rotate(
    self, x: Float[Array, 'B T H K'], positions: Int[Array, 'B T']
  ) -> Float[Array, 'B T H K']:
    half = x.shape[-1] // 2
    frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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
