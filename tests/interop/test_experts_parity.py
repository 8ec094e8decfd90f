"""gpt-oss and Llama 4 against transformers: the same logits in both directions and the same greedy
tokens, fp32 on a CPU."""

import pytest

from jaxformer.interop import load_hf
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
  'num_hidden_layers': 4,
  'intermediate_size': 48,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 24,
  'num_local_experts': 4,
  'max_position_embeddings': 256,
}
# Original contexts are short, so that the sequences here are far beyond them.
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 1e4,
  'factor': 4.0,
  'truncate': False,
  'original_max_position_embeddings': 32,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 1e4,
  'factor': 16.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 1.0,
  'original_max_position_embeddings': 32,
}
GPT_OSS = SIZE | {'num_experts_per_tok': 2, 'sliding_window': 7, 'rope_parameters': YARN}
LLAMA4 = SIZE | {'attention_chunk_size': 8, 'floor_scale': 5, 'attn_scale': 0.5}

MODELS = {
  'gpt-oss': ('GptOss', GPT_OSS | {'swiglu_limit': 0.3}),
  'llama4-scout': ('Llama4Text', LLAMA4 | {'rope_parameters': LLAMA3}),
  'gpt-oss-unusual': (
    'GptOss',
    GPT_OSS
    | {
      'attention_bias': False,
      'num_experts_per_tok': 3,
      'layer_types': ['full_attention'] * 3 + ['sliding_attention'],
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-2,
    },
  ),
  'llama4-maverick': (
    'Llama4Text',
    LLAMA4
    | {
      'interleave_moe_layer_step': 2,
      'intermediate_size_mlp': 80,
      'use_qk_norm': False,
      'no_rope_layers': [0, 1, 1, 0],
    },
  ),
  'llama4-unusual': (
    'Llama4Text',
    LLAMA4
    | {
      'moe_layers': [0, 3],
      'num_experts_per_tok': 2,
      'no_rope_layer_interval': 2,
      'layer_types': ['full_attention', 'chunked_attention'] * 2,
      'attn_temperature_tuning': False,
      'attention_bias': True,
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-2,
    },
  ),
}
STANDING = 'gpt-oss', 'llama4-scout'
EVERY = [case(name, standing=name in STANDING, id=name) for name in MODELS]


@pytest.fixture(scope='module', params=EVERY)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = random_model(*MODELS[request.param]), tmp_path_factory.mktemp('hf') / 'theirs'
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in model.parameters())
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


@pytest.mark.parametrize('imported', EVERY, indirect=True)
def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)
