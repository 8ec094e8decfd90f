"""Scalings of rotary frequencies against transformers' `modeling_rope_utils`."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.position import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  Rotary,
  YarnScaling,
)

LACKING = [m for m in ('torch', 'transformers') if importlib.util.find_spec(m) is None]
pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]

YARN = {'rope_type': 'yarn', 'factor': 32.0, 'original_max_position_embeddings': 4096}
YARN_SCALING = YarnScaling(factor=32.0, original_context=4096)
CASES = {
  'linear': (LinearScaling(factor=8.0), {'rope_type': 'linear', 'factor': 8.0}),
  'dynamic': (
    DynamicScaling(factor=4.0, original_context=2048, length=2048),
    {'rope_type': 'dynamic', 'factor': 4.0},
  ),
  'dynamic, longer': (
    DynamicScaling(factor=4.0, original_context=2048, length=5000),
    {'rope_type': 'dynamic', 'factor': 4.0},
  ),
  'llama3': (
    Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_context=1024),
    {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 1024,
    },
  ),
  'yarn': (YARN_SCALING, YARN),
  'yarn, not truncated': (YARN_SCALING.replace(truncate=False), YARN | {'truncate': False}),
  'yarn, beta': (
    YARN_SCALING.replace(beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    YARN | {'beta_fast': 16.0, 'beta_slow': 2.0, 'attention_factor': 1.5},
  ),
  'yarn, mscale': (
    YARN_SCALING.replace(mscale=1.0, mscale_all_dim=0.7),
    YARN | {'mscale': 1.0, 'mscale_all_dim': 0.7},
  ),
  'yarn, one frequency': (
    YarnScaling(factor=2.0, original_context=7, beta_fast=32.0, beta_slow=31.0),
    YARN
    | {'factor': 2.0, 'original_max_position_embeddings': 7, 'beta_fast': 32.0, 'beta_slow': 31.0},
  ),
}


@pytest.mark.parametrize('fraction', [1.0, 0.5])
@pytest.mark.parametrize('case', CASES)
def test_frequencies_and_amplitude(case, fraction):
  """fp32 there, float64 here: 1e-6."""
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaling, rope = CASES[case]
  config = LlamaConfig(
    hidden_size=256,
    num_attention_heads=2,
    max_position_embeddings=2048,
    rope_parameters={'rope_theta': 5e4, 'partial_rotary_factor': fraction, **rope},
  )
  length = scaling.length if isinstance(scaling, DynamicScaling) else None
  want, amplitude = ROPE_INIT_FUNCTIONS[rope['rope_type']](config, 'cpu', seq_len=length)
  found = Rotary(theta=5e4, scaling=scaling, fraction=fraction).frequencies(128)
  np.testing.assert_allclose(found, want.numpy(), rtol=2e-6)
  np.testing.assert_allclose(scaling.amplitude, amplitude, rtol=1e-12)


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('fraction', [1.0, 0.25])
def test_rotation(interleaved, fraction):
  """Queries and keys as the functions of GLM, which rotate some neighbors, and of Phi, which rotate
  some halves, with the factor of YaRN."""
  import torch
  from transformers.models.glm import modeling_glm
  from transformers.models.phi import modeling_phi

  rotary = Rotary(theta=1e4, scaling=YARN_SCALING, fraction=fraction, interleaved=interleaved)
  q, k = np.random.default_rng(0).normal(size=(2, 2, 7, 3, 32)).astype('float32')
  positions = np.stack([np.arange(7), 100 + np.arange(7)]).astype('int32')
  angle = positions[..., None] * rotary.frequencies(32).astype('float32')
  angle = torch.tensor(np.concatenate([angle, angle], axis=-1))
  cos, sin = (f(angle) * rotary.scaling.amplitude for f in (torch.cos, torch.sin))
  R = rotary.rotated(32)
  heads = [torch.tensor(x[..., :R]).transpose(1, 2) for x in (q, k)]
  apply = (modeling_glm if interleaved else modeling_phi).apply_rotary_pos_emb
  want = [x.transpose(1, 2).numpy() for x in apply(*heads, cos, sin)]
  for x, turned in zip((q, k), want, strict=True):
    found = rotary.rotate(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(found[..., :R], turned, atol=2e-5)
    np.testing.assert_array_equal(found[..., R:], x[..., R:])
