"""Hybrids of the delta rule and attention against transformers, as in `test_hf_parity`."""

import numpy as np
import pytest
import safetensors.numpy

from jaxformer.config import InputError
from jaxformer.interop import load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import SINGLE
from jaxformer.models.params import define
from tests.interop.parity import (
  MARKS,
  biases_of_choice,
  random_model,
  same_after_export,
  same_after_import,
  same_greedy_tokens,
)
from tests.tiers import case

pytestmark = MARKS

SIZE = {
  'vocab_size': 97,
  'hidden_size': 64,
  'intermediate_size': 96,
  'max_position_embeddings': 256,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'pad_token_id': None,
}
NO_POSITIONS = {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}
QWEN = {
  'num_key_value_heads': 2,
  'head_dim': 24,
  'linear_num_key_heads': 2,
  'linear_num_value_heads': 4,
  'linear_key_head_dim': 12,
  'linear_value_head_dim': 8,
}
ROPE = {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}
EXPERTS = {
  'num_experts': 6,
  'num_experts_per_tok': 3,
  'moe_intermediate_size': 24,
  'shared_expert_intermediate_size': 40,
}
KIMI = {
  'num_key_value_heads': 4,
  'moe_intermediate_size': 24,
  'kv_lora_rank': 16,
  'qk_rope_head_dim': 8,
  'qk_nope_head_dim': 16,
  'v_head_dim': 12,
  'num_local_experts': 6,
  'num_experts_per_tok': 3,
  'linear_head_dim': 8,
  'linear_num_heads': 2,
  'layer_types': ['linear_attention'] * 3 + ['full_attention'],
}
MODELS = {
  'olmo-hybrid': ('OlmoHybrid', SIZE | NO_POSITIONS),
  'olmo-hybrid-unusual': (
    'OlmoHybrid',
    SIZE
    | {
      'num_key_value_heads': 2,
      'layer_types': ['full_attention', 'linear_attention', 'linear_attention', 'full_attention'],
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
      'linear_num_key_heads': 2,
      'linear_num_value_heads': 4,
      'linear_key_head_dim': 12,
      'linear_value_head_dim': 8,
      'linear_conv_kernel_dim': 3,
      'linear_allow_neg_eigval': False,
      'attention_bias': True,
      'rms_norm_eps': 1e-2,
      'tie_word_embeddings': True,
    },
  ),
  'qwen3-next': ('Qwen3Next', SIZE | QWEN | EXPERTS),
  'qwen3-next-unusual': (
    'Qwen3Next',
    SIZE
    | QWEN
    | EXPERTS
    | {
      'layer_types': ['full_attention', 'linear_attention', 'linear_attention', 'full_attention'],
      'rope_parameters': ROPE,
      'linear_num_value_heads': 2,
      'linear_conv_kernel_dim': 3,
      'decoder_sparse_step': 2,
      'mlp_only_layers': [3],
      'norm_topk_prob': False,
      'attention_bias': True,
      'rms_norm_eps': 1e-2,
      'tie_word_embeddings': True,
    },
  ),
}
MODELS |= {
  'qwen3.5': (
    'Qwen3_5Text',
    SIZE
    | QWEN
    | {'rope_parameters': ROPE | {'mrope_section': [3, 2, 1], 'mrope_interleaved': True}},
  ),
  'qwen3.5-moe': ('Qwen3_5MoeText', SIZE | QWEN | EXPERTS | {'attention_bias': True}),
  'kimi-linear': ('KimiLinear', SIZE | KIMI),
  'kimi-linear-unusual': (
    'KimiLinear',
    SIZE
    | KIMI
    | {
      'layer_types': ['full_attention', 'linear_attention', 'linear_attention', 'full_attention'],
      'mlp_layer_types': ['sparse', 'dense', 'sparse', 'sparse'],
      'q_lora_rank': 20,
      'n_shared_experts': 2,
      'n_group': 3,
      'topk_group': 2,
      'norm_topk_prob': False,
      'routed_scaling_factor': 1.5,
      'linear_conv_kernel_dim': 3,
      'attention_bias': True,
      'rms_norm_eps': 1e-2,
    },
  ),
}
CASES = [case(name, standing=name == 'olmo-hybrid') for name in MODELS]


