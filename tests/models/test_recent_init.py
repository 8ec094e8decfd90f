"""Initializations of the families since linear attention, on their tiny models: the distribution of
every parameter, as the authors' code or the published configurations have it."""

import functools

import numpy as np
import pytest

from jaxformer.models.zoo import PRESETS
from tests.layers.initial import log_uniform, normal, uniform
from tests.models.test_published_init import drawn


@functools.cache
def parameters(family):
  return drawn(PRESETS[f'{family}-tiny'].model)


def is_normal(p, std):
  """`normal`; of small arrays the spread alone."""
  if p.size >= 2000:
    normal(p, std)
  else:
    assert abs(p.std() - std) < 5 * std / np.sqrt(2 * p.size)


# The standard deviation of `initializer_range`: of the authors' configurations (0.006: DeepSeek-AI
# 2024, section 4.2), or the 0.02 of transformers and of flash-linear-attention.
STD = {
  'deepseek-v2': 0.006,
  'deepseek-v3': 0.006,
  'deltanet': 0.02,
  'gated-deltanet': 0.02,
  'gla': 0.02,
  'gpt-oss': 0.02,
  'hgrn2': 0.02,
  'kda': 0.02,
  'kimi-linear': 0.02,
  'llama4': 0.02,
  'minimax': 0.02,
  'olmo-hybrid': 0.02,
  'retnet': 0.02,
}
# of exp(A_log), uniform
RATES = {
  'gated-deltanet': (0.01, 16.0),
  'kda': (1.0, 16.0),
  'kimi-linear': (1.0, 16.0),
  'olmo-hybrid': (0.01, 16.0),
}


@pytest.mark.parametrize('family', STD)
def test_matrices_are_normal(family):
  """Scales start at 1, biases and the logits of HGRN2's lower bounds at 0; sinks and biases of
  routers' logits as the matrices."""
  for name, p in parameters(family).items():
    if name.endswith('.scale'):
      assert (p == 1).all()
    elif name.endswith(('.bias', 'lower_bounds.logits')):
      assert not p.any()
    elif name.endswith('A_log'):
      low, high = RATES[family]
      rate = np.exp(p.astype(np.float64))
      assert 0.999 * low <= rate.min()
      assert rate.max() <= 1.001 * high
      assert abs(rate.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * p.size)
    elif name.endswith('dt_bias'):
      steps = np.log1p(np.exp(p.astype(np.float64))).ravel()
      assert steps.min() >= 0.999e-3
      assert steps.max() <= 0.1001
      if p.size > 100:
        log_uniform(steps, 1e-3, 1e-1)
    else:
      is_normal(p, STD[family])


@pytest.mark.parametrize('family', ['qwen3-next', 'qwen3.5'])
def test_hybrids_of_qwen(family):
  """Matrices N(0, 0.02^2); factors of norms 1 + 0, of the delta rule's output 1; steps from
  softplus(1) and rates uniform in (0.01, 16), as in transformers."""
  for name, p in parameters(family).items():
    if name.endswith(('layer.norm.scale', 'dt_bias')):
      assert (p == 1).all(), name
    elif name.endswith('.scale'):
      assert not p.any(), name
    elif name.endswith('A_log'):
      rate = np.exp(p.astype(np.float64))
      assert rate.min() >= 0.00999
      assert rate.max() <= 16.001
    else:
      is_normal(p, 0.02)


@pytest.mark.parametrize('family', ['mingru', 'minlstm'])
def test_minimal_recurrences_start_as_linear_layers_of_pytorch(family):
  """Uniform within the root of the fan-in, biases too; the other layers are Llama's."""
  fan_in = {'conv': 4, 'gates': 128, 'candidate': 128, 'out': 256}
  for name, p in parameters(family).items():
    (size,) = [n for part, n in fan_in.items() if f'.layer.{part}.' in name] or [None]
    if size is not None:
      uniform(p, size**-0.5)
    elif name.endswith('scale'):
      assert (p == 1).all()
    else:
      is_normal(p, 0.02)


def test_xlstm():
  """Beck et al. 2025, section 2: small initialization sqrt(2 / 5 D), outputs by 2 / (L sqrt(D)) for
  the width D of their input, forget gates' biases from 3 to 6, input gates' at -10, and no weights
  in the gates."""
  model = PRESETS['xlstm-tiny'].model
  width = model.width
  for name, p in parameters('xlstm').items():
    if name.endswith('scale'):
      assert (p == 1).all()
    elif 'forget_gate.bias' in name:
      np.testing.assert_allclose(p, np.broadcast_to(np.linspace(3, 6, p.shape[-1]), p.shape))
    elif 'input_gate.bias' in name:
      assert (p == -10).all()
    elif 'forget_gate' in name or 'input_gate' in name:
      assert not p.any()
    elif '.out.' in name or '.down.' in name:
      is_normal(p, 2 / 4 / np.sqrt(p.shape[-2]))
    else:
      is_normal(p, np.sqrt(2 / (5 * width)))


def test_recurrentgemma():
  """The authors' code: N(0, 1 / fan-in), outputs N(0, 2 / (depth fan-in)), the convolution
  N(0, 0.01 / kernel size), decays such that a^(1 / 8) has a square uniform in [0.81, 0.998]."""
  depth = 5
  for name, p in parameters('recurrentgemma').items():
    if name.endswith(('.scale', '.bias')):
      assert not p.any()
    elif name.endswith('.decay'):
      square = np.exp(-2 * np.log1p(np.exp(p.astype(np.float64))))
      assert square.min() >= 0.8099
      assert square.max() <= 0.9981
    elif '.conv.' in name:
      is_normal(p, 0.1 * 4**-0.5)
    elif name.endswith(('out.kernel', 'down.kernel', '.o.kernel')):
      is_normal(p, np.sqrt(2 / depth / p.shape[-2]))
    else:
      is_normal(p, p.shape[-1] ** -0.5 if 'table' in name else p.shape[-2] ** -0.5)
