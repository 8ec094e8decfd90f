"""Layers of the delta rule against their papers' equations, written here in float64.

The layers run in fp32. The tolerance is 1e-6 of the largest magnitude of the output."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.layers.delta_net import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from jaxformer.testing.case import Alone, Case
from tests.layers.test_linear_attention import agrees, heads, layer, rms, sigmoid, silu


def convolved(x, p, name):
  """silu of the causal convolution of x W."""
  u, w = x @ p[f'{name}.kernel'], p[f'conv_{name}.kernel']
  u = np.concatenate([np.zeros((len(w) - 1, u.shape[1])), u])
  y = sum(w[j] * u[j : len(x) + j] for j in range(len(w)))
  return silu(y + p.get(f'conv_{name}.bias', 0.0))


def unit(x):
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def delta(x, p, key_heads, value_heads, alpha, *, scale=1.0):
  """S_t q_t / sqrt(K) `[T, H, V]` with S_t = S_{t-1} diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t
  v_t k_t^T, for `alpha` [T, H, K] or [T, H, 1]."""
  q, k = (unit(heads(convolved(x, p, n), key_heads)) for n in 'qk')
  q, k = (np.repeat(z, value_heads // key_heads, axis=1) for z in (q, k))
  v = heads(convolved(x, p, 'v'), value_heads)
  beta = scale * sigmoid(x @ p['beta.kernel'])
  (T, H, K), V = k.shape, v.shape[-1]
  S, o = np.zeros((H, V, K)), np.zeros((T, H, V))
  for t in range(T):
    for h in range(H):
      turn = np.eye(K) - beta[t, h] * np.outer(k[t, h], k[t, h])
      decay = np.diag(np.broadcast_to(alpha[t, h], (K,)))
      S[h] = S[h] @ decay @ turn + beta[t, h] * np.outer(v[t, h], k[t, h])
      o[t, h] = S[h] @ q[t, h] / np.sqrt(K)
  return o


def out(y, p):
  return y.reshape(len(y), -1) @ p['out.kernel']


def test_delta_net():
  config = DeltaNet.Config(heads=4, conv_bias=True, negative_eigenvalues=True)
  run, p = layer(config)

  def expected(x):
    o = delta(x, p, 4, 4, np.ones((len(x), 4, 1)), scale=2.0)
    return out(rms(o, p['norm.scale']), p)

  agrees(run, expected)


def test_gated_delta_net():
  """Two heads of keys for four of values, as in Qwen3-Next."""
  config = GatedDeltaNet.Config(heads=2, value_heads=4, head_dim=6, value_head_dim=5)
  run, p = layer(config)

  def expected(x):
    step = np.log1p(np.exp(x @ p['a.kernel'] + p['dt_bias']))
    alpha = np.exp(-np.exp(p['A_log']) * step)[..., None]
    o = rms(delta(x, p, 2, 4, alpha), p['norm.scale'])
    return out(o * silu(heads(x @ p['gate.kernel'], 4)), p)

  agrees(run, expected)


def test_kimi_delta_attention():
  run, p = layer(KimiDeltaAttention.Config(heads=4, head_dim=8, decay_rank=3, gate_rank=5))

  def expected(x):
    step = np.log1p(np.exp(x @ p['decay_in.kernel'] @ p['decay_out.kernel'] + p['dt_bias']))
    alpha = np.exp(-np.exp(p['A_log'])[None, :, None] * heads(step, 4))
    o = rms(delta(x, p, 4, 4, alpha), p['norm.scale'])
    gate = x @ p['gate_in.kernel'] @ p['gate_out.kernel'] + p['gate_out.bias']
    return out(o * sigmoid(heads(gate, 4)), p)

  agrees(run, expected)


def test_initial_values():
  """Normal projections, steps log-uniform in [0.001, 0.1], rates in the range of the paper; neither
  decays."""
  for config, lowest in (
    (GatedDeltaNet.Config(heads=512, head_dim=1), 0.01),
    (KimiDeltaAttention.Config(heads=512, head_dim=1), 1.0),
  ):
    case = Case(Alone(layer=config), quick=True)
    p = case.initial
    rates, steps = np.exp(p['A_log']), np.log1p(np.exp(p['dt_bias']))
    assert lowest <= rates.min() < lowest + 0.5
    assert 15.5 < rates.max() <= 16.0
    assert 1e-3 * 0.999 <= steps.min() < 1.3e-3
    assert 0.07 < steps.max() <= 0.1 * 1.001
    assert float(jnp.std(p['q.kernel'])) == pytest.approx(0.02, rel=0.05)
    assert not any(case.definition.info[n].decay for n in ('A_log', 'dt_bias', 'norm.scale'))


def test_sizes():
  assert DeltaNet.Config().sizes(64) == (4, 16, 16)
  assert GatedDeltaNet.Config().sizes(1024) == (6, 256, 512)
  assert KimiDeltaAttention.Config(value_heads=32).sizes(2048) == (32, 128, 128)
  with pytest.raises(InputError, match='value_heads'):
    DeltaNet.Config(heads=4, value_heads=6)
  with pytest.raises(InputError, match='heads'):
    DeltaNet.Config(heads=5).sizes(64)


def test_state_does_not_grow_with_the_length():
  for kind in (DeltaNet, GatedDeltaNet, KimiDeltaAttention):
    config = kind.Config.examples()[0]
    assert config.state_size(32, 10) == config.state_size(32, 100_000)
  H, K, V = config.sizes(32)
  assert config.state_size(32, 1) == H * K * V + 3 * (2 * config.heads * K + H * V)
