"""MiniMax-01 against transformers: layers of lightning and of softmax attention in orders of their
own, factors on residual sums, experts."""

import pytest

from jaxformer.config import InputError
from jaxformer.interop import load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.settings import Settings
from tests.interop.parity import (
  MARKS,
  random_model,
  same_after_export,
  same_after_import,
  same_greedy_tokens,
)

pytestmark = MARKS

SIZE = {
  'vocab_size': 97,
  'hidden_size': 64,
  'num_hidden_layers': 4,
  'intermediate_size': 96,
  'max_position_embeddings': 256,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'num_experts_per_tok': 2,
  'num_local_experts': 4,
  'block_size': 32,  # three of them, and a rest
}
MODELS = {
  'published': SIZE
  | {
    'layer_types': ['linear_attention'] * 3 + ['full_attention'],
    **{f'{kind}_alpha_factor': 8**0.25 for kind in ('full_attn', 'linear_attn', 'mlp')},
  },
  'unusual': SIZE
  | {
    'num_hidden_layers': 3,
    'head_dim': 24,
    'sliding_window': 7,
    'rms_norm_eps': 1e-2,
    'hidden_act': 'gelu_pytorch_tanh',
    'tie_word_embeddings': True,
    'router_aux_loss_coef': 0.0,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
    'full_attn_alpha_factor': 1.5,
    'full_attn_beta_factor': 0.5,
    'linear_attn_alpha_factor': 0.7,
    'linear_attn_beta_factor': 1.2,
    'mlp_alpha_factor': 0.9,
    'mlp_beta_factor': 2.0,
  },
}


@pytest.fixture(scope='module', params=MODELS)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = random_model('MiniMax', MODELS[request.param]), tmp_path_factory.mktemp('hf')
  model.save_pretrained(folder)
  return model, *load_hf(folder)


def test_import_gives_the_same_logits(imported):
  same_after_import(*imported, 'minimax')


def test_export_gives_the_same_logits(imported, tmp_path):
  decays = r'.*self_attn\.(slope_rate|(query|key|diagonal)_decay)'
  same_after_export(imported[1], tmp_path / 'ours', 'minimax', computed=decays)


def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'layer_types': ['linear_attention']}, 'layer_types'),
    ({'layer_types': ['linear_attention'] * 3 + ['sliding_attention']}, 'layer_types'),
    ({'rope_parameters': {'rope_type': 'nonsense', 'rope_theta': 1e4}}, 'rope_type'),
    ({'mlp_alpha_factor': -1.0}, 'mlp_alpha_factor'),
    ({'router_jitter_noise': 0.1}, 'router_jitter_noise'),
  ],
)
def test_what_is_not_supported_is_named(fields, message):
  with pytest.raises(InputError, match=message):
    FAMILIES['minimax'].read(Settings(SIZE | fields))
