"""The sLSTM against its formula in float64 and its implementations against each other, with gates
at their extremes.

Tolerances are relative to the largest magnitude of what is compared, in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.slstm import slstm
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.tiers import case

B, T, H, K = 2, 32, 2, 4


def starts():
  """Borders two in a row; in the other row at the very first token."""
  rows = np.zeros((B, T), bool)
  rows[0, [3, 15, 16, 30]] = True
  rows[1, [0, 21]] = True
  return jnp.asarray(rows)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def arrays(extreme=0.0):
  """Preactivations, recurrent weights and a state; with `extreme`, the gates i and f jump between
  -extreme and extreme, in rows and units at different times."""
  gates = 2 * normal(0, B, T, H, 4, K)
  if extreme:
    draws = np.random.default_rng(0).random((2, B, T, H, K))
    for g, d in enumerate(draws):
      jump = jnp.where(d < 0.2, extreme, jnp.where(d > 0.7, -extreme, gates[:, :, :, g]))
      gates = gates.at[:, :, :, g].set(jump)
  state = (
    normal(2, B, H, K),
    normal(3, B, H, K),
    1 + jnp.abs(normal(4, B, H, K)),
    normal(5, B, H, K),
  )
  return gates, normal(1, H, K, 4, K) / 2, state


def formula(gates, u, state, begins):
  """Beck et al. 2024, eq. 8 to 14, without a maximum: c and n grow as they do."""
  gates, u = np.asarray(gates, np.float64), np.asarray(u, np.float64)
  h, c, n, m = (np.asarray(x, np.float64) for x in state)
  c, n = c * np.exp(m), n * np.exp(m)
  y = np.zeros((B, T, H, K))
  for t in range(T):
    for b in range(B):
      if begins[b, t]:
        h[b], c[b], n[b] = 0.0, 0.0, 0.0
    i, f, z, o = np.moveaxis(gates[:, t] + np.einsum('bhk,hkgj->bhgj', h, u), 2, 0)
    f = 1 / (1 + np.exp(-f))
    c = f * c + np.exp(i) * np.tanh(z)
    n = f * n + np.exp(i)
    h = 1 / (1 + np.exp(-o)) * c / n
    y[:, t] = h
  return y, (h, c, n)


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-3)


CHOICES = [
  case(extreme, chosen, standing=extreme > 0 and chosen == 'scan')
  for extreme in (0.0, 50.0)
  for chosen in ('naive', 'scan')
]


@pytest.mark.parametrize(('extreme', 'chosen'), CHOICES)
def test_slstm_is_its_formula(extreme, chosen):
  """In outputs and in the memories that the state stands for."""
  inputs = arrays(extreme)
  with implementation(slstm=chosen):
    y, (h, c, n, m) = jax.jit(slstm)(*inputs, starts())
  want, (want_h, want_c, want_n) = formula(*inputs, np.asarray(starts()))
  close(y, want, 1e-6)
  close(h, want_h, 1e-6)
  scale = np.exp(-np.asarray(m, np.float64))
  rounding = 4e-6 if extreme else 1e-6  # that of exponents of 50 in fp32
  close(c, want_c * scale, rounding)
  close(n, want_n * scale, rounding)


def gradients(*inputs):
  """The gradients of a number that every output and the state bear on."""

  def score(*inputs):
    y, state = slstm(*inputs, starts())
    seen = jnp.sum(jnp.sin(y) * normal(8, *y.shape)) + jnp.sum(jnp.sin(state[0]))
    return seen + jnp.sum(jnp.sin(state[1] / state[2])), (y, state)

  return jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True)(*inputs)


@pytest.mark.parametrize('extreme', [case(e, standing=e > 0) for e in (0.0, 50.0)])
def test_gradients_equal_those_of_the_naive_form(extreme):
  """On one device, and on eight shards of time through which the rows pass as a pipeline; of all
  arrays and of the first state."""
  inputs = arrays(extreme)
  with implementation(slstm='naive'):
    want = jax.jit(lambda *a: gradients(*a))(*inputs)
  close(jax.jit(lambda *a: gradients(*a))(*inputs), want, 1e-5)
  with use_mesh(make_parallel(MeshConfig(data=1, context=8))):
    close(jax.jit(lambda *a: gradients(*a))(*inputs), want, 1e-5)


def test_any_first_input_gate():
  """The first token is remembered however small its input gate is: there is nothing else."""
  gates, u, state = arrays()
  gates = gates.at[:, 0, :, 0].set(-300.0)
  zeros = tuple(jnp.zeros_like(s) for s in state)
  y, _ = slstm(gates, u, zeros, jnp.zeros((B, T), bool))
  want = jnp.tanh(gates[:, 0, :, 2]) * jax.nn.sigmoid(gates[:, 0, :, 3])
  close(y[:, 0], want, 1e-6)


def test_a_long_memory_in_half_precision():
  """Gates in fp32 with weights in bfloat16: no error grows with the length."""
  length = 2048
  gates = normal(0, B, length, H, 4, K).at[:, :, :, 1].add(8.0)
  u, zeros = normal(1, H, K, 4, K) / 8, (jnp.zeros((B, H, K)),) * 4
  none = jnp.zeros((B, length), bool)
  want, _ = jax.jit(slstm)(gates, u, zeros, none)
  y, after = jax.jit(slstm)(gates, u.astype(jnp.bfloat16), zeros, none)
  assert {s.dtype for s in after} == {jnp.dtype('float32')}
  assert jnp.abs(y - want)[:, -64:].max() < 0.01 * jnp.abs(want).max()
