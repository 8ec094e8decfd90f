"""The fast LSTM and GRU against the naive ones: outputs, last states, and gradients by everything,
the first states and the last ones among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.recurrence import gru, gru_naive, lstm, lstm_cell, lstm_naive

B, T, D, H = 3, 7, 5, 6


def numbers(*shape, seed=0):
  return jnp.asarray(np.random.default_rng((seed, *shape)).normal(0.0, 0.7, shape), jnp.float32)


STARTS = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.3).at[0, 0].set(True)

CASES = {
  'lstm': (lstm, lstm_naive, 4, 2, {}),
  'lstm without bias': (lstm, lstm_naive, 4, 2, None),
  'gru': (gru, gru_naive, 3, 1, {}),
  'gru after': (gru, gru_naive, 3, 1, {'after': True}),
}


@pytest.mark.quick
@pytest.mark.parametrize('name', CASES)
def test_fast_equals_naive(name):
  fast, naive, G, states, options = CASES[name]
  args = [
    numbers(B, T, D),
    numbers(D, G, H),
    numbers(H, G, H),
    None if options is None else numbers(G, H),
    *(numbers(B, H, seed=1 + i) for i in range(states)),
  ]
  extra = {'b_after_H': numbers(H)} if options else {}

  def loss(op, args, extra):
    y, last = op(*args, STARTS, **(options or {}), **extra)
    return jnp.sum(jnp.sin(y)) + sum(jnp.sum(jnp.cos(s)) for s in jax.tree.leaves(last)), (y, last)

  run = jax.jit(jax.grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
  gradients, outputs = run(fast, args, extra)
  naive_gradients, naive_outputs = run(naive, args, extra)
  for a, b, rtol in ((outputs, naive_outputs, 1e-5), (gradients, naive_gradients, 1e-4)):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_allclose(x, y, atol=rtol * float(jnp.abs(y).max()), rtol=0)
  assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves((args, extra)))


@pytest.mark.quick
def test_a_cell_is_one_step():
  x, w, u, b = numbers(B, 1, D), numbers(D, 4, H), numbers(H, 4, H), numbers(4, H)
  h, c = numbers(B, H, seed=1), numbers(B, H, seed=2)
  gates = jnp.einsum('bd,dgh->bgh', x[:, 0], w) + jnp.einsum('bd,dgh->bgh', h, u) + b[None]
  y, last = lstm(x, w, u, b, h, c, jnp.zeros((B, 1), bool))
  for ours, expected in zip(lstm_cell(gates, c)[:2], last, strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-6)
  np.testing.assert_allclose(y[:, 0], last[0], atol=1e-6)
