"""The layers of Beck et al. 2024 against their formulas in float64, and the biases of the forget
gates.

The layers run in fp32, and outputs agree within 1e-6 of the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.init import Normal
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.mlstm import PreUpMLstm
from jaxformer.layers.slstm import ForgetPowerLaw, SLstm
from jaxformer.models.params import define
from jaxformer.testing.case import Alone

pytestmark = pytest.mark.quick
D, T, HEADS = 32, 24, 4
BORDERS = {0, 9}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def by_block(x, kernel):
  """x times a block-diagonal matrix."""
  return np.einsum('hk,hkf->hf', x.reshape(len(kernel), -1), kernel).reshape(-1)


def normalized(h, scale, eps):
  """A LayerNorm of each head, [H, K]."""
  h = h - h.mean(-1, keepdims=True)
  return (h / np.sqrt((h**2).mean(-1, keepdims=True) + eps)).reshape(-1) * scale


def convolved(seen, p):
  """The convolution at the last of the inputs of a document, with its activation."""
  kernel = p['conv.kernel']
  window = [np.zeros_like(seen[0])] * (len(kernel) - len(seen)) + seen[-len(kernel) :]
  return silu(p['conv.bias'] + sum(w * v for w, v in zip(kernel, window, strict=True)))


def slstm_formula(p, x):
  """Section 2.2, eq. 8 to 14, and appendix A.3, figure 9, without a maximum; i and f read the
  convolution."""
  y, K = np.zeros_like(x), D // HEADS
  for t in range(len(x)):
    if t in BORDERS:
      seen, h, c, n = [], *np.zeros((3, HEADS, K))
    seen.append(x[t])
    conv = convolved(seen, p)
    read = {'i': conv, 'f': conv, 'z': x[t], 'o': x[t]}
    u = np.einsum('hk,hkgj->hgj', h, p['recurrent_kernel']) + p['bias']
    a = {g: by_block(v, p[f'{g}.kernel']).reshape(HEADS, K) for g, v in read.items()}
    i, f, z, o = (a[g] + u[:, at] for at, g in enumerate('ifzo'))
    c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
    n = sigmoid(f) * n + np.exp(i)
    h = sigmoid(o) * c / n
    y[t] = normalized(h, p['norm.scale'], 1e-5)
  return y


def mlstm_formula(p, x):
  """Section 2.3, eq. 19 to 27, and appendix A.2, figure 10, without a maximum."""
  y = np.zeros_like(x)
  for t in range(len(x)):
    inner = x[t] @ p['x.kernel']
    K = len(inner) // HEADS
    if t in BORDERS:
      seen, C, n = [], np.zeros((HEADS, K, K)), np.zeros((HEADS, K))
    seen.append(inner)
    conv = convolved(seen, p)
    read = {'q': conv, 'k': conv, 'v': inner}
    flat = {name: by_block(v, p[f'{name}.kernel']) for name, v in read.items()}
    joined = np.concatenate([flat[name] for name in 'qkv'])
    i, f = (joined @ p[f'{g}_gate.kernel'] + p[f'{g}_gate.bias'] for g in ('input', 'forget'))
    q, k, v = (flat[name].reshape(HEADS, K) for name in 'qkv')
    i, f = np.exp(i)[:, None], sigmoid(f)[:, None]
    C = f[..., None] * C + i[..., None] * k[..., None] * v[:, None]
    n = f * n + i * k
    q = q / np.sqrt(K)
    h = np.einsum('hk,hkv->hv', q, C) / np.maximum(np.abs((q * n).sum(-1)), 1)[:, None]
    skipped = normalized(h, p['norm.scale'], 1e-5) + p['skip'] * conv
    y[t] = (skipped * silu(x[t] @ p['z.kernel'])) @ p['out.kernel']
  return y


@pytest.mark.parametrize(
  ('config', 'formula'),
  [
    (SLstm.Config(heads=HEADS, init=Normal(std=0.3)), slstm_formula),
    (PreUpMLstm.Config(heads=HEADS, eps=0.0, init=Normal(std=0.3)), mlstm_formula),
  ],
)
def test_the_layer_is_its_formula(config, formula):
  """With two documents, from a state and without."""
  definition = define(Alone(layer=config))
  keys = jax.random.split(jax.random.key(1), 99)
  params = {
    name: v + 0.1 * jax.random.normal(k, v.shape)
    for k, (name, v) in zip(keys, definition.init(jax.random.key(0)).items(), strict=False)
  }
  x = jax.random.normal(jax.random.key(2), (1, T, D))
  exact = {name.removeprefix('layer.'): np.asarray(v, np.float64) for name, v in params.items()}
  want = formula(exact, np.asarray(x[0], np.float64))

  @jax.jit
  def both(params, x):
    layer, ctx = definition.merge(params), Context(segments_BT=(jnp.arange(T) >= 9)[None] + 0)
    return layer(x, ctx).y, layer(x, ctx, layer.init_state(1, T)).y

  for y in both(params, x):
    assert np.abs(np.asarray(y[0], np.float64) - want).max() < 1e-6 * np.abs(want).max()


def test_forget_gates_start_by_a_power_law_of_the_depth():
  """From 5 to -7 over the channels of a head, with exponents from 0.3 to 1.6 over the blocks."""
  k = np.arange(16) / 15
  for index, exponent in ((0, 0.3), (4, 0.3 + 1.3 * 4 / 23), (23, 1.6)):
    bias = ForgetPowerLaw()(None, (2, 16), 32, LayerPosition(index=index, depth=24))
    np.testing.assert_allclose(bias, np.stack([5 - 12 * k**exponent] * 2), rtol=1e-5, atol=1e-5)
