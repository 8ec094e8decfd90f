"""`config.json` of Qwen2.5, Qwen3, Gemma 2 and 3, OLMo 2 and 3, Mistral and SmolLM3: the published
ones, as far as they say something of the function, both forms of rope settings by type of layer,
and what is refused by name."""

import json

import pytest

from jaxformer.config import InputError
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import functional, match
from jaxformer.interop.settings import Settings
from jaxformer.layers.position import DynamicScaling, LinearScaling, Rotary, YarnScaling
from jaxformer.models.zoo import PRESETS
from tests.interop.test_hf_config import written

pytestmark = pytest.mark.quick

QWEN25_7B = {
  'model_type': 'qwen2',
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'hidden_size': 3584,
  'initializer_range': 0.02,
  'intermediate_size': 18944,
  'max_position_embeddings': 131072,
  'max_window_layers': 28,
  'num_attention_heads': 28,
  'num_hidden_layers': 28,
  'num_key_value_heads': 4,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'sliding_window': 131072,
  'tie_word_embeddings': False,
  'use_mrope': False,
  'use_sliding_window': False,
  'vocab_size': 152064,
}
QWEN3_06B = {
  'model_type': 'qwen3',
  'attention_bias': False,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'max_position_embeddings': 40960,
  'max_window_layers': 28,
  'num_attention_heads': 16,
  'num_hidden_layers': 28,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
GEMMA2_27B = {
  'model_type': 'gemma2',
  'attn_logit_softcapping': 50.0,
  'cache_implementation': 'hybrid',
  'final_logit_softcapping': 30.0,
  'head_dim': 128,
  'hidden_act': 'gelu_pytorch_tanh',
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 4608,
  'intermediate_size': 36864,
  'max_position_embeddings': 8192,
  'num_attention_heads': 32,
  'num_hidden_layers': 46,
  'num_key_value_heads': 16,
  'query_pre_attn_scalar': 144,
  'rms_norm_eps': 1e-06,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'vocab_size': 256000,
}
GEMMA3_1B = {
  'model_type': 'gemma3_text',
  'attn_logit_softcapping': None,
  'final_logit_softcapping': None,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 1152,
  'intermediate_size': 6912,
  'max_position_embeddings': 32768,
  'num_attention_heads': 4,
  'num_hidden_layers': 26,
  'num_key_value_heads': 1,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_local_base_freq': 10000,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': 512,
  'sliding_window_pattern': 6,
  'vocab_size': 262144,
}
OLMO3_7B = {
  'model_type': 'olmo3',
  'attention_bias': False,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'layer_types': (['sliding_attention'] * 3 + ['full_attention']) * 8,
  'max_position_embeddings': 65536,
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 32,
  'rms_norm_eps': 1e-06,
  'rope_scaling': {
    'attention_factor': 1.2079441541679836,
    'beta_fast': 32,
    'beta_slow': 1,
    'factor': 8.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'yarn',
  },
  'rope_theta': 500000,
  'sliding_window': 4096,
  'tie_word_embeddings': False,
  'vocab_size': 100278,
}
OLMO2_7B = {k: v for k, v in OLMO3_7B.items() if k not in ('layer_types', 'sliding_window')} | {
  'model_type': 'olmo2',
  'max_position_embeddings': 4096,
  'rope_scaling': None,
  'vocab_size': 100352,
}
SMOLLM3 = {
  'model_type': 'smollm3',
  'attention_bias': False,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'intermediate_size': 11008,
  'max_position_embeddings': 65536,
  'mlp_bias': False,
  'no_rope_layer_interval': 4,
  'no_rope_layers': [1, 1, 1, 0] * 9,
  'num_attention_heads': 16,
  'num_hidden_layers': 36,
  'num_key_value_heads': 4,
  'rms_norm_eps': 1e-06,
  'rope_theta': 5000000.0,
  'sliding_window': None,
  'use_sliding_window': False,
  'vocab_size': 128256,
}
DENSE = 'qwen2.5', 'qwen3', 'gemma2', 'gemma3', 'olmo2', 'olmo3', 'mistral', 'smollm3'


def read(fields):
  return FAMILIES[fields['model_type']].read(Settings(fields))


@pytest.mark.parametrize(
  ('fields', 'name'),
  [
    (QWEN25_7B, 'qwen2.5-7b'),
    (QWEN3_06B, 'qwen3-0.6b'),
    (GEMMA2_27B, 'gemma2-27b'),
    (GEMMA3_1B, 'gemma3-1b'),
    (OLMO2_7B, 'olmo2-7b'),
    (OLMO3_7B, 'olmo3-7b'),
    (SMOLLM3, 'smollm3-3b'),
  ],
)
def test_published_configs_are_our_presets(fields, name):
  assert read(fields) == PRESETS[name].model


@pytest.mark.parametrize('name', [n for n in PRESETS if PRESETS[n].family in DENSE])
def test_presets_go_there_and_back(name):
  fields = written(PRESETS[name].model)
  # the tiny SmolLM3 is one period, which the reader takes for two groups
  assert functional(read(json.loads(json.dumps(fields)))) == functional(PRESETS[name].model)


def positions(fields):
  config = read(fields)
  return [b.branches[0].layer.position for g in config.stack for b in g.pattern]


def test_rope_settings_by_type_of_layer():
  """A scaling is that of full attention alone; bases of files of transformers 4 are fields."""
  small = GEMMA3_1B | {'num_hidden_layers': 6, 'rope_local_base_freq': 100.0}
  linear = {'rope_type': 'linear', 'factor': 8.0}
  wanted = [Rotary(theta=100.0), Rotary(theta=1e6, scaling=LinearScaling(factor=8.0))]
  assert positions(small | {'rope_scaling': linear}) == wanted
  new = {
    'full_attention': {'rope_theta': 1e6, **linear},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
  }
  bare = {k: v for k, v in small.items() if not k.startswith('rope')}
  assert positions(bare | {'rope_parameters': new}) == wanted
  assert positions(bare) == [Rotary(theta=1e4), Rotary(theta=1e6)]


def test_scalings():
  def rotary(**rope):
    return positions(QWEN25_7B | {'max_position_embeddings': 64, 'rope_scaling': rope})[0].scaling

  yarn = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
  assert rotary(**yarn) == YarnScaling(factor=4.0, original_context=32)
  assert rotary(**yarn, truncate=False).truncate is False
  assert rotary(**yarn, attention_factor=1.25).attention_factor == 1.25
  assert rotary(type='dynamic', factor=2.0) == DynamicScaling(
    factor=2.0, original_context=64, length=64
  )
  longer = PRESETS['qwen2.5-tiny'].model
  scaling = DynamicScaling(factor=2.0, original_context=256, length=512)
  group = longer.stack[0]
  branch = group.pattern[0].branches[0]
  layer = branch.layer.replace(position=Rotary(theta=1e6, scaling=scaling))
  block = group.pattern[0].replace(
    branches=(branch.replace(layer=layer), group.pattern[0].branches[1])
  )
  with pytest.raises(InputError, match=r'As qwen2: .*length: 512 -> 256'):
    match(longer.replace(stack=(group.replace(pattern=(block,)),)), [FAMILIES['qwen2']])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      QWEN25_7B | {'rope_scaling': {'type': 'longrope', 'factor': 2.0}},
      "rope_scaling: type = 'longrope': must be 'default' or 'linear' or 'dynamic' or",
    ),
    (
      QWEN25_7B | {'rope_scaling': {'type': 'yarn', 'factor': 4.0}},
      'rope_scaling: original_max_position_embeddings: is missing',
    ),
    (
      QWEN25_7B | {'rope_scaling': {'type': 'linear', 'factor': 4.0, 'finetuned': True}},
      'rope_scaling: finetuned = True: must be absent',
    ),
    (QWEN25_7B | {'rope_scaling': {'type': 'linear', 'factor': 0.0}}, 'factor = 0.0: must be'),
    (QWEN25_7B | {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    (
      QWEN25_7B | {'layer_types': ['sliding_attention'] * 28},
      'layer_types = .*: must be all full_attention without a sliding window',
    ),
    (QWEN25_7B | {'layer_types': ['full_attention'] * 3}, 'layer_types = .*: must be a list of 28'),
    (
      QWEN3_06B | {'layer_types': ['chunked_attention'] * 28},
      'layer_types = .*: must be a list of 28 of full_attention and sliding_attention',
    ),
    (QWEN3_06B | {'use_sliding_window': 'yes'}, "use_sliding_window = 'yes'"),
    (QWEN3_06B | {'attention_bias': 1}, 'attention_bias = 1'),
    (GEMMA2_27B | {'final_logit_softcapping': -1.0}, 'softcap = -1.0: must be positive'),
    (GEMMA2_27B | {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar = 0: must be positive'),
    (GEMMA2_27B | {'use_bidirectional_attention': True}, 'use_bidirectional_attention = True'),
    (GEMMA2_27B | {'hidden_activation': 'mish'}, "hidden_activation = 'mish'"),
    (GEMMA2_27B | {'sliding_window': None}, 'layer_types = None: must be all full_attention'),
    (GEMMA3_1B | {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0'),
    (
      GEMMA3_1B | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}},
      'rope_parameters = .*: must be settings of full_attention and sliding_attention',
    ),
    (
      OLMO3_7B | {'rope_scaling': OLMO3_7B['rope_scaling'] | {'truncate': False}},
      'full_attention: truncate = False: must be True',
    ),
    (OLMO2_7B | {'layer_types': ['sliding_attention'] * 32}, 'layer_types = '),
    (SMOLLM3 | {'no_rope_layers': [1, 0]}, 'no_rope_layers = .*: must be a list of 36 of 0 and 1'),
    (
      SMOLLM3 | {'layer_types': ['sliding_attention'] * 36, 'sliding_window': 8},
      'layer_types = .*: must be all full_attention without a sliding window',
    ),
  ],
)
def test_unsupported_settings_are_named(fields, message):
  with pytest.raises(InputError, match=message):
    read(fields)
