"""`config.json` of gpt-oss and Llama 4 <-> our config, and their weights to files and back."""

import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.interop import load_hf, save_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import functional
from jaxformer.interop.settings import Settings
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.gpt_oss import gpt_oss
from jaxformer.models.zoo.llama4 import llama4
from tests.interop.small import noisy

pytestmark = pytest.mark.quick

SCALED = {'factor': 16.0, 'low_freq_factor': 1.0, 'high_freq_factor': 1.0}
SCOUT = {
  'max_position_embeddings': 10_485_760,
  'rope_theta': 500000.0,
  'rope_scaling': SCALED | {'rope_type': 'llama3', 'original_max_position_embeddings': 8192},
}
MAVERICK = {
  'max_position_embeddings': 1_048_576,
  'num_local_experts': 128,
  'interleave_moe_layer_step': 2,
  'use_qk_norm': False,
}


@pytest.mark.parametrize(
  ('preset', 'family', 'fields'),
  [
    ('gpt-oss-120b', 'gpt_oss', {}),
    ('gpt-oss-20b', 'gpt_oss', {'num_hidden_layers': 24, 'num_local_experts': 32}),
    ('llama4-scout', 'llama4_text', SCOUT),
    ('llama4-maverick', 'llama4_text', MAVERICK),
  ],
)
def test_presets_are_what_transformers_has(preset, family, fields):
  """All other fields have the defaults of transformers; written and read, the same again."""
  kind, ours = FAMILIES[family], functional(PRESETS[preset].model)
  assert functional(kind.read(Settings(fields))) == ours
  assert functional(kind.read(Settings(kind.write(PRESETS[preset].model)))) == ours


YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}


@pytest.mark.parametrize(
  ('family', 'fields', 'message'),
  [
    ('gpt_oss', {'swiglu_alpha': 1.5}, 'swiglu_alpha = 1.5'),
    ('gpt_oss', {'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    ('gpt_oss', {'layer_types': ['chunked_attention'] * 36}, 'layer_types'),
    ('gpt_oss', {'sliding_window': None}, 'layer_types'),
    ('gpt_oss', {'rope_parameters': {'rope_type': 'longrope'}}, "rope_type = 'longrope'"),
    ('llama4_text', {'router_jitter_noise': 0.1}, 'router_jitter_noise = 0.1'),
    ('llama4_text', {'moe_layers': [50]}, 'moe_layers'),
    ('llama4_text', {'no_rope_layers': [1, 0]}, 'no_rope_layers'),
    ('llama4_text', {'attention_chunk_size': None, 'layer_types': ['chunked_attention'] * 48},
     'layer_types'),
    ('llama4_text', {'rope_parameters': YARN}, 'use_qk_norm'),
  ],
)  # fmt: skip
def test_what_is_refused(family, fields, message):
  with pytest.raises(InputError, match=message):
    FAMILIES[family].read(Settings(fields))


SIZE = {'context_length': 12, 'vocab_size': 30, 'experts': 3}


@pytest.mark.parametrize(
  ('model', 'tensor', 'shape'),
  [
    (
      gpt_oss(16, 4, 24, 4, 2, k=2, window=5, **SIZE),
      'model.layers.1.mlp.experts.gate_up_proj',
      (3, 16, 48),
    ),
    (
      llama4(16, 8, 24, 4, 2, chunk=4, dense_hidden=20, **SIZE),
      'model.layers.1.feed_forward.experts.gate_up_proj',
      (3, 16, 48),
    ),
  ],
  ids=['gpt-oss', 'llama4'],
)
def test_weights_survive_files(model, tensor, shape, tmp_path):
  """Gates and hidden units alternate in gpt-oss, and stand side by side in Llama 4."""
  from safetensors.numpy import load_file

  params = noisy(model)
  save_hf(tmp_path / 'hf', model, params)
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  stored = load_file(file)[tensor]
  assert stored.shape == shape
  (gate,) = (p for n, p in params.items() if n.endswith('1.branches.1.layer.expert_gate.kernel'))
  where = slice(0, None, 2) if 'mlp' in tensor else slice(0, 24)
  np.testing.assert_array_equal(stored[..., where], gate[0] if gate.ndim == 4 else gate)
  again, loaded = load_hf(tmp_path / 'hf')
  assert functional(again) == functional(model)
  for name, p in params.items():
    np.testing.assert_array_equal(loaded[name], p)
