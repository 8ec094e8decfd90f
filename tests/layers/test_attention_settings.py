"""Settings of attention against the formulas in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary

pytestmark = pytest.mark.quick

B, T, D, H, G, K, C = 2, 9, 16, 4, 2, 8, 6


def built(config):
  """A layer without constant parameters, and those by name in float64."""
  layer = config.build(D, nnx.Rngs(0), LayerPosition())
  graph, params = nnx.split(layer)
  numbers = np.random.default_rng(1)
  params = jax.tree.map(lambda p: jnp.asarray(numbers.normal(0, 0.5, p.shape), 'float32'), params)
  flat = {
    '.'.join(map(str, path)): np.asarray(p.get_value(), np.float64)
    for path, p in nnx.to_flat_state(params)
  }
  return nnx.merge(graph, params), flat


def rms(x, eps=1e-5):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def dense(x, p, name):
  return x @ p[f'{name}.kernel'] + p.get(f'{name}.bias', 0.0)


def softmax_values(q, k, v):
  """Causal attention of `T H K`, `T G K` and `T G C`."""
  k, v = np.repeat(k, H // G, axis=1), np.repeat(v, H // G, axis=1)
  a = np.einsum('thk,shk->hts', q, k) / np.sqrt(K)
  a = np.where(np.tril(np.ones((T, T), bool)), a, -np.inf)
  e = np.exp(a - a.max(-1, keepdims=True))
  return np.einsum('hts,shc->thc', e / e.sum(-1, keepdims=True), v)


def run(layer, x):
  return np.asarray(jax.jit(lambda x: layer(x, Context()).y)(jnp.asarray(x, 'float32')))


def inputs():
  return np.random.default_rng(0).normal(size=(B, T, D))


@pytest.mark.parametrize('over', ['head', 'width'])
def test_norm_of_queries_and_keys(over):
  config = Attention.Config(heads=H, kv_heads=G, head_dim=K, qk_norm=RMSNorm(), qk_norm_over=over)
  layer, p = built(config)
  x = inputs()

  def normed(x, name, heads):
    y = dense(x, p, name)
    y = y if over == 'width' else y.reshape(T, heads, K)
    return (rms(y) * p[f'{name}_norm.scale']).reshape(T, heads, K)

  want = [
    softmax_values(
      normed(row, 'q', H), normed(row, 'k', G), dense(row, p, 'v').reshape(T, G, K)
    ).reshape(T, -1)
    @ p['o.kernel']
    for row in x
  ]
  assert p['q_norm.scale'].shape == (H * K if over == 'width' else K,)
  np.testing.assert_allclose(run(layer, x), want, atol=2e-5)


def test_gate_values_of_another_dim_and_biases_of_queries_keys_and_values_alone():
  config = Attention.Config(
    heads=H, kv_heads=G, head_dim=K, v_head_dim=C, bias=True, out_bias=False, output_gate=True
  )
  layer, p = built(config)
  assert {n for n in p if n.endswith('bias')} == {'q.bias', 'k.bias', 'v.bias', 'gate.bias'}
  x = inputs()
  want = []
  for row in x:
    q, k, v = (
      dense(row, p, n).reshape(T, h, d) for n, h, d in (('q', H, K), ('k', G, K), ('v', G, C))
    )
    gate = 1 / (1 + np.exp(-dense(row, p, 'gate')))
    want.append((softmax_values(q, k, v).reshape(T, -1) * gate) @ p['o.kernel'])
  np.testing.assert_allclose(run(layer, x), want, atol=2e-5)
  state = layer.init_state(B, T)
  assert state.k_BSGK.shape == (B, T, G, K)
  assert state.v_BSGC.shape == (B, T, G, C)


def test_a_bias_of_the_output_alone():
  layer = Attention.Config(heads=2, out_bias=True).build(D, nnx.Rngs(0), LayerPosition())
  assert [dense.bias is None for dense in (layer.q, layer.k, layer.v, layer.o)] == [True] * 3 + [
    False
  ]


def test_flops_of_values_of_another_dim():
  flops = [
    Attention.Config(heads=4, head_dim=16, v_head_dim=c).mixing_flops_per_token(32, 100, False)
    for c in (None, 16, 8)
  ]
  assert flops == [4 * 4 * 16 * 100, 4 * 4 * 16 * 100, 2 * 4 * 24 * 100]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'qk_norm_over': 'width'}, "qk_norm_over = 'width': must be 'head' without a qk_norm"),
    ({'v_head_dim': 0}, 'v_head_dim = 0: must be positive'),
    ({'head_dim': 7, 'position': Rotary()}, 'head_dim = 7: must be even with rotary positions'),
    ({'head_dim': 8, 'position': Rotary(fraction=0.4)}, 'rotates 3 of 8 channels'),
    ({'head_dim': 8, 'position': Rotary(fraction=0.1)}, 'rotates 0 of 8 channels'),
  ],
  ids=['norm', 'values', 'odd', 'odd fraction', 'nothing'],
)
def test_settings_that_do_not_fit(fields, message):
  with pytest.raises(InputError, match=message):
    Attention.Config(**fields).build(D, nnx.Rngs(0), LayerPosition())
