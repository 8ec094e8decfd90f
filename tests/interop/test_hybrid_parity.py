"""Hybrids of recurrences, convolutions and attention against transformers, as in
`test_hf_parity`."""

import pytest

from jaxformer.interop import load_hf
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
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}
NEMOTRON = SIZE | {
  'hybrid_override_pattern': 'M-M*-M-',
  'head_dim': 24,
  'mamba_num_heads': 12,
  'mamba_head_dim': 8,
  'ssm_state_size': 16,
  'n_groups': 4,
}
LFM2 = SIZE | {'num_hidden_layers': 5, 'full_attn_idxs': [2, 4], 'block_multiple_of': 16}
MODELS = {
  'nemotron-h': ('NemotronH', NEMOTRON),
  'nemotron-h-experts': (
    'NemotronH',
    NEMOTRON
    | {
      'hybrid_override_pattern': 'ME*E-M',
      'n_routed_experts': 4,
      'moe_intermediate_size': 40,
      'moe_shared_expert_intermediate_size': 48,
      'num_experts_per_tok': 2,
      'routed_scaling_factor': 2.5,
      'use_bias': True,
      'use_conv_bias': False,
      'mlp_bias': True,
      'mlp_hidden_act': 'silu',
      'conv_kernel': 3,
      'n_groups': 2,
      'time_step_min': 0.05,
      'layer_norm_epsilon': 1e-2,
    },
  ),
  'lfm2': ('Lfm2', LFM2),
  'lfm2-unusual': (
    'Lfm2',
    LFM2
    | {
      'full_attn_idxs': None,
      'layer_types': ['full_attention', 'conv', 'conv', 'full_attention', 'conv'],
      'conv_bias': True,
      'conv_L_cache': 4,
      'block_ffn_dim_multiplier': 1.3,
      'tie_word_embeddings': False,
      'norm_eps': 1e-2,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
    },
  ),
}
GRANITE = SIZE | {
  'num_hidden_layers': 4,
  'shared_intermediate_size': 80,
  'layer_types': ['mamba', 'attention', 'mamba', 'mamba'],
  'mamba_n_heads': 8,
  'mamba_d_state': 16,
  'embedding_multiplier': 3.0,
  'residual_multiplier': 0.3,
  'attention_multiplier': 0.1,
  'logits_scaling': 0.6,
  'tie_word_embeddings': True,
}
FALCON = SIZE | {
  'num_hidden_layers': 3,
  'head_dim': 16,
  'mamba_d_ssm': 48,
  'mamba_n_heads': 6,
  'mamba_d_state': 16,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e11},
  'embedding_multiplier': 1.7,
  'lm_head_multiplier': 0.8,
  'key_multiplier': 0.4,
  'attention_in_multiplier': 1.2,
  'attention_out_multiplier': 0.7,
  'ssm_in_multiplier': 1.25,
  'ssm_out_multiplier': 0.6,
  'ssm_multipliers': [0.35, 0.5, 0.7, 1.3, 0.9],
  'mlp_multipliers': [0.9, 0.6],
}
MODELS |= {
  'granite-4-h': ('GraniteMoeHybrid', GRANITE | {'num_local_experts': 4, 'num_experts_per_tok': 2}),
  'granite-4-h-dense': (
    'GraniteMoeHybrid',
    GRANITE
    | {
      'num_local_experts': 0,
      'position_embedding_type': 'rope',
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
      'mamba_n_groups': 2,
      'mamba_d_head': 16,
      'mamba_expand': 3,
      'mamba_n_heads': 12,
      'mamba_d_conv': 3,
      'mamba_proj_bias': True,
      'mamba_conv_bias': False,
      'attention_bias': True,
      'time_step_limit': [0.3, 0.9],
      'tie_word_embeddings': False,
      'rms_norm_eps': 1e-2,
    },
  ),
  'falcon-h1': ('FalconH1', FALCON),
  'falcon-h1-normed': (
    'FalconH1',
    FALCON
    | {
      'head_dim': 24,
      'mamba_rms_norm': True,
      'mamba_norm_before_gate': True,
      'mamba_n_groups': 2,
      'mamba_d_conv': 3,
      'mamba_proj_bias': True,
      'projectors_bias': True,
      'mamba_conv_bias': False,
      'attention_bias': True,
      'mlp_bias': True,
      'time_step_limit': [0.3, 0.9],
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-2,
    },
  ),
}
# Of Mamba-2 with clipped step sizes, which they do not clip where they decode with a cache.
STEPS_DIFFER = 'nemotron-h-experts', 'granite-4-h-dense', 'falcon-h1-normed'
CASES = [case(name, standing=name in ('nemotron-h', 'lfm2', 'falcon-h1')) for name in MODELS]


@pytest.fixture(scope='module', params=CASES)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = random_model(*MODELS[request.param]), tmp_path_factory.mktemp('hf') / 'theirs'
  biases = biases_of_choice(model)
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in [*model.parameters(), *biases])
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


def test_greedy_tokens_are_the_same(imported, request):
  same_greedy_tokens(*imported, use_cache=request.node.callspec.id not in STEPS_DIFFER)
