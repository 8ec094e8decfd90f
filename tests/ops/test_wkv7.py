"""The recurrence of RWKV-7: against numpy in float64, and the chunked implementation against the
naive one.

Tolerances are relative to the largest magnitude: 1e-5 for outputs and states, 1e-4 for gradients
(fp32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import wkv7 as ops
from jaxformer.ops.implementation import implementation
from jaxformer.ops.wkv7 import wkv7, wkv7_chunked, wkv7_naive
from jaxformer.ops.wy import unit_lower_inverse

B, H, K, V = 2, 2, 8, 6


def inputs(T, seed=0, slow=False, dtype=jnp.float32):
  """Removal keys of length 1 and learning rates below 1, as the layer gives them. `slow`: hardly
  any decay and almost one key for all positions, where the triangular matrix is as far from the
  identity as it comes."""
  rng = np.random.default_rng(seed)
  r, k, v = (
    rng.normal(size=(B, T, H, K)),
    rng.normal(size=(B, T, H, K)),
    rng.normal(size=(B, T, H, V)),
  )
  kappa = (
    (rng.normal(size=(1, 1, H, K)) + 0.01 * rng.normal(size=(B, T, H, K)))
    if slow
    else rng.normal(size=(B, T, H, K))
  )
  kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
  rate = rng.uniform(0.99 if slow else 0.0, 1.0, (B, T, H, K))
  w = -0.6065 * rng.uniform(0.0, 0.001 if slow else 1.0, (B, T, H, K))
  state = rng.normal(size=(B, H, V, K))
  return [jnp.asarray(x, dtype) for x in (r, w, k, v, -kappa, rate * kappa)], jnp.asarray(
    state, jnp.float32
  )


def begins(T, *at):
  return (
    jnp.zeros((B, T), bool)
    .at[0, jnp.asarray(at, int)]
    .set(True)
    .at[1, jnp.asarray([t for t in at if t > 2], int)]
    .set(True)
  )


def close(a, b, rtol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= rtol * np.abs(y).max(), (np.abs(x - y).max(), np.abs(y).max())


def test_naive_is_the_papers_recurrence():
  T = 7
  args, state = inputs(T)
  r, w, k, v, a, b = (np.asarray(x, np.float64) for x in args)
  starts = np.asarray(begins(T, 0, 4))
  S, ys = np.asarray(state, np.float64), np.zeros((B, T, H, V))
  for n in range(B):
    for t in range(T):
      for h in range(H):
        before = 0.0 * S[n, h] if starts[n, t] else S[n, h]
        turn = np.diag(np.exp(w[n, t, h])) + np.outer(a[n, t, h], b[n, t, h])
        S[n, h] = before @ turn + np.outer(v[n, t, h], k[n, t, h])
        ys[n, t, h] = S[n, h] @ r[n, t, h]
  close(jax.jit(wkv7_naive)(state, *args, jnp.asarray(starts)), (ys, S), 1e-5)


def value_and_gradients(f, args, state, starts):
  def loss(args, state):
    y, last = f(*args, state, starts)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last)), (y, last)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(args, state)


@pytest.mark.parametrize(
  ('T', 'at', 'chunk', 'span', 'slow'),
  [
    (16, (), 16, 256, False),
    (21, (0, 1, 15, 17), 16, 256, False),
    (75, (5, 16, 40), 16, 32, False),
    (64, (), 16, 256, True),
    (70, (30, 31), 64, 256, False),
  ],
)
def test_chunked_equals_naive(T, at, chunk, span, slow):
  """Whole and cut chunks, several spans, documents that begin anywhere; outputs, states, and
  gradients of everything."""
  args, state = inputs(T, slow=slow)
  starts = begins(T, *at)
  fast = value_and_gradients(
    lambda *x: wkv7_chunked(x[-2], *x[:-2], x[-1], chunk=chunk, span=span), args, state, starts
  )
  naive = value_and_gradients(lambda *x: wkv7_naive(x[-2], *x[:-2], x[-1]), args, state, starts)
  close(fast[0][1], naive[0][1], 1e-5)
  close(fast[1], naive[1], 1e-4)


def test_strongest_decay_at_every_position():
  """The bound of the decay, through the longest chunk: factors of exp(19.4) on both sides."""
  args, state = inputs(64)
  args[1] = jnp.full_like(args[1], -0.60653066)
  starts = begins(64)
  close(
    jax.jit(lambda *x: wkv7_chunked(*x, chunk=64))(state, *args, starts),
    jax.jit(wkv7_naive)(state, *args, starts),
    1e-5,
  )


def test_public_function():
  """No state means zeros; dtypes in and out; forced implementations, and one that does not
  exist."""
  args, state = inputs(20)
  starts = begins(20, 3)
  y, last = jax.jit(wkv7)(*args, None, starts)
  close((y, last), jax.jit(wkv7_naive)(0 * state, *args, starts), 1e-5)
  low, low_last = jax.jit(wkv7)(*(x.astype(jnp.bfloat16) for x in args), None, starts)
  assert low.dtype == jnp.bfloat16
  assert low_last.dtype == jnp.float32
  close(low, y, 0.05)
  assert 'cumsum' in str(_traced('chunked', args, state, starts))
  assert 'cumsum' not in str(_traced('naive', args, state, starts))
  with pytest.raises(ValueError, match='must be one of naive, chunked'):
    _traced('fast', args, state, starts)


def _traced(chosen, args, state, starts):
  with implementation(wkv7=chosen):
    return jax.make_jaxpr(lambda *x: wkv7(*x))(*args, state, starts)


def test_inverse():
  rng = np.random.default_rng(0)
  A = np.tril(rng.normal(size=(3, 32, 32)) / 4, -1)
  got = jax.jit(unit_lower_inverse)(jnp.asarray(A, jnp.float32))
  close(got, np.linalg.inv(np.eye(32) - A), 1e-5)


def test_a_gradient_keeps_the_inputs_and_border_states_alone():
  """What the backward pass needs from the forward pass: no more than a small multiple of the
  inputs."""
  T = 4 * ops.SPAN
  shapes = [jax.ShapeDtypeStruct((B, T, H, n), jnp.float32) for n in (K, K, K, V, K, K)]
  state, starts = (
    jax.ShapeDtypeStruct((B, H, V, K), jnp.float32),
    jax.ShapeDtypeStruct((B, T), jnp.bool_),
  )
  _, pull = jax.eval_shape(
    lambda *x: jax.vjp(lambda *y: wkv7_chunked(*y, x[-1]), *x[:-1]), state, *shapes, starts
  )
  kept = sum(x.size for x in jax.tree.leaves(pull))
  assert kept < 1.5 * sum(x.size for x in shapes)
