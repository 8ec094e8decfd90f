"""Soft caps on logits (Gemma Team 2024, "Gemma 2", section 2)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def soft_cap(logits: Array, cap: float | None) -> tuple[Array, Array | None]:
  """cap tanh(logits / cap) and its derivative; the logits as they are and None without a cap."""
  if cap is None:
    return logits, None
  t = jnp.tanh(logits / cap)
  return cap * t, 1.0 - jnp.square(t)
