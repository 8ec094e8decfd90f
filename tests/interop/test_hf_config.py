"""`config.json` <-> our config: the published ones, both forms of rope settings, and what is
refused by name."""

import json

import pytest

import jaxformer
from jaxformer.config import InputError
from jaxformer.interop import huggingface, load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import match
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name
from jaxformer.layers.position import Llama3Scaling, Rotary
from jaxformer.models.stack import grouped
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.rwkv4 import rwkv4
from jaxformer.overrides import override

pytestmark = pytest.mark.quick

# What the published repositories hold, with the fields that say something of the function.
GPT2 = {
  'activation_function': 'gelu_new',
  'attn_pdrop': 0.1,
  'embd_pdrop': 0.1,
  'initializer_range': 0.02,
  'layer_norm_epsilon': 1e-05,
  'model_type': 'gpt2',
  'n_ctx': 1024,
  'n_embd': 768,
  'n_head': 12,
  'n_layer': 12,
  'n_positions': 1024,
  'resid_pdrop': 0.1,
  'summary_type': 'cls_index',
  'vocab_size': 50257,
}
LLAMA31_8B = {
  'attention_bias': False,
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_theta': 500000.0,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'vocab_size': 128256,
}
LLAMA32_1B = LLAMA31_8B | {
  'head_dim': 64,
  'hidden_size': 2048,
  'intermediate_size': 8192,
  'num_hidden_layers': 16,
  'tie_word_embeddings': True,
  'rope_scaling': LLAMA31_8B['rope_scaling'] | {'factor': 32.0},
}
LLAMA2_7B = {
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'max_position_embeddings': 4096,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'rms_norm_eps': 1e-05,
  'rope_scaling': None,
  'vocab_size': 32000,
}
MAMBA_130M = {
  'conv_kernel': 4,
  'd_inner': 1536,
  'd_model': 768,
  'expand': 2,
  'fused_add_norm': True,
  'hidden_act': 'silu',
  'hidden_size': 768,
  'initializer_range': 0.1,
  'intermediate_size': 1536,
  'layer_norm_epsilon': 1e-05,
  'model_type': 'mamba',
  'n_layer': 24,
  'num_hidden_layers': 24,
  'rescale_prenorm_residual': False,
  'residual_in_fp32': True,
  'rms_norm': True,
  'state_size': 16,
  'time_step_floor': 0.0001,
  'time_step_init_scheme': 'random',
  'time_step_max': 0.1,
  'time_step_min': 0.001,
  'time_step_rank': 48,
  'time_step_scale': 1.0,
  'use_bias': False,
  'use_conv_bias': True,
  'vocab_size': 50280,
}
MAMBA2_130M = {
  'chunk_size': 256,
  'conv_kernel': 4,
  'expand': 2,
  'head_dim': 64,
  'hidden_act': 'silu',
  'hidden_size': 768,
  'initializer_range': 0.1,
  'layer_norm_epsilon': 1e-05,
  'model_type': 'mamba2',
  'n_groups': 1,
  'norm_before_gate': False,
  'num_heads': 24,
  'num_hidden_layers': 24,
  'residual_in_fp32': True,
  'rms_norm': True,
  'state_size': 128,
  'tie_word_embeddings': True,
  'time_step_floor': 0.0001,
  'time_step_limit': [0.0, float('inf')],
  'time_step_max': 0.1,
  'time_step_min': 0.001,
  'use_bias': False,
  'use_conv_bias': True,
  'vocab_size': 50288,
}
MIXTRAL_8X7B = {
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'model_type': 'mixtral',
  'num_attention_heads': 32,
  'num_experts_per_tok': 2,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'num_local_experts': 8,
  'output_router_logits': False,
  'rms_norm_eps': 1e-05,
  'rope_theta': 1000000.0,
  'router_aux_loss_coef': 0.02,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'vocab_size': 32000,
}
JAMBA = {
  'attention_dropout': 0.0,
  'attn_layer_offset': 4,
  'attn_layer_period': 8,
  'expert_layer_offset': 1,
  'expert_layer_period': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'mamba_conv_bias': True,
  'mamba_d_conv': 4,
  'mamba_d_state': 16,
  'mamba_dt_rank': 256,
  'mamba_expand': 2,
  'mamba_proj_bias': False,
  'max_position_embeddings': 262144,
  'model_type': 'jamba',
  'num_attention_heads': 32,
  'num_experts': 16,
  'num_experts_per_tok': 2,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'num_logits_to_keep': 1,
  'output_router_logits': False,
  'rms_norm_eps': 1e-06,
  'router_aux_loss_coef': 0.001,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'use_mamba_kernels': True,
  'vocab_size': 65536,
}
RWKV4_169M = {
  'attention_hidden_size': 768,
  'context_length': 1024,
  'hidden_size': 768,
  'intermediate_size': 3072,
  'layer_norm_epsilon': 1e-05,
  'model_type': 'rwkv',
  'num_hidden_layers': 12,
  'rescale_every': 6,
  'tie_word_embeddings': False,
  'use_cache': True,
  'vocab_size': 50277,
}


