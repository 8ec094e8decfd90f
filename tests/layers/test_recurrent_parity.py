"""LSTM and GRU layers against torch: gate order, where the reset gate acts, biases; and the GRU
that torch does not have."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.gru import Gru
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.lstm import Lstm, RecurrentState

B, T, D = 3, 23, 16


def parity(test):
  lacking = importlib.util.find_spec('torch') is None
  return pytest.mark.parity(
    pytest.mark.skipif(lacking, reason='torch not installed: pip install "jaxformer[parity]"')(test)
  )


def numbers(*shape, seed=0):
  return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def torch_layer(kind, hidden=D):
  import torch

  torch.manual_seed(0)
  return getattr(torch.nn, kind)(D, hidden, batch_first=True)


def set_weights(layer, other):
  """Their [gates * H, inputs] as our [inputs, gates, H]; returns their two biases,
  [gates, H] each."""
  G, H = layer.kernel.shape[1], layer.kernel.shape[2]
  w, u, b, c = (
    p.detach().numpy()
    for p in (other.weight_ih_l0, other.weight_hh_l0, other.bias_ih_l0, other.bias_hh_l0)
  )
  layer.kernel[...] = jnp.asarray(w.reshape(G, H, -1).transpose(2, 0, 1))
  layer.recurrent_kernel[...] = jnp.asarray(u.reshape(G, H, -1).transpose(2, 0, 1))
  return b.reshape(G, H), c.reshape(G, H)


@parity
@pytest.mark.parametrize('hidden', [16, 24])
def test_lstm_is_torchs(hidden):
  import torch

  other, layer = (
    torch_layer('LSTM', hidden),
    Lstm.Config(hidden=hidden).build(D, nnx.Rngs(0), LayerPosition()),
  )
  layer.bias[...] = jnp.asarray(sum(set_weights(layer, other)))
  x, h, c = numbers(B, T, D), numbers(B, hidden), numbers(B, hidden, seed=1)
  y, (h_n, c_n) = other(torch.from_numpy(x), (torch.from_numpy(h)[None], torch.from_numpy(c)[None]))
  out = layer(jnp.asarray(x), Context(), RecurrentState(jnp.asarray(h), jnp.asarray(c)))
  expected = (
    y.detach().numpy() if hidden == D else y.detach().numpy() @ np.asarray(layer.out.kernel[...])
  )
  np.testing.assert_allclose(out.y, expected, atol=1e-5)
  np.testing.assert_allclose(out.state.h_BH, h_n[0].detach(), atol=1e-5)
  np.testing.assert_allclose(out.state.c_BH, c_n[0].detach(), atol=1e-5)


@parity
def test_gru_with_the_reset_product_is_torchs():
  import torch

  other, layer = (
    torch_layer('GRU'),
    Gru.Config(reset_after=True).build(D, nnx.Rngs(0), LayerPosition()),
  )
  b, c = set_weights(layer, other)
  layer.bias[...] = jnp.asarray(b + c * np.asarray([1, 1, 0], np.float32)[:, None])
  layer.recurrent_bias[...] = jnp.asarray(c[2])
  x, h = numbers(B, T, D), numbers(B, D)
  y, h_n = other(torch.from_numpy(x), torch.from_numpy(h)[None])
  out = layer(jnp.asarray(x), Context(), RecurrentState(jnp.asarray(h)))
  np.testing.assert_allclose(out.y, y.detach(), atol=1e-5)
  np.testing.assert_allclose(out.state.h_BH, h_n[0].detach(), atol=1e-5)


@pytest.mark.quick
def test_gru_of_the_papers():
  """Bahdanau et al. 2014, appendix A.1.1, in float64: s = (1 - z) s + z s~, s~ = tanh(W x + U (r
  s)); their z is one minus ours."""
  layer = Gru.Config().build(D, nnx.Rngs(0), LayerPosition())
  w, u, b = (
    np.asarray(p[...], np.float64) for p in (layer.kernel, layer.recurrent_kernel, layer.bias)
  )
  b = numbers(3, D).astype(np.float64)
  layer.bias[...] = jnp.asarray(b, jnp.float32)
  x, s, expected = numbers(B, T, D).astype(np.float64), np.zeros((B, D)), []
  for t in range(T):
    r = 1 / (1 + np.exp(-(x[:, t] @ w[:, 0] + s @ u[:, 0] + b[0])))
    z = 1 / (1 + np.exp(x[:, t] @ w[:, 1] + s @ u[:, 1] + b[1]))
    s = (1 - z) * s + z * np.tanh(x[:, t] @ w[:, 2] + (r * s) @ u[:, 2] + b[2])
    expected.append(s)
  out = jax.jit(lambda x: layer(x, Context()).y)(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(out, np.stack(expected, axis=1), atol=1e-5)


@pytest.mark.quick
def test_forget_gates_start_open_and_each_gate_is_drawn_alone():
  layer = Lstm.Config(forget_bias=2.0).build(64, nnx.Rngs(0), LayerPosition())
  np.testing.assert_array_equal(
    np.asarray(layer.bias[...]), np.asarray([0, 2, 0, 0], np.float32)[:, None].repeat(64, 1)
  )
  u = np.asarray(layer.recurrent_kernel[...])
  assert np.abs(u).max() <= 1 / 8
  assert np.abs(np.corrcoef(u.transpose(1, 0, 2).reshape(4, -1)) - np.eye(4)).max() < 0.1
