"""The product with a weight matrix."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.sharding import platform


def linear(x: Float[Array, '*B D'], w_DF: Float[Array, 'D F'], b_F: Float[Array, ' F'] | None = None) -> Float[Array, '*B F']:
  """x W + b over the last axis."""
  if platform() == 'cpu' and x.ndim > 2:
    # XLA:CPU gives plain matrices to its fast matmul; contractions with several leading axes lose it in the backward pass.
    y = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w_DF).reshape(*x.shape[:-1], w_DF.shape[-1])
  else:
    y = jnp.einsum('...D,DF->...F', x, w_DF)
  return y if b_F is None else y + b_F.reshape((1,) * (y.ndim - 1) + (-1,))
