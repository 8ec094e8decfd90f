"""Scalings of rotary frequencies to longer contexts than those of the training."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from jaxformer.config import Config


class RotaryScaling(Config, abstract=True):
  """Base of the scalings of rotary frequencies."""

  def apply(self, frequencies: Float[np.ndarray, ' R'], theta: float) -> Float[np.ndarray, ' R']:
    """Return the scaled frequencies of theta^(-i/R), i = 0..R-1, in float64."""
    raise NotImplementedError

  @property
  def amplitude(self) -> float:
    """Factor on the cosines and sines."""
    return 1.0


class LinearScaling(RotaryScaling):
  """Position interpolation: all frequencies are divided by `factor` (Chen et al. 2023, "Extending
  context window of large language models via positional interpolation", eq. 4)."""

  factor: float = 8.0

  def validate(self) -> None:
    self.require_positive('factor')

  def apply(self, frequencies, theta):
    return frequencies / self.factor


class DynamicScaling(RotaryScaling):
  """NTK-aware scaling for one length L: theta' = theta (factor L / original_context - factor +
  1)^(2R / (2R - 2)) for R frequencies.

  In `transformers` ("dynamic") L is the length of the longest call so far, where that is above
  `original_context`, so the result for a token depends on how a sequence is cut. Here it is a
  constant: `length` = `original_context` leaves the frequencies as they are, which is what
  `transformers` computes up to that length, and a larger one gives what it computes for a sequence
  of `length` tokens in one call.

  Attributes:
    factor: of the growth of theta.
    original_context: the longest sequence of the training.
    length: the length that the frequencies are for.
  """

  factor: float = 2.0
  original_context: int = 2048
  length: int = 4096

  def validate(self) -> None:
    self.require_positive('factor', 'original_context')
    self.require(
      self.length >= self.original_context,
      'length',
      f'at least original_context, {self.original_context}',
    )

  def apply(self, frequencies, theta):
    R = len(frequencies)
    if R == 1:
      return frequencies
    growth = self.factor * self.length / self.original_context - self.factor + 1
    return frequencies * growth ** (-np.arange(R) / (R - 1))


class Llama3Scaling(RotaryScaling):
  """Llama 3.1's scaling.

  With wavelength 2 pi / f: frequencies whose wavelength is below `original_context / high` are
  kept, those above `original_context / low` are divided by `factor`, and between them f' = (1 - s)
  f / factor + s f with s = (original_context / wavelength - low) / (high - low). Where `low` equals
  `high` there is nothing between (Llama 4 Scout)."""

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original_context: int = 8192

  def validate(self) -> None:
    self.require_positive('factor', 'low', 'original_context')
    self.require(self.high >= self.low, 'high', f'at least low, {self.low:g}')

  def apply(self, frequencies, theta):
    wavelength = 2 * math.pi / frequencies
    turns = self.original_context / wavelength
    if self.high == self.low:
      s = (turns >= self.low).astype(np.float64)
    else:
      s = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return (1 - s) * frequencies / self.factor + s * frequencies


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
  """Return 0.1 weight log(factor) + 1, YaRN's growth of queries and keys for contexts that are
  `factor` times longer (Peng et al. 2023, section 3.4); 1 for a factor of at most 1."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


class YarnScaling(RotaryScaling):
  """YaRN, "NTK by parts": frequency i becomes (1 - s_i) f_i / factor + s_i f_i (Peng et al. 2023,
  section 3.2).

  s falls linearly in i from 1, where a frequency turns `beta_fast` times within `original_context`,
  to 0, where it turns `beta_slow` times. Cosines and sines are multiplied by `attention_factor` or,
  where that is None, by `yarn_magnitude(factor)`, or by yarn_magnitude(factor, mscale) /
  yarn_magnitude(factor, mscale_all_dim) (DeepSeek-V2).

  Attributes:
    factor: of the growth of the context.
    original_context: the longest sequence of the training before.
    beta_fast, beta_slow: turns.
    attention_factor: on cosines and sines; None for the value that follows from `factor`.
    mscale, mscale_all_dim: weights in that value; both or neither, and neither with
      `attention_factor`.
    truncate: whether the ends of the ramp are rounded outwards to whole frequencies.
  """

  factor: float = 8.0
  original_context: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def validate(self) -> None:
    self.require_positive('factor', 'original_context', 'beta_fast', 'beta_slow')
    self.require_positive('attention_factor', 'mscale', 'mscale_all_dim')
    self.require(
      self.beta_fast > self.beta_slow, 'beta_fast', f'above beta_slow, {self.beta_slow:g}'
    )
    both = (self.mscale is None) == (self.mscale_all_dim is None)
    self.require(both, 'mscale_all_dim', 'given with mscale, or none without it')
    one = self.mscale is None or self.attention_factor is None
    self.require(one, 'attention_factor', 'none where mscale is given')

  def apply(self, frequencies, theta):
    R = len(frequencies)

    def turning(turns: float) -> float:
      """The index of the frequency that turns so often within the original context."""
      return R * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = turning(self.beta_fast), turning(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * R - 1)
    # as in the authors' code, where both ends may be the same
    last = last + 0.001 if first == last else last
    s = 1 - np.clip((np.arange(R) - first) / (last - first), 0.0, 1.0)
    return (1 - s) * frequencies / self.factor + s * frequencies

  @property
  def amplitude(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale is not None and self.mscale_all_dim is not None:
      weights = self.mscale, self.mscale_all_dim
      numerator, denominator = (yarn_magnitude(self.factor, w) for w in weights)
      return numerator / denominator
    return yarn_magnitude(self.factor)
