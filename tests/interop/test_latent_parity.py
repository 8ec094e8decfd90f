"""DeepSeek-V2 and DeepSeek-V3 against transformers: the same logits in both directions and the same
greedy tokens, fp32 on a CPU."""

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
  'num_hidden_layers': 3,
  'intermediate_size': 96,
  'moe_intermediate_size': 24,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'max_position_embeddings': 256,
  'kv_lora_rank': 24,
  'q_lora_rank': 20,
  'qk_nope_head_dim': 16,
  'qk_rope_head_dim': 8,
  'v_head_dim': 12,
  'n_routed_experts': 8,
  'num_experts_per_tok': 3,
  'n_group': 4,
  'topk_group': 2,
  'first_k_dense_replace': 1,
}
# The original context is short, so that the sequences here are far beyond it; the weights differ,
# so that both the amplitude of positions and the factor on the logits are not 1.
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 1e4,
  'factor': 8.0,
  'beta_fast': 4.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 0.707,
  'original_max_position_embeddings': 32,
}
DEFAULT = {'rope_type': 'default', 'rope_theta': 5e3}
GROUPED = {'topk_method': 'group_limited_greedy', 'routed_scaling_factor': 16.0}

MODELS = {
  'v2': ('DeepseekV2', SIZE | GROUPED | {'rope_parameters': YARN}),
  'v3': ('DeepseekV3', SIZE | {'n_shared_experts': 1, 'rope_parameters': YARN}),
  'v2-lite': (
    'DeepseekV2',
    SIZE | {'q_lora_rank': None, 'n_group': 1, 'topk_group': 1, 'rope_parameters': YARN},
  ),
  'v2-unusual': (
    'DeepseekV2',
    SIZE
    | {
      'attention_bias': True,
      'mlp_bias': True,
      'first_k_dense_replace': 0,
      'rope_parameters': DEFAULT,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-2,
      'hidden_act': 'gelu_pytorch_tanh',
    },
  ),
  'v3-unusual': (
    'DeepseekV3',
    SIZE
    | {
      'attention_bias': True,
      'q_lora_rank': None,
      'norm_topk_prob': False,
      'n_group': 1,
      'topk_group': 1,
      'n_shared_experts': 2,
      'first_k_dense_replace': 2,
      'rope_interleave': False,
      'rope_parameters': DEFAULT,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-2,
      'hidden_act': 'gelu_pytorch_tanh',
    },
  ),
}
STANDING = 'v2', 'v3'
EVERY = [case(name, standing=name in STANDING, id=name) for name in MODELS]


@pytest.fixture(scope='module', params=EVERY)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = random_model(*MODELS[request.param]), tmp_path_factory.mktemp('hf') / 'theirs'
  biases = biases_of_choice(model)
  assert bool(biases) == request.param.startswith('v3')
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in [*model.parameters(), *biases])
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


@pytest.mark.parametrize(
  'imported', [case(name, standing=name == 'v3', id=name) for name in MODELS], indirect=True
)
def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)
