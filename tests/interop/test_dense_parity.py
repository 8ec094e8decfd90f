"""Qwen2 and 3, Gemma 2 and 3, OLMo 2 and 3, SmolLM3, and scaled rotary positions of Llama against
transformers: the same logits in both directions and the same greedy tokens, fp32 on a CPU."""

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
  'intermediate_size': 96,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  'pad_token_id': None,
}
GEMMA = SIZE | {'head_dim': 24, 'query_pre_attn_scalar': 20, 'sliding_window': 7}
YARN = {
  'rope_type': 'yarn',
  'rope_theta': 1e4,
  'factor': 4.0,
  # short, so that the sequences here are far beyond it
  'original_max_position_embeddings': 32,
}
BY_TYPE = {
  'full_attention': YARN | {'attention_factor': 1.3},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
}

MODELS = {
  'qwen2': ('Qwen2', SIZE),
  'qwen3': ('Qwen3', SIZE | {'head_dim': 24}),
  'gemma2': ('Gemma2', GEMMA),
  'gemma3': ('Gemma3Text', GEMMA | {'num_hidden_layers': 8, 'rope_parameters': BY_TYPE}),
  'olmo2': ('Olmo2', SIZE | {'rms_norm_eps': 1e-2}),
  'olmo3': ('Olmo3', SIZE | {'sliding_window': 7, 'rope_parameters': BY_TYPE}),
  'smollm3': ('SmolLM3', SIZE),
}
MODELS |= {
  'qwen2-windows': (
    'Qwen2',
    SIZE
    | {
      'use_sliding_window': True,
      'sliding_window': 7,
      'max_window_layers': 3,
      'tie_word_embeddings': True,
      'rope_parameters': YARN,
      'head_dim': 24,
    },
  ),
  'qwen3-unusual': (
    'Qwen3',
    SIZE
    | {
      'attention_bias': True,
      'use_sliding_window': True,
      'sliding_window': 5,
      'layer_types': ['sliding_attention', 'full_attention'] * 2,
      'rms_norm_eps': 1e-2,
      'head_dim': 16,
    },
  ),
  'gemma2-unusual': (
    'Gemma2',
    GEMMA
    | {
      'num_hidden_layers': 3,
      'attention_bias': True,
      'final_logit_softcapping': None,
      'attn_logit_softcapping': 3.0,
      'hidden_activation': 'silu',
      'tie_word_embeddings': False,
      'rms_norm_eps': 1e-2,
    },
  ),
  'gemma3-unusual': (
    'Gemma3Text',
    GEMMA
    | {
      'attention_bias': True,
      'final_logit_softcapping': 4.0,
      'sliding_window_pattern': 2,
      'num_hidden_layers': 3,
      'rope_parameters': BY_TYPE
      | {'full_attention': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 8.0}},
    },
  ),
  'olmo2-unusual': ('Olmo2', SIZE | {'attention_bias': True, 'num_key_value_heads': 4}),
  'olmo3-unusual': (
    'Olmo3',
    SIZE | {'attention_bias': True, 'layer_types': ['full_attention'] * 3 + ['sliding_attention']},
  ),
  'smollm3-unusual': (
    'SmolLM3',
    SIZE
    | {
      'no_rope_layers': [0, 1, 1, 0],
      'attention_bias': True,
      'mlp_bias': True,
      'use_sliding_window': True,
      'sliding_window': 7,
      'tie_word_embeddings': False,
    },
  ),
  'llama-linear': (
    'Llama',
    SIZE | {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 3.0}},
  ),
  # Up to 256 positions, its original context, it is no scaling.
  'llama-dynamic': (
    'Llama',
    SIZE | {'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 3.0}},
  ),
  'llama-yarn': (
    'Llama',
    SIZE
    | {
      'rope_parameters': YARN
      | {
        'beta_fast': 4.0,
        'beta_slow': 0.5,
        'mscale': 1.0,
        'mscale_all_dim': 0.6,
        'truncate': False,
      }
    },
  ),
  'mistral-nemo': (
    'Mistral',
    SIZE | {'head_dim': 24, 'sliding_window': None, 'rope_parameters': YARN},
  ),
}
STANDING = 'gemma3', 'olmo3', 'qwen2'


@pytest.fixture(
  scope='module', params=[case(name, standing=name in STANDING, id=name) for name in MODELS]
)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  family, fields = MODELS[request.param]
  model, folder = random_model(family, fields), tmp_path_factory.mktemp('hf') / 'theirs'
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in model.parameters())
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


@pytest.mark.parametrize(
  'imported', [case(n, standing=n == 'gemma3', id=n) for n in MODELS], indirect=True
)
def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)
