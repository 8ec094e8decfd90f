"""Scales and soft caps of logits (Gemma Team 2024, "Gemma 2", section 2)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def scaled_and_capped(
  logits: Array, scale: float | None, cap: float | None
) -> tuple[Array, Array | float | None]:
  """cap tanh(scale logits / cap) and its derivative by the logits; None for the factor 1, or for no
  cap. The derivative is a number without a cap, and None with neither."""
  y, slope = soft_cap(logits if scale is None else scale * logits, cap)
  if scale is None:
    return y, slope
  return y, scale if slope is None else scale * slope


def soft_cap(logits: Array, cap: float | None) -> tuple[Array, Array | None]:
  """cap tanh(logits / cap) and its derivative; the logits as they are and None without a cap."""
  if cap is None:
    return logits, None
  t = jnp.tanh(logits / cap)
  return cap * t, 1.0 - jnp.square(t)
