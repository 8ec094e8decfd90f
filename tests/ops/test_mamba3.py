"""The chunked recurrence of Mamba-3 agrees with the naive one.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states,
1e-4 for gradients (fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import mamba3 as ops
from jaxformer.ops.implementation import implementation
from tests.tiers import case

pytestmark = pytest.mark.quick
BATCH, CHUNK = 2, 8


def arrays(T, R, G=2, H=4, P=3, N=6, A=2):
  """Decays over four orders of magnitude, the strongest of which forget all but the present; angles
  of up to a few turns per token."""

  def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)

  return (
    0.1 * normal(0, BATCH, T, H, P),
    jnp.exp(1.5 * normal(1, BATCH, T, H) - 2),
    -jnp.exp(normal(2, BATCH, T, H)) * jnp.asarray([0.01, 1.0, 16.0, 200.0]).reshape(1, 1, H),
    jax.nn.sigmoid(3 * normal(3, BATCH, T, H)),
    3 * normal(4, BATCH, T, A),
    normal(5, BATCH, T, G, R, N),
    normal(6, BATCH, T, G, R, N),
    normal(7, H, R, N),
    normal(8, H, R, N),
    normal(9, H, R, P) if R > 1 else None,
    normal(10, H),
    (normal(11, BATCH, H, P, N), 0.1 * normal(12, BATCH, 1, H, P), normal(13, BATCH, 1, G, R, N)),
  )


def starts(T):
  """Borders inside a chunk, at the first step of one, at the last, and two in a row."""
  rows = np.zeros((BATCH, T), bool)
  rows[0, [3, 8, 15, 16, 30]] = True
  rows[1, 21] = True
  return jnp.asarray(rows)


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= rtol * np.abs(b).max()


def run(chosen, arguments, begins):
  def value(arguments):
    y, h = ops.mamba3(*arguments, begins)
    weight = jax.random.normal(jax.random.key(20), y.shape)
    return jnp.sum(jnp.sin(y) * weight) + jnp.sum(jnp.cos(h)), (y, h)

  with implementation(mamba3=chosen):
    (_, results), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(arguments)
  return results, gradients


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  monkeypatch.setattr(ops, 'CHUNK', dict.fromkeys(ops.CHUNK, CHUNK))


@pytest.mark.parametrize(
  ('T', 'R'),
  [case(37, 2, standing=True), case(37, 1, standing=False), case(300, 3, standing=False)],
)
def test_chunks_equal_steps(T, R):
  """Outputs, last states, and the gradients of all arrays, those of the state among them, over many
  chunks with a remainder."""
  want = run('naive', arrays(T, R), starts(T))
  got = run('chunked', arrays(T, R), starts(T))
  close(got[0], want[0], 1e-5)
  close(got[1], want[1], 1e-4)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(want[1]))


def test_angles_of_long_sequences_keep_their_digits():
  """4,096 tokens turn the state by 40,000 radians, where numbers in fp32 are 0.004 apart: the
  output is that of a sum in double precision to 1e-4."""
  T, rng = 4096, np.random.default_rng(0)
  x, theta = rng.normal(size=T).astype(np.float32), rng.uniform(5, 15, T).astype(np.float32)
  one, zeros = jnp.ones((1, T, 1)), jnp.zeros((1, 1, 2))
  B = jnp.broadcast_to(jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 1, 2), (1, T, 1, 1, 2))
  x_BTHP, theta_BTA = (jnp.asarray(a).reshape(1, T, 1, -1) for a in (x, theta))
  y, _ = ops.mamba3(
    x_BTHP,
    one,
    -1e-4 * one,
    one,
    theta_BTA[..., 0],
    B,
    B,
    zeros,
    zeros,
    None,
    jnp.zeros(1),
    None,
    jnp.zeros((1, T), bool),
  )
  angle = np.cumsum(theta.astype(np.float64))
  turned = x * np.exp(1j * angle + 1e-4 * np.arange(T))
  want = (np.exp(-1j * angle - 1e-4 * np.arange(T)) * np.cumsum(turned)).real
  assert angle[-1] > 40_000
  assert np.abs(np.asarray(y).ravel() - want).max() < 1e-4 * np.abs(want).max()


def test_half_precision_inputs():
  """Results in the type of the input and near those in fp32, the state in fp32."""
  x, dt, rate, trapezoid, theta, B, C, *rest = arrays(37, 2)
  want, _ = ops.mamba3(x, dt, rate, trapezoid, theta, B, C, *rest, starts(37))
  x, B, C = (a.astype(jnp.bfloat16) for a in (x, B, C))
  y, h = ops.mamba3(x, dt, rate, trapezoid, theta, B, C, *rest, starts(37))
  assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
  assert np.abs(np.asarray(y, np.float32) - want).max() < 0.03 * np.abs(want).max()


def test_heads_must_fill_the_groups():
  with pytest.raises(ValueError, match='4 heads are no multiple of 3 groups'):
    ops.mamba3(*arrays(37, 2, G=3), starts(37))
