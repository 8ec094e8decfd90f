"""xLSTM and RecurrentGemma against transformers: logits in both directions and greedy tokens; their
published configs are our presets."""

import json

import pytest

from jaxformer.config import InputError
from jaxformer.interop import load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.settings import Settings
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from tests.interop.parity import (
  MARKS,
  random_model,
  same_after_export,
  same_after_import,
  same_greedy_tokens,
)
from tests.tiers import case

XLSTM = {
  'vocab_size': 97,
  'hidden_size': 128,
  'num_hidden_layers': 2,
  'num_blocks': 2,
  'num_heads': 2,
}
GEMMA = {
  'vocab_size': 97,
  'hidden_size': 64,
  'num_hidden_layers': 5,
  'num_attention_heads': 4,
  'num_key_value_heads': 1,
  'intermediate_size': 192,
  'attention_window_size': 24,
  'pad_token_id': None,
}
MODELS = {
  'xlstm': ('xLSTM', XLSTM),
  'xlstm-unusual': (
    'xLSTM',
    XLSTM
    | {
      'qk_dim_factor': 1.0,
      'v_dim_factor': 2.0,
      'gate_soft_cap': 5.0,
      'output_logit_soft_cap': 10.0,
      'ffn_proj_factor': 1.3,
      'ffn_round_up_to_multiple_of': 24,
      'norm_eps': 1e-2,
      'eps': 1e-3,
      'chunk_size': 16,
    },
  ),
  'recurrentgemma': ('RecurrentGemma', GEMMA),
  'recurrentgemma-unusual': (
    'RecurrentGemma',
    GEMMA
    | {
      'block_types': ['attention', 'recurrent'],
      'num_hidden_layers': 3,
      'num_key_value_heads': 2,
      'attention_bias': True,
      'conv1d_width': 3,
      'hidden_activation': 'silu',
      'logits_soft_cap': 10.0,
      'rms_norm_eps': 1e-2,
      'tie_word_embeddings': False,
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 5000.0,
        'partial_rotary_factor': 0.25,
      },
    },
  ),
}
USUAL = [case(name, standing='-' not in name) for name in MODELS]


@pytest.fixture(scope='module')
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model = random_model(*MODELS[request.param])
  folder = tmp_path_factory.mktemp('hf') / 'theirs'
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in model.parameters())
  return model, ours, params


class TestParity:
  pytestmark = MARKS

  @pytest.mark.parametrize('imported', USUAL, indirect=True)
  def test_import_gives_the_same_logits(self, imported, request):
    same_after_import(*imported, request.node.callspec.id)

  @pytest.mark.parametrize(
    'imported', [case(name, standing=name == 'xlstm') for name in MODELS], indirect=True
  )
  def test_export_gives_the_same_logits(self, imported, request, tmp_path):
    same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)

  @pytest.mark.parametrize(
    'imported', ['xlstm', case('recurrentgemma', standing=False)], indirect=True
  )
  def test_greedy_tokens_are_the_same(self, imported):
    same_greedy_tokens(*imported)


def read(model_type, **fields):
  return FAMILIES[model_type].read(Settings(fields))


@pytest.mark.parametrize('name', ['xlstm-7b', 'recurrentgemma-2b', 'recurrentgemma-9b'])
def test_presets_go_there_and_back(name):
  model, kind = PRESETS[name].model, 'xlstm' if name == 'xlstm-7b' else 'recurrent_gemma'
  back = read(kind, **json.loads(json.dumps(FAMILIES[kind].write(model))))
  blocks = [b for g in model.stack for b in g.pattern * g.repeats]
  assert blocks == [b for g in back.stack for b in g.pattern * g.repeats]
  assert back.replace(stack=model.stack) == model


@pytest.mark.parametrize(
  ('kind', 'fields'),
  [
    ('xlstm', {'weight_mode': 'fused'}),
    ('xlstm', {'use_bias': True}),
    ('xlstm', {'add_out_norm': False}),
    ('xlstm', {'tie_word_embeddings': True}),
    ('xlstm', {'num_blocks': 3}),
    ('recurrent_gemma', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}),
    ('recurrent_gemma', {'block_types': ['recurrent', 'mamba']}),
    ('recurrent_gemma', {'head_dim': 64}),
    ('recurrent_gemma', {'embeddings_scale_by_sqrt_dim': False}),
  ],
)
def test_what_our_layers_lack_is_refused(kind, fields):
  with pytest.raises(InputError, match=next(iter(fields))):
    read(kind, **fields)


def test_unknown_rotary_frequencies_are_refused():
  with pytest.raises(InputError, match='rope_type'):
    read('recurrent_gemma', rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 2.0})
