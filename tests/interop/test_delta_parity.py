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
  model.save_pretrained(folder)
  as_published(model, folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in model.parameters())
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
  ],
)
def test_what_is_not_supported_is_named(family, fields, message):
  with pytest.raises(InputError, match=message):
    FAMILIES[family].read(Settings(SIZE | fields))
