"""Linear attention with decay against its recurrence in float64, for each kind of decay.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states,
1e-4 for gradients (fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.linear_attention import linear_attention
from tests.tiers import case

B, T, H, K, V = 2, 150, 3, 4, 6

# The logarithms of decays, of the shape [#B, #T, H, #K]: from none at all to one that forgets
# everything at each token.
SHAPES = {'channel': (B, T, H, K), 'head': (B, T, H, 1), 'fixed': (1, 1, H, 1)}
STRENGTHS = {'weak': 1e-4, 'usual': 0.1, 'strong': 30.0}


def inputs(shape, strength):
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, B, T, H, K))
  v, state = rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V))
  starts = np.zeros((B, T), bool)
  starts[0, [3, 64, 101]] = True
  return q, k, v, -strength * rng.exponential(size=shape), state, starts


def recurrence(q, k, v, log_decay, state, starts):
  """The definition, token by token, in float64."""
  a = np.exp(np.broadcast_to(log_decay, q.shape))
  y = np.empty_like(v)
  for t in range(T):
    state = np.where(starts[:, t, None, None, None], 0.0, state)
    state = a[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
    y[:, t] = np.einsum('bhk,bhkv->bhv', q[:, t], state)
  return y, state


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.isfinite(np.asarray(a)).all()
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()
    assert difference <= rtol * np.abs(b).max()


@pytest.mark.parametrize(
  ('kind', 'strength'),
  [case(kind, s, standing=s == 'strong') for kind in SHAPES for s in STRENGTHS],
)
def test_against_the_recurrence(kind, strength):
  arrays = inputs(SHAPES[kind], STRENGTHS[strength])
  want = recurrence(*arrays)

  def value(q, k, v, log_decay, state, starts):
    y, last = linear_attention(q, k, v, log_decay, state, starts)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last)), (y, last)

  def run():
    f = jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4), has_aux=True)
    (_, out), gradients = jax.jit(f)(*(jnp.asarray(a) for a in arrays))
    return out, gradients

  out, gradients = run()
  close(out, want, 1e-5)
  with implementation(every='naive'):
    naive, naive_gradients = run()
  close(naive, want, 1e-5)
  close(gradients, naive_gradients, 1e-4)


@pytest.mark.parametrize('kind', ['channel', 'fixed'])
def test_in_bfloat16_the_output_is_that_of_the_values_dtype_and_the_state_fp32(kind):
  q, k, v, log_decay, state, starts = (jnp.asarray(a) for a in inputs(SHAPES[kind], 0.1))
  low = (a.astype(jnp.bfloat16) for a in (q, k, v))
  y, last = jax.jit(linear_attention)(*low, log_decay, state, starts)
  assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
