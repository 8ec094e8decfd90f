"""Numbers of packed documents."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def count_starts(starts: Array, axis: int = 1, dtype: Any = jnp.int32) -> Array:
  """Return how many documents have started up to each position along an axis: 0 in the document
  that continues from before."""
  # Where documents are not packed, `starts` is a constant, and XLA would add it up while it
  # compiles: in time quadratic in the length, for the rows of all devices.
  return jnp.cumsum(lax.optimization_barrier(starts), axis=axis, dtype=dtype)
