"""Norms and activations against torch: here conventions go wrong (where eps stands, which GELU)."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.mlp import ACTIVATIONS
from jaxformer.layers.norm import LayerNorm, RMSNorm

pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    importlib.util.find_spec('torch') is None,
    reason='torch not installed: pip install "jaxformer[parity]"',
  ),
]


def numbers(*shape, scale=1.0):
  return np.random.default_rng(0).normal(0.3 * scale, scale, shape).astype(np.float32)


@pytest.mark.parametrize('eps', [1e-5, 0.5])
@pytest.mark.parametrize('scale', [1.0, 1e-3, 1e3])
@pytest.mark.parametrize(('ours', 'theirs'), [(LayerNorm, 'LayerNorm'), (RMSNorm, 'RMSNorm')])
def test_norms(ours, theirs, eps, scale):
  import torch

  x, weights = (
    numbers(4, 7, 32, scale=scale),
    {'weight': numbers(32), 'bias': numbers(32)[::-1].copy()},
  )
  module, other = ours(eps=eps).build(32), getattr(torch.nn, theirs)(32, eps=eps)
  other.load_state_dict({n: torch.from_numpy(weights[n]) for n in other.state_dict()})
  module.scale = nnx.Param(jnp.asarray(weights['weight']))
  if ours is LayerNorm:
    module.bias = nnx.Param(jnp.asarray(weights['bias']))
  np.testing.assert_allclose(
    module(jnp.asarray(x)), other(torch.from_numpy(x)).detach(), atol=2e-6, rtol=2e-6
  )


def test_rms_norm_casts_before_it_scales():
  """Llama in bf16: the normed value is rounded, then multiplied by the weight, and rounded
  again."""
  import torch

  transformers = pytest.importorskip(
    'transformers', reason='transformers not installed: pip install "jaxformer[parity]"'
  )
  from transformers.models.llama.modeling_llama import LlamaRMSNorm

  assert transformers
  x, w = numbers(4, 64), numbers(64)
  other = LlamaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
  other.load_state_dict({'weight': torch.from_numpy(w)})
  module = RMSNorm(eps=1e-5).build(64)
  module.scale = nnx.Param(jnp.asarray(w, jnp.bfloat16))
  ours, theirs = (
    module(jnp.asarray(x, jnp.bfloat16)),
    other(torch.from_numpy(x).to(torch.bfloat16)).detach().float(),
  )
  assert ours.dtype == jnp.bfloat16
  # One unit in the last place of bf16 is left to the order of the sums.
  np.testing.assert_allclose(ours.astype('float32'), theirs, rtol=2**-7)
  assert (np.asarray(ours.astype('float32')) == theirs.numpy()).mean() > 0.98


@pytest.mark.parametrize(
  ('name', 'theirs'),
  [
    ('gelu', lambda f, x: f.gelu(x)),
    ('gelu_tanh', lambda f, x: f.gelu(x, approximate='tanh')),
    ('silu', lambda f, x: f.silu(x)),
    ('relu', lambda f, x: f.relu(x)),
    ('squared_relu', lambda f, x: f.relu(x) ** 2),
    ('sigmoid', lambda f, x: f.sigmoid(x)),
    ('tanh', lambda f, x: f.tanh(x)),
  ],
)
def test_activations_and_their_gradients(name, theirs):
  import torch

  x = np.linspace(-8, 8, 4001, dtype=np.float32)
  t = torch.from_numpy(x).requires_grad_()
  y = theirs(torch.nn.functional, t)
  y.sum().backward()
  np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), y.detach(), atol=1e-6, rtol=1e-6)
  # Optimised, as programs are outside the suite: without, tanh is a few units less exact near 1.
  gradient = jax.jit(
    jax.grad(lambda x: ACTIVATIONS[name](x).sum()),
    compiler_options={'xla_backend_optimization_level': 3},
  )
  # In the tails x (1 - tanh^2) is a small difference of fp32 numbers near 1, times x: a few units
  # of 6e-8, times 8 and more.
  np.testing.assert_allclose(gradient(jnp.asarray(x)), t.grad, atol=5e-6, rtol=1e-6)


def test_the_two_gelus_differ():
  """The tolerance above tells them apart."""
  x = jnp.linspace(-4, 4, 1001)
  assert jnp.abs(ACTIVATIONS['gelu'](x) - ACTIVATIONS['gelu_tanh'](x)).max() > 1e-4
