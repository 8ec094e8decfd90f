"""Shared transformer blocks with adapters against transformers: the same logits and the same greedy
tokens, in both directions, fp32 on a CPU."""

import pytest

from jaxformer.interop import load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.settings import Settings
from jaxformer.models.params import define
from tests.interop.parity import (
  MARKS,
  random_model,
  same_after_export,
  same_after_import,
  same_greedy_tokens,
)
from tests.tiers import first_stands

pytestmark = MARKS

ZAMBA2 = {
  'vocab_size': 97,
  'hidden_size': 32,
  'num_hidden_layers': 6,
  'layers_block_type': ['mamba', 'hybrid', 'hybrid', 'mamba', 'hybrid', 'mamba'],
  'intermediate_size': 48,
  'num_attention_heads': 4,
  'max_position_embeddings': 256,
  'mamba_d_state': 8,
  'n_mamba_heads': 4,
  'time_step_min': 1e-6,
  'num_mem_blocks': 2,
  'adapter_rank': 3,
}
MODELS = {
  'two-blocks': ('Zamba2', ZAMBA2),
  'one-block': (
    'Zamba2',
    ZAMBA2
    | {
      'num_mem_blocks': 1,
      'use_shared_attention_adapter': True,
      'use_mem_rope': True,
      'mamba_ngroups': 2,
      'mamba_d_conv': 3,
      'hidden_act': 'silu',
      'rms_norm_eps': 1e-2,
    },
  ),
}


@pytest.fixture(scope='module', params=first_stands(MODELS))
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


def test_greedy_tokens_are_the_same(imported):
  same_greedy_tokens(*imported)


def test_the_default_of_transformers_has_its_parameters():
  """As many as `Zamba2ForCausalLM` has on the meta device."""
  import torch
  import transformers

  theirs = transformers.Zamba2Config()
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(theirs)
  ours = FAMILIES['zamba2'].read(Settings(theirs.to_dict()))
  assert define(ours).size == sum(p.numel() for p in model.parameters()) == 2_481_848_336