def written(config):
  """The `config.json` of a model."""
  kind = match(config, map(FAMILIES.__getitem__, FAMILIES))
  return {'model_type': kind.name, **kind.write(config)}


def read(fields):
  return FAMILIES[fields['model_type']].read(Settings(fields))


def regrouped(model):
  """The same blocks in the groups of `grouped`, to compare models block by block."""
  blocks = [b for group in model.stack for _ in range(group.repeats) for b in group.pattern]
  return model.replace(stack=grouped(blocks))


def in_files(name):
  """The model of a preset as files tell it: without the learning rate, up to which RWKV-4's
  embeddings are initialized."""
  model, init = regrouped(PRESETS[name].model), rwkv4(8, 1).embedding_init
  return model.replace(embedding_init=init) if PRESETS[name].family == 'rwkv4' else model


@pytest.mark.parametrize(
  ('fields', 'name'),
  [
    (GPT2, 'gpt2'),
    (LLAMA2_7B, 'llama2-7b'),
    (LLAMA31_8B, 'llama3.1-8b'),
    (LLAMA32_1B, 'llama3.2-1b'),
    (MAMBA_130M, 'mamba-130m'),
    (MAMBA2_130M, 'mamba2-130m'),
    (MIXTRAL_8X7B, 'mixtral-8x7b'),
    (JAMBA, 'jamba-v0.1'),
    (RWKV4_169M, 'rwkv4-169m'),
  ],
)
def test_published_configs_are_our_presets(fields, name):
  dropout = {'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0} if name == 'gpt2' else {}
  assert read(fields | dropout) == in_files(name)


@pytest.mark.parametrize(
  'name',
  [
    n
    for n in PRESETS
    if PRESETS[n].family
    in (
      'gpt2',
      'llama2',
      'llama3',
      'mamba',
      'mamba2',
      'mixtral',
      'jamba',
      'rwkv4',
      'nemotron-h',
      'lfm2',
      'granite4',
      'falcon-h1',
      'zamba2',
    )
  ],
)
def test_presets_go_there_and_back(name):
  fields = written(PRESETS[name].model)
  assert regrouped(read(json.loads(json.dumps(fields)))) == in_files(name)


def test_losses_of_routers_are_no_part_of_the_function():
  """A model trained with losses that transformers does not have is written all the same; one that
  drops tokens is not."""
  tiny = PRESETS['mixtral-tiny'].model
  assert (
    written(override(tiny, [('router.z_loss', '0.001'), ('router.pooled_balance', 'none')]))[
      'model_type'
    ]
    == 'mixtral'
  )
  with pytest.raises(InputError, match=r'As mixtral: .*capacity_factor'):
    written(override(tiny, [('capacity_factor', '1.25')]))


def test_gpt3_has_no_counterpart():
  with pytest.raises(
    InputError, match=r'As gpt2: stack\.1\.pattern\.0\.branches\.0\.layer\.window: 64 -> null'
  ):
    written(PRESETS['gpt3-tiny'].model)


def test_a_window_makes_it_mistral():
  fields = {
    'model_type': 'mistral',
    'hidden_size': 64,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'sliding_window': 8,
    'vocab_size': 32,
    'max_position_embeddings': 128,
  }
  config = read(fields)
  again = written(config)
  assert (again['model_type'], again['sliding_window']) == ('mistral', 8)
  assert read(again) == config
  assert written(read(fields | {'sliding_window': None}))['model_type'] == 'llama'


def rotary_of(**fields):
  return read({'model_type': 'llama', **fields}).stack[0].pattern[0].branches[0].layer.position


def test_both_forms_of_rope_settings():
  scaling = {
    'rope_type': 'llama3',
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 2.0,
    'original_max_position_embeddings': 64,
  }
  expected = Rotary(
    theta=5e5, scaling=Llama3Scaling(factor=4.0, low=1.0, high=2.0, original_context=64)
  )
  assert rotary_of() == Rotary()
  assert (
    rotary_of(rope_theta=5e5)
    == rotary_of(rope_parameters={'rope_theta': 5e5, 'rope_type': 'default'})
    == Rotary(theta=5e5)
  )
  assert rotary_of(rope_theta=5e5, rope_scaling=scaling) == expected
  assert rotary_of(rope_parameters={'rope_theta': 5e5, **scaling}) == expected
  assert (
    rotary_of(rope_theta=5e5, rope_scaling=scaling, rope_parameters={'rope_theta': 5e5, **scaling})
    == expected
  )
  with pytest.raises(
    InputError, match=r'rope_scaling = .* must be equivalent to rope_parameters = '
  ):
    rotary_of(rope_theta=5e5, rope_scaling=scaling, rope_parameters={'rope_theta': 1e4, **scaling})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      LLAMA2_7B | {'rope_scaling': {'type': 'longrope', 'factor': 2.0}},
      r"rope_scaling: type = 'longrope': must be 'default' or 'linear' or 'dynamic' or 'llama3' or",
    ),
    (
      LLAMA2_7B | {'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0}},
      r'rope_parameters: original_max_position_embeddings: is missing',
    ),
    (
      LLAMA2_7B | {'rope_parameters': {'rope_type': 'llama3', 'factor': 2.0}},
      'low_freq_factor: is missing',
    ),
    (
      LLAMA2_7B | {'rope_parameters': {'partial_rotary_factor': 0.5}},
      r'partial_rotary_factor = 0\.5',
    ),
    (
      LLAMA2_7B | {'rope_scaling': {'factor': 2.0}},
      r'rope_scaling: factor = 2\.0: must be with a rope_type, .*, which is missing',
    ),
    (
      LLAMA2_7B | {'rope_parameters': {'rope_type': 'default', 'factor': 2.0}},
      r'rope_parameters: factor = 2\.0: must be absent',
    ),
    (
      LLAMA2_7B | {'rope_scaling': LLAMA31_8B['rope_scaling'] | {'type': 'default'}},
      "rope_scaling: type = 'default': must be rope_type, 'llama3'",
    ),
    (LLAMA2_7B | {'rope_theta': 0}, 'rope_theta = 0: must be positive and finite'),
    (
      LLAMA2_7B | {'rope_parameters': {'rope_theta': -1.0}},
      r'rope_theta = -1\.0: must be positive',
    ),
    (
      LLAMA2_7B | {'layer_types': ['full_attention'] * 31 + ['sliding_attention']},
      'layer_types = .*: must be None or ',
    ),
    (GPT2 | {'num_attention_heads': 6}, 'num_attention_heads = 6: must be None or 12'),
    (JAMBA | {'layers_block_type': ['mamba'] * 32}, 'layers_block_type = '),
    (JAMBA | {'router_jitter_noise': 0.1}, 'router_jitter_noise = 0.1'),
    (
      {'d_model': 768, 'n_layer': 24, 'vocab_size': 50277, 'ssm_cfg': {}, 'rms_norm': True},
      'model_type: is missing: .* state-spaces/mamba-130m-hf',
    ),
    (LLAMA2_7B | {'hidden_act': 'mish'}, "hidden_act = 'mish': must be one of gelu,"),
    (LLAMA2_7B | {'hidden_size': '4096'}, "hidden_size = '4096': must be an integer"),
    (LLAMA2_7B | {'num_hidden_layers': 0}, 'num_hidden_layers = 0: must be positive'),
    (LLAMA2_7B | {'num_key_value_heads': 5}, 'kv_heads = 5'),
    (GPT2 | {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx = True'),
    (GPT2 | {'add_cross_attention': True}, 'add_cross_attention = True'),
    (MAMBA_130M | {'hidden_act': 'gelu'}, "hidden_act = 'gelu': must be 'silu' or 'swish'"),
    (MAMBA_130M | {'intermediate_size': 1000}, 'intermediate_size = 1000: must be 1536'),
    (MAMBA_130M | {'time_step_rank': 0}, 'time_step_rank = 0: must be positive'),
    (
      MAMBA2_130M | {'time_step_limit': [0.1, 0.0]},
      r'time_step_limit = \[0.1, 0.0\]: must be two numbers, not negative and rising',
    ),
    (MAMBA2_130M | {'num_heads': 12}, 'num_heads = 12: must be 2 x hidden_size / head_dim = 24'),
    (MAMBA2_130M | {'norm_before_gate': True}, 'norm_before_gate = True: must be False'),
    (MIXTRAL_8X7B | {'router_jitter_noise': 0.1}, 'router_jitter_noise = 0.1'),
    (
      MIXTRAL_8X7B | {'num_experts_per_tok': 9},
      r'TopKSoftmax\.k = 9: must be at most the number of experts, 8',
    ),
    (
      JAMBA | {'attn_layer_offset': 8},
      'attn_layer_offset = 8: must be at least 0 and below the period, 8',
    ),
    (JAMBA | {'hidden_act': 'gelu'}, "hidden_act = 'gelu': must be"),
    (
      RWKV4_169M | {'attention_hidden_size': 512},
      'attention_hidden_size = 512: must be None or 768',
    ),
    (GPT2 | {'model_type': 'gpt3'}, "model_type = 'gpt3': not supported; did you mean gpt2"),
    (GPT2 | {'model_type': None}, 'model_type: is missing'),
    (GPT2 | {'quantization_config': {'bits': 4}}, 'quantization_config'),
  ],
)
def test_unsupported_settings_are_named(tmp_path, fields, message):
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(InputError, match=message) as e:
    load_hf(tmp_path)
  assert 'config.json' in str(e.value) or any(w in message for w in ('kv_heads', 'TopKSoftmax'))


def test_fields_that_are_not_read_are_named_in_one_line(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(huggingface.logger, 'info', lines.append)
  more = {
    'use_cache': True,
    'my_note': 'x',
    'eos_token_id': 2,
    'num_beams': 4,
    'summary_type': None,
  }
  (tmp_path / 'config.json').write_text(json.dumps(LLAMA2_7B | more))
  with pytest.raises(InputError, match=r'neither model\.safetensors'):
    load_hf(tmp_path)
  path = tmp_path / 'config.json'
  assert lines == [f'{path}: not used in inference, and not read: my_note, use_cache']


def test_a_folder_of_the_authors_of_mamba_is_told_which_to_take(tmp_path):
  (tmp_path / 'config.json').write_text('{"d_model": 8, "n_layer": 1, "vocab_size": 9}')
  with pytest.raises(InputError, match='ends in -hf'):
    jaxformer.load(tmp_path)


@pytest.mark.parametrize('content', ['', '[1]', '{', '\xff'])
def test_config_that_is_no_object(tmp_path, content):
  (tmp_path / 'config.json').write_text(content, encoding='latin-1')
  with pytest.raises(InputError, match=r'config\.json'):
    load_hf(tmp_path)


def test_activations_have_a_name_there_and_back():
  for ours in set(ACTIVATIONS.values()):
    assert ACTIVATIONS[activation_name(ours)] == ours
