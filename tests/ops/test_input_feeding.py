"""The fast loop of input feeding against the naive one: outputs, alignments, last states and
gradients by everything, with and without factors on what layers read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.attentive_decoder import AttentionSource
from jaxformer.ops.input_feeding import InputFeedingWeights, input_feeding
from tests.helpers import forced
from tests.tiers import case

pytestmark = pytest.mark.quick
B, T, S, D, C, H = 3, 7, 4, 5, 6, 8
STARTS = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.3).at[0, 0].set(True)
MASK = jnp.arange(S)[None] < jnp.asarray([[4], [1], [3]])


def numbers(*shape, seed=0):
  return jnp.asarray(np.random.default_rng((seed, *shape)).normal(0.0, 0.7, shape), jnp.float32)


@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('factors', [case(False, standing=False), case(True, standing=True)])
def test_fast_equals_naive(layers, bias, factors):
  each = range(layers)
  weights = InputFeedingWeights(
    numbers(D, 4, H),
    tuple(numbers(H, 4, H, seed=n) for n in each),
    tuple(numbers(H, 4, H, seed=9 + n) for n in each),
    tuple(numbers(4, H, seed=n) for n in each) if bias else (),
    numbers(C + H, H),
  )
  source = AttentionSource(numbers(B, S, H), numbers(B, S, C), MASK)
  states, first = (
    tuple(numbers(B, H, seed=20 * k + n) for n in range(2 * layers + 1)) for k in (1, 2)
  )
  args = [numbers(B, T, D), weights, (source.keys_BSA, source.values_BSC), states, first]
  dropped = 2.0 * (numbers(B, T, layers * H, seed=3) > 0) if factors else None

  def loss(run, args):
    x, weights, (keys, values), states, first = args
    y, a, last = run(
      x, weights, AttentionSource(keys, values, MASK), states, first, STARTS, dropped
    )
    return jnp.sum(jnp.sin(y)) + jnp.sum(a * numbers(B, T, S)) + sum(
      jnp.sum(jnp.cos(s)) for s in last
    ), (y, a, last)

  run = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
  (gradients, outputs), (naive_gradients, naive_outputs) = (
    run(input_feeding, args),
    run(forced(input_feeding, input_feeding='naive'), args),
  )
  for a, b, rtol in ((outputs, naive_outputs, 1e-5), (gradients, naive_gradients, 1e-4)):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert float(jnp.abs(y).max()) > 1e-3
      np.testing.assert_allclose(x, y, atol=rtol * float(jnp.abs(y).max()), rtol=0)
  if factors:
    without = input_feeding(args[0], weights, source, states, first, STARTS)[0]
    assert float(jnp.abs(without - outputs[0]).max()) > 0.01
