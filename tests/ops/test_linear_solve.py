"""Systems of linear equations: elimination against NumPy in float64, its gradients against the
library's, and many devices at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.linear_solve import solve
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.helpers import forced

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(6, 12, 12)), RNG.normal(size=(6, 12, 3))


def test_solution_needs_pivots_and_is_that_of_numpy():
  a = A.copy()
  a[:, 0, 0] = 0.0  # no elimination without exchanging rows
  x = forced(solve, solve='elimination')(jnp.asarray(a, jnp.float32), jnp.asarray(B, jnp.float32))
  wanted = np.linalg.solve(a, B)
  for mine, true, condition in zip(
    np.asarray(x, np.float64), wanted, np.linalg.cond(a), strict=True
  ):
    assert np.abs(mine - true).max() < 1e-6 * condition * np.abs(true).max()


def test_gradients_are_those_of_the_library():
  def value(a, b, chosen):
    return jnp.sum(jnp.sin(forced(solve, solve=chosen)(a, b)))

  a, b = jnp.asarray(A + 4 * np.eye(12), jnp.float32), jnp.asarray(B, jnp.float32)
  for mine, library in zip(
    *(jax.grad(value, argnums=(0, 1))(a, b, r) for r in ('elimination', 'naive')), strict=True
  ):
    np.testing.assert_allclose(mine, library, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('turn', range(3))
def test_eight_devices_that_solve_at_once_all_come_to_an_end(turn):
  """Batched LAPACK does not: its parts wait for threads that the other devices hold."""
  with use_mesh(make_parallel(MeshConfig(data=8))):
    a = jnp.asarray(np.broadcast_to(A[:1] + 4 * np.eye(12), (512, 12, 12)), jnp.float32)
    x = jax.jit(lambda a: solve(a, jnp.ones((512, 12, 1))))(a)
    np.testing.assert_allclose(
      x, np.linalg.solve(np.asarray(a, np.float64), np.ones((512, 12, 1))), rtol=1e-4
    )