def as_published(model, folder):
  """Cut the convolutions of OLMo Hybrid as in the published files; `save_pretrained` cuts them in
  three equal parts."""
  if model.config.model_type != 'olmo_hybrid':
    return
  tensors, config = safetensors.numpy.load_file(folder / SINGLE), model.config
  keys = config.linear_num_key_heads * config.linear_key_head_dim
  for query in [n for n in tensors if n.endswith('q_conv1d.weight')]:
    names = [query.replace('q_conv1d', f'{p}_conv1d') for p in 'qkv']
    parts = np.split(np.concatenate([tensors[n] for n in names]), [keys, 2 * keys])
    tensors.update(zip(names, parts, strict=True))
  safetensors.numpy.save_file(tensors, folder / SINGLE, metadata={'format': 'pt'})


@pytest.fixture(scope='module', params=CASES)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = random_model(*MODELS[request.param]), tmp_path_factory.mktemp('hf') / 'theirs'
  choices = biases_of_choice(model)
  model.save_pretrained(folder)
  as_published(model, folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in [*model.parameters(), *choices])
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)


@pytest.mark.parametrize(
  ('family', 'fields', 'message'),
  [
    ('olmo_hybrid', {'layer_types': ['linear_attention'] * 4}, 'layer_types'),
    ('olmo_hybrid', {'layer_types': ['sliding_attention'] * 4}, 'layer_types'),
    ('olmo_hybrid', {'hidden_act': 'gelu'}, 'hidden_act'),
    ('olmo_hybrid', {'rope_scaling': {'rope_type': 'nonsense', 'factor': 2.0}}, 'rope_type'),
    (
      'olmo_hybrid',
      {'rope_parameters': {'rope_type': 'linear', 'rope_theta': None, 'factor': 2.0}},
      'rope_type',
    ),
    ('qwen3_next', {'layer_types': ['full_attention'] * 4}, 'layer_types'),
    ('qwen3_next', {'hidden_act': 'relu'}, 'hidden_act'),
    ('qwen3_next', {'mlp_only_layers': 3}, 'mlp_only_layers'),
    ('qwen3_next', {'attn_output_gate': False}, 'attn_output_gate'),
    ('qwen3_next', {'rope_scaling': {'rope_type': 'nonsense', 'factor': 2.0}}, 'rope_type'),
    ('qwen3_next', {'rope_parameters': {'rope_theta': 1e4, 'mystery': 2.0}}, 'mystery'),
    ('qwen3_5_text', {'rope_parameters': {'rope_theta': 1e4, 'mystery': 2.0}}, 'mystery'),
    ('qwen3_5_text', {'rope_scaling': {'rope_type': 'nonsense', 'factor': 2.0}}, 'rope_type'),
    ('qwen3_5_moe_text', {'norm_topk_prob': False}, 'norm_topk_prob'),
    ('kimi_linear', {'num_hidden_layers': 5, 'mlp_layer_types': ['dense']}, 'mlp_layer_types'),
    ('kimi_linear', {'mla_use_nope': False}, 'mla_use_nope'),
    ('kimi_linear', {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}, 'rope_scaling'),
    ('kimi_linear', {'moe_router_activation_func': 'softmax'}, 'moe_router_activation_func'),
    ('kimi_linear', {'num_experts': 8, 'num_local_experts': 6}, 'num_local_experts'),
    ('kimi_linear', {'linear_attn_config': {'kda_layers': [1, 2]}}, 'linear_attn_config'),
    ('kimi_linear', {'linear_attn_config': {'mystery': 3}}, 'mystery'),
  ],
)
def test_what_is_not_supported_is_named(family, fields, message):
  with pytest.raises(InputError, match=message):
    FAMILIES[family].read(Settings(SIZE | fields))


def test_kimi_as_published():
  """The sizes of its layers and their order stand in an object of their own."""
  linear = {
    'full_attn_layers': [2, 4],
    'kda_layers': [1, 3],
    'head_dim': 8,
    'num_heads': 2,
    'short_conv_kernel_size': 3,
  }
  fields = SIZE | KIMI | {'layer_types': None, 'linear_attn_config': linear}
  config = FAMILIES['kimi_linear'].read(Settings(fields))
  same = SIZE | KIMI | {'layer_types': ['linear_attention', 'full_attention'] * 2}
  same |= {'linear_conv_kernel_dim': 3, 'first_k_dense_replace': 1}
  assert config == FAMILIES['kimi_linear'].read(Settings(same))


def test_sizes_of_the_defaults_of_transformers():
  """Counted on its meta device, without the biases that choose the experts."""
  expected = {
    'qwen3_next': 79_674_391_296,
    'qwen3_5_text': 8_953_803_264,
    'qwen3_5_moe_text': 34_660_610_688,
    'kimi_linear': 49_133_074_464 + 26 * 256,
    'olmo_hybrid': 7_430_870_688,
  }
  sizes = {name: define(FAMILIES[name].read(Settings({}))).size for name in expected}
  assert sizes == expected
