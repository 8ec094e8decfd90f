"""The delta rule: against numpy in float64, and the chunked implementation against the naive one.

Tolerances are relative to the largest magnitude: 1e-5 for outputs and states, 1e-4 for gradients
(fp32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_naive
from jaxformer.ops.implementation import implementation
from jaxformer.ops.wy import SPAN
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.ops.test_wkv7 import begins, close, value_and_gradients
from tests.tiers import case

B, H, K, V = 2, 2, 8, 6


def normalized(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(T, channels=1, decay='mild', beta=(0.0, 1.0), repeated=False, seed=0):
  """Keys and queries of length 1. `repeated`: almost one key for all positions, where the
  triangular matrix is as far from the identity as it comes. Decays are `mild`, `strong` (20 per
  token), or `mixed`: mostly nearly 0, and after every few positions one of up to 60."""
  rng = np.random.default_rng(seed)
  q = normalized(rng.normal(size=(B, T, H, K)))
  noise = rng.normal(size=(B, T, H, K))
  k = normalized(rng.normal(size=(1, 1, H, K)) + 0.01 * noise if repeated else noise)
  v = rng.normal(size=(B, T, H, V))
  beta = rng.uniform(*beta, (B, T, H, 1))
  shape = (B, T, H, channels)
  mild = -rng.uniform(0.0, 0.3, shape)
  g = {
    'none': np.zeros(shape),
    'mild': mild,
    'strong': np.full(shape, -20.0),
    'mixed': np.where(rng.uniform(size=shape) < 0.2, -60.0, 0.01 * mild),
  }[decay]
  arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v, beta, g)]
  return arrays, jnp.asarray(rng.normal(size=(B, H, V, K)), jnp.float32)


@pytest.mark.parametrize('channels', [1, K])
def test_naive_is_the_papers_recurrence(channels):
  """S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T (Yang et al. 2025, eq. 10),
  and with diag(alpha_t) in place of alpha_t (Kimi Team 2025, eq. 1, transposed)."""
  T = 7
  args, state = inputs(T, channels, 'mixed')
  q, k, v, beta, g = (np.asarray(x, np.float64) for x in args)
  starts = np.asarray(begins(T, 0, 4))
  S, ys = np.asarray(state, np.float64), np.zeros((B, T, H, V))
  for n, t, h in np.ndindex(B, T, H):
    before = 0.0 * S[n, h] if starts[n, t] else S[n, h]
    key, b = k[n, t, h], beta[n, t, h]
    alpha = np.diag(np.broadcast_to(np.exp(g[n, t, h]), (K,)))
    S[n, h] = before @ alpha @ (np.eye(K) - b * np.outer(key, key))
    S[n, h] += b * np.outer(v[n, t, h], key)
    ys[n, t, h] = S[n, h] @ q[n, t, h]
  close(jax.jit(delta_rule_naive)(state, *args, jnp.asarray(starts)), (ys, S), 1e-5)


def held_together(args, state, starts, chunk, span=SPAN):
  fast = value_and_gradients(
    lambda *x: delta_rule_chunked(x[-2], *x[:-2], x[-1], chunk=chunk, span=span),
    args,
    state,
    starts,
  )
  naive = value_and_gradients(
    lambda *x: delta_rule_naive(x[-2], *x[:-2], x[-1]), args, state, starts
  )
  close(fast[0][1], naive[0][1], 1e-5)
  close(fast[1], naive[1], 1e-4)


@pytest.mark.parametrize('channels', [1, K])
@pytest.mark.parametrize(
  ('T', 'at', 'chunk', 'span'),
  [
    case(75, (5, 16, 40), 16, 32, standing=True),
    case(21, (0, 1, 15, 17), 16, 256, standing=False),
    case(70, (30, 31), 64, 256, standing=False),
  ],
)
def test_chunked_equals_naive(channels, T, at, chunk, span):
  """Whole and cut chunks, several spans, documents that start anywhere; outputs, states, and
  gradients of everything."""
  args, state = inputs(T, channels)
  held_together(args, state, begins(T, *at), chunk, span)


@pytest.mark.parametrize('channels', [1, K])
@pytest.mark.parametrize(
  ('decay', 'beta', 'repeated'),
  [
    case('mixed', (0.0, 1.0), False, standing=True),
    case('strong', (0.0, 1.0), False, standing=False),
    case('none', (0.99, 1.0), True, standing=True),
    case('mixed', (0.99, 1.0), True, standing=False),
    case('none', (1.8, 2.0), False, standing=False),
  ],
)
def test_numbers_that_a_chunk_finds_hard(channels, decay, beta, repeated):
  """Decays of 20 and 60 per token, alone and between small ones; one key again and again with beta
  near 1; beta near 2, where transitions reflect."""
  args, state = inputs(64, channels, decay, beta, repeated)
  held_together(args, state, begins(64), 64)


def test_public_function():
  """Decays per head, per channel and none; no state means zeros; dtypes in and out."""
  (q, k, v, beta, g), _ = inputs(20)
  starts, zeros = begins(20, 3), jnp.zeros((B, H, V, K))
  run = jax.jit(delta_rule)
  naive = jax.jit(delta_rule_naive)(zeros, q, k, v, beta, g, starts)
  close(run(q, k, v, beta[..., 0], g[..., 0], None, starts), naive, 1e-5)
  per_channel = jnp.broadcast_to(g, q.shape)
  close(run(q, k, v, beta[..., 0], per_channel, None, starts), naive, 1e-5)
  without = jax.jit(delta_rule_naive)(zeros, q, k, v, beta, 0 * g, starts)
  close(run(q, k, v, beta[..., 0], None, None, starts), without, 1e-5)
  low, state = run(*(x.astype(jnp.bfloat16) for x in (q, k, v, beta[..., 0])), None, None, starts)
  assert (low.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  close(low, without[0], 0.05)


@pytest.mark.parametrize('channels', [case(1, standing=False), case(K, standing=False)])
def test_sharded_over_time(channels):
  """Summaries of parts, a [K, K] transition and a state, with documents that start inside and at
  the border of shards, against the naive implementation on one device."""
  args, state = inputs(48, channels, 'mixed')
  starts = begins(48, 5, 12, 13, 30)
  args[3] = args[3][..., 0]

  def f(*x):
    return delta_rule(*x[:4], x[4] if channels == K else x[4][..., 0], *x[5:])

  with implementation(delta_rule='naive'):
    naive = value_and_gradients(f, args, state, starts)
  config = MeshConfig(data=1, context=4)
  with use_mesh(make_parallel(config, jax.devices()[:4])):
    sharded = value_and_gradients(f, args, state, starts)
  close(sharded[0][1], naive[0][1], 1e-5)
  close(sharded[1], naive[1], 1e-4)


def test_a_gradient_keeps_the_inputs_and_border_states_alone():
  """What the backward pass needs from the forward pass: no more than a small multiple of the
  inputs."""
  T = 4 * SPAN
  shapes = [jax.ShapeDtypeStruct((B, T, H, n), jnp.float32) for n in (K, K, V, 1, K)]
  state = jax.ShapeDtypeStruct((B, H, V, K), jnp.float32)
  starts = jax.ShapeDtypeStruct((B, T), jnp.bool_)
  _, pull = jax.eval_shape(
    lambda *x: jax.vjp(lambda *y: delta_rule_chunked(*y, x[-1]), *x[:-1]), state, *shapes, starts
  )
  kept = sum(x.size for x in jax.tree.leaves(pull))
  assert kept < 1.5 * sum(x.size for x in shapes)
