"""Products with a weight matrix."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.sharding import platform, shards


def linear(
  x: Float[Array, '*B D'], w_DF: Float[Array, 'D F'], b_F: Float[Array, ' F'] | None = None
) -> Float[Array, '*B F']:
  """x W + b over the last axis."""
  if platform() == 'cpu' and x.ndim > 1 and (x.ndim < 3 or shards('time', x.shape[1]) == 1):
    # XLA:CPU has a fast matmul for plain matrices; contractions with several leading axes do not
    # use it in the backward pass. Rows sharded along two axes would be all-gathered.
    y = _matmul(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w_DF).reshape(
      *x.shape[:-1], w_DF.shape[-1]
    )
  else:
    y = jnp.einsum('...D,DF->...F', x, w_DF)
  return y if b_F is None else y + b_F.reshape((1,) * (y.ndim - 1) + (-1,))


@jax.custom_vjp
def _matmul(x_ND, w_DF):
  return x_ND @ w_DF


def _forward(x_ND, w_DF):
  return x_ND @ w_DF, (x_ND, w_DF)


def _backward(saved, dy_NF):
  x_ND, w_DF = saved
  # On XLA:CPU a product with a transposed left side is slower than materializing the transpose of
  # the narrower side first.
  if x_ND.shape[1] <= dy_NF.shape[1]:
    dw_DF = jax.lax.optimization_barrier(x_ND.T) @ dy_NF
  else:
    dw_DF = (jax.lax.optimization_barrier(dy_NF.T) @ x_ND).T
  return dy_NF @ w_DF.T, dw_DF


_matmul.defvjp(_forward, _backward)
