"""The mLSTM against its formula in float64 and its implementations against each other, with gates
at their extremes; and the scan of gated diagonal recurrences.

Tolerances are relative to the largest magnitude of what is compared, in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import diagonal_scan as scan_ops
from jaxformer.ops import mlstm as mlstm_ops
from jaxformer.ops.diagonal_scan import gated_scan
from jaxformer.ops.implementation import implementation
from jaxformer.ops.mlstm import mlstm
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.tiers import case

B, T, H, K, V = 2, 37, 2, 4, 6  # a remainder of 5 over chunks of 8


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  monkeypatch.setattr(mlstm_ops, 'CHUNK', dict.fromkeys(mlstm_ops.CHUNK, 8))
  monkeypatch.setattr(scan_ops, 'CHUNK', 8)


def starts(length=T):
  """Borders inside a chunk, at its ends, two in a row; in the other row at the very first token."""
  rows = np.zeros((B, length), bool)
  rows[0, [3, 8, 15, 16, 30]] = True
  rows[1, [0, 21]] = True
  return jnp.asarray(rows)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def arrays(extreme=0.0):
  """Queries, keys, values, logarithms of the gates and a state; with `extreme`, preactivations of
  the gates jump between -extreme and extreme, in rows and heads at different times. No sum in a
  denominator cancels, or rounding would be all that is compared."""
  state = normal(5, B, H, K, V), jnp.abs(normal(6, B, H, K)), 3 * normal(7, B, H)
  i, f = 3 * normal(3, B, T, H), 3 * normal(4, B, T, H) + 2
  if extreme:
    draws = np.random.default_rng(0).random((2, B, T, H))
    i = jnp.where(draws[0] < 0.2, extreme, jnp.where(draws[0] > 0.7, -extreme, i))
    f = jnp.where(draws[1] < 0.2, -extreme, jnp.where(draws[1] > 0.7, extreme, f))
  q, k = (jnp.abs(normal(seed, B, T, H, K)) for seed in (0, 1))
  v = normal(2, B, T, H, V)
  return q, k, v, i, jax.nn.log_sigmoid(f), state


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-3)


def formula(q, k, v, i, log_f, state, begins, eps=0.0):
  """Beck et al. 2024, eq. 19 to 27, without a maximum: memories that grow as they do."""
  q, k, v, i, log_f = (np.asarray(x, np.float64) for x in (q, k, v, i, log_f))
  C, n, m = (np.asarray(x, np.float64) for x in state)
  C, n = C * np.exp(m)[..., None, None], n * np.exp(m)[..., None]
  h = np.zeros_like(v)
  for t in range(q.shape[1]):
    for b in range(B):
      if begins[b, t]:
        C[b], n[b] = 0.0, 0.0
    f, w = np.exp(log_f[:, t])[..., None], np.exp(i[:, t])[..., None]
    C = f[..., None] * C + w[..., None] * k[:, t, ..., None] * v[:, t, :, None]
    n = f * n + w * k[:, t]
    query = q[:, t] / np.sqrt(q.shape[-1])
    denominator = np.maximum(np.abs(np.sum(query * n, -1)), 1.0)
    h[:, t] = np.einsum('bhk,bhkv->bhv', query, C) / (denominator + eps)[..., None]
  return h, C, n


def run(chosen, inputs, begins):
  """(output, state), and the gradients of a number that every output and the state bear on."""

  def value(inputs):
    y, state = mlstm(*inputs, begins)
    return jnp.sum(jnp.sin(y) * normal(8, *y.shape)) + sum(
      jnp.sum(jnp.sin(s)) for s in state[:2]
    ), (y, state)

  with implementation(mlstm=chosen):
    (_, results), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(inputs)
  return results, gradients


@pytest.mark.parametrize(
  ('extreme', 'chosen'),
  [
    case(extreme, chosen, standing=extreme > 0 and chosen == 'chunked')
    for extreme in (0.0, 50.0)
    for chosen in ('naive', 'chunked')
  ],
)
def test_mlstm_is_its_formula(extreme, chosen):
  """With eps = 0, in outputs and in the memories that the state stands for."""
  inputs = arrays(extreme)
  with implementation(mlstm=chosen):
    h, (C, n, m) = jax.jit(lambda *a: mlstm(*a, starts(), eps=0.0))(*inputs)
  want_h, want_C, want_n = formula(*inputs, np.asarray(starts()))
  for t in range(T):  # where gates are at extremes, position by position
    close(h[:, t], want_h[:, t], 1e-6)
  m = np.asarray(m, np.float64)
  rounding = 4e-6 if extreme else 1e-6  # that of exponents of 50 in fp32
  close(C, want_C * np.exp(-m)[..., None, None], rounding)
  close(n, want_n * np.exp(-m)[..., None], rounding)


@pytest.mark.parametrize('extreme', [case(e, standing=e > 0) for e in (0.0, 50.0)])
def test_chunks_equal_steps(extreme):
  """Outputs, states, and gradients of all arrays and of the first state."""
  want, want_gradients = run('naive', arrays(extreme), starts())
  got, gradients = run('chunked', arrays(extreme), starts())
  close(got, want, 1e-5)
  close(gradients, want_gradients, 1e-4)


@pytest.mark.parametrize('extreme', [case(e, standing=e > 0) for e in (0.0, 50.0)])
def test_mlstm_in_parts_of_time(extreme):
  """On eight shards of time, each of less than a chunk."""
  inputs = [x[:, :32] for x in arrays(extreme)[:5]] + [arrays()[5]]
  begins = starts()[:, :32]

  def gradients(*inputs):
    def score(*inputs):
      h, state = mlstm(*inputs, begins)
      return jnp.sum(jnp.sin(h)) + sum(jnp.sum(jnp.sin(s)) for s in state[:2]), (h, state)

    return jax.value_and_grad(score, argnums=tuple(range(6)), has_aux=True)(*inputs)

  whole = jax.jit(lambda *a: gradients(*a))(*inputs)
  with use_mesh(make_parallel(MeshConfig(data=1, context=8))):
    parts = jax.jit(lambda *a: gradients(*a))(*inputs)
  close(parts, whole, 1e-4)


def test_gradients_keep_few_states():
  """What the forward pass keeps: the inputs and the states between chunks."""
  inputs = arrays()
  kept = jax.eval_shape(lambda *a: jax.vjp(lambda *a: mlstm(*a, starts()), *a)[1], *inputs)
  largest = max(a.size for a in jax.tree.leaves(kept))
  assert largest <= max(-(-T // 8) * B * H * K * V, 2 * B * T * H * V)


def test_half_precision_inputs():
  """Results in the type of the values and near those in fp32, the state in fp32."""
  *tokens, i, log_f, state = arrays()
  want, _ = mlstm(*tokens, i, log_f, state, starts())
  y, after = mlstm(*(x.astype(jnp.bfloat16) for x in tokens), i, log_f, state, starts())
  assert y.dtype == jnp.bfloat16
  assert {s.dtype for s in after} == {jnp.dtype('float32')}
  assert np.abs(np.asarray(y, np.float32) - want).max() < 0.03 * np.abs(want).max()


# ---- the scan with gates -----------------------------------------------------------------------


@pytest.mark.parametrize(
  'chosen', [case(c, standing=c == 'chunked') for c in ('naive', 'associative', 'chunked')]
)
def test_gated_scan_is_the_recurrence(chosen):
  """Decays from 1 to exp(-50), in outputs and gradients, on one device and on eight shards."""
  v, state = normal(0, B, 40, 6), normal(2, B, 6)
  log_a = -jnp.exp(3 * normal(1, B, 40, 6) - 3).clip(0, 50)
  begins = starts(40)

  def gradients(v, log_a, state):
    def score(v, log_a, state):
      x, last = gated_scan(v, log_a, state, begins)
      return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(last)), (x, last)

    return jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True)(v, log_a, state)

  x, h = np.zeros(v.shape), np.asarray(state, np.float64)
  for t in range(40):
    h = np.where(begins[:, t, None], 0.0, np.exp(np.float64(log_a[:, t]))) * h + np.float64(v[:, t])
    x[:, t] = h
  with implementation(gated_scan='naive'):
    naive = jax.jit(lambda *a: gradients(*a))(v, log_a, state)
  with implementation(gated_scan=chosen):
    (value, (y, last)), given = jax.jit(lambda *a: gradients(*a))(v, log_a, state)
    close((y, last), (x, h), 2e-6)
    close((value, given), (naive[0][0], naive[1]), 1e-5)
    with use_mesh(make_parallel(MeshConfig(data=1, context=8))):
      parts = jax.jit(lambda *a: gradients(*a))(v, log_a, state)
  close(parts, naive, 1e-5)
