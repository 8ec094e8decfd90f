"""Many small systems of linear equations at once.

On a CPU, LAPACK's batched solver waits for threads of the pool in which it runs itself: several
devices that solve at the same time hold all threads and deadlock. There the elimination below is
used.

Dims: H systems, N unknowns, M right-hand sides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxformer.ops.implementation import Operation
from jaxformer.sharding import platform


def solve(a_HNN: Float[Array, 'H N N'], b_HNM: Float[Array, 'H N M']) -> Float[Array, 'H N M']:
  """a^{-1} b for each of H systems."""
  return SOLVE[SOLVE.choose()](a_HNN, b_HNM)


@jax.custom_vjp
def _solve(a, b):
  """Gauss-Jordan elimination with partial pivoting (Golub and Van Loan, Matrix Computations,
  section 3.4)."""
  N, rows = a.shape[-1], jnp.concatenate([a, b], axis=-1)
  index = jnp.arange(N)[None]

  def eliminate(k, rows):
    column = lax.dynamic_index_in_dim(rows, k, axis=2, keepdims=False)
    pivot = jnp.argmax(jnp.where(index < k, -1.0, jnp.abs(column)), axis=1, keepdims=True)
    order = jnp.where(index == k, pivot, jnp.where(index == pivot, k, index))
    rows = jnp.take_along_axis(rows, order[..., None], axis=1)
    column = lax.dynamic_index_in_dim(rows, k, axis=2)
    row = lax.dynamic_index_in_dim(rows, k, axis=1) / lax.dynamic_index_in_dim(column, k, axis=1)
    return jnp.where((index == k)[..., None], row, rows - column * row)

  return lax.fori_loop(0, N, eliminate, rows)[..., N:]


def _forward(a, b):
  x = _solve(a, b)
  return x, (a, x)


def _backward(saved, dx):
  a, x = saved
  db = _solve(jnp.swapaxes(a, 1, 2), dx)
  return -jnp.matmul(db, jnp.swapaxes(x, 1, 2), precision='highest'), db


_solve.defvjp(_forward, _backward)

SOLVE = Operation(
  'solve',
  {'naive': jnp.linalg.solve, 'elimination': _solve},
  lambda: ('elimination',) if platform() == 'cpu' else ('naive',),
)
