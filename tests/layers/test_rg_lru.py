"""The recurrent block of Griffin against its formulas in float64, and its initialization.

The layer runs in fp32, and outputs agree within 1e-6 of the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.layers.rg_lru import DecayRadius, RgLru, bounded_sqrt
from jaxformer.models.params import define
from jaxformer.testing.case import Alone

pytestmark = pytest.mark.quick
D, T, HEADS = 32, 24, 4


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def formula(p, x, borders):
  """De et al. 2024, section 2.4 and figure 2, token by token; borders are the first tokens of
  documents."""
  p = {name.removeprefix('layer.'): np.asarray(v, np.float64) for name, v in p.items()}
  x = np.asarray(x, np.float64)
  kernel, y, seen = p['conv.kernel'], np.zeros_like(x), []
  h = np.zeros(D)
  for t in range(len(x)):
    if t in borders:
      seen = []
    seen.append(x[t] @ p['x.kernel'] + p['x.bias'])
    window = [np.zeros(D)] * (len(kernel) - len(seen)) + seen[-len(kernel) :]
    u = p['conv.bias'] + sum(w * v for w, v in zip(kernel, window, strict=True))

    def gate(name, u=u):
      blocks = np.einsum('hk,hkf->hf', u.reshape(HEADS, -1), p[f'{name}.kernel'])
      return sigmoid(blocks + p[f'{name}.bias']).reshape(-1)

    a = np.exp(-8.0 * np.log1p(np.exp(p['decay'])) * gate('decay_gate'))
    first = t in borders
    h = (0.0 if first else a * h) + (1.0 if first else np.sqrt(1 - a**2)) * gate('input_gate') * u
    z = x[t] @ p['y.kernel'] + p['y.bias']
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    y[t] = (h * gelu) @ p['out.kernel'] + p['out.bias']
  return y


def test_the_layer_is_its_formula():
  """With two documents; the root is 1 at the first token of each, with a state and without."""
  definition = define(Alone(layer=RgLru.Config(heads=HEADS)))
  keys = jax.random.split(jax.random.key(1), 99)
  params = {
    name: v + 0.3 * jax.random.normal(k, v.shape)
    for k, (name, v) in zip(keys, definition.init(jax.random.key(0)).items(), strict=False)
  }
  x = jax.random.normal(jax.random.key(2), (1, T, D))
  want = formula(params, x[0], {0, 9})

  @jax.jit
  def both(params, x):
    layer, ctx = definition.merge(params), Context(segments_BT=(jnp.arange(T) >= 9)[None] + 0)
    return layer(x, ctx).y, layer(x, ctx, layer.init_state(1, T)).y

  for y in both(params, x):
    assert np.abs(np.asarray(y[0], np.float64) - want).max() < 1e-6 * np.abs(want).max()


def test_decays_are_uniform_in_the_ring():
  """exp(-softplus(L)) is within [0.9, 0.999], with a uniform square."""
  L = DecayRadius()(jax.random.key(0), (4096,), 1, None)
  square = np.exp(-2 * np.log1p(np.exp(np.asarray(L, np.float64))))
  assert 0.9**2 - 1e-6 < square.min() < square.max() < 0.999**2 + 1e-6
  assert abs(square.mean() - (0.9**2 + 0.999**2) / 2) < 0.005


def test_the_gradient_of_the_root_is_bounded():
  """At 0 it would be infinite."""
  slope = jax.vmap(jax.grad(bounded_sqrt))(jnp.asarray([0.0, 1e-12, 0.25]))
  np.testing.assert_allclose(slope, [1000.0, 1000.0, 1.0], rtol=1e-6)
