"""`config.json` of DeepSeek-V2 and V3 <-> our config, and their weights to files and back."""

import json

import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.interop import load_hf, save_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.family import functional
from jaxformer.interop.settings import Settings
from jaxformer.layers.router import BiasBalanced, SoftmaxTopK
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.deepseek import deepseek, latent
from tests.interop.small import noisy

pytestmark = pytest.mark.quick

YARN = {
  'type': 'yarn',
  'factor': 40,
  'original_max_position_embeddings': 4096,
  'beta_fast': 32,
  'beta_slow': 1,
}
BOTH = {
  'max_position_embeddings': 163840,
  'rope_theta': 10000,
  'moe_layer_freq': 1,
  'ep_size': 1,
  'seq_aux': True,
  'aux_loss_alpha': 0.001,
}
V2 = BOTH | {
  'hidden_size': 5120,
  'intermediate_size': 12288,
  'moe_intermediate_size': 1536,
  'num_hidden_layers': 60,
  'num_attention_heads': 128,
  'num_key_value_heads': 128,
  'n_routed_experts': 160,
  'num_experts_per_tok': 6,
  'n_group': 8,
  'topk_group': 3,
  'topk_method': 'group_limited_greedy',
  'scoring_func': 'softmax',
  'norm_topk_prob': False,
  'routed_scaling_factor': 16.0,
  'first_k_dense_replace': 1,
  'rope_scaling': YARN | {'mscale': 0.707, 'mscale_all_dim': 0.707},
}
LITE = V2 | {
  'hidden_size': 2048,
  'intermediate_size': 10944,
  'moe_intermediate_size': 1408,
  'num_hidden_layers': 27,
  'num_attention_heads': 16,
  'num_key_value_heads': 16,
  'q_lora_rank': None,
  'n_routed_experts': 64,
  'n_group': 1,
  'topk_group': 1,
  'topk_method': 'greedy',
  'routed_scaling_factor': 1.0,
}
V3 = BOTH | {
  'num_nextn_predict_layers': 1,
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
  'rope_scaling': YARN | {'mscale': 1.0, 'mscale_all_dim': 1.0},
}


@pytest.mark.parametrize(
  ('preset', 'family', 'fields'),
  [
    ('deepseek-v2', 'deepseek_v2', V2),
    ('deepseek-v2-lite', 'deepseek_v2', LITE),
    ('deepseek-v3', 'deepseek_v3', V3),
  ],
)
def test_presets_are_what_their_files_say(preset, family, fields):
  """All other fields have the defaults of transformers; written and read, the same again."""
  kind, ours = FAMILIES[family], functional(PRESETS[preset].model)
  assert functional(kind.read(Settings(fields))) == ours
  again = json.loads(json.dumps(kind.write(PRESETS[preset].model)))
  assert functional(kind.read(Settings(again))) == ours


@pytest.mark.parametrize(
  ('family', 'fields', 'message'),
  [
    ('deepseek_v2', {'norm_topk_prob': True}, 'norm_topk_prob = True'),
    ('deepseek_v2', {'topk_method': 'noaux_tc'}, "topk_method = 'noaux_tc'"),
    ('deepseek_v2', {'scoring_func': 'sigmoid'}, "scoring_func = 'sigmoid'"),
    ('deepseek_v2', {'topk_method': 'group_limited_greedy', 'n_group': None}, 'n_group'),
    ('deepseek_v2', {'rope_interleave': False}, 'rope_interleave = False'),
    ('deepseek_v2', {'num_experts_per_tok': None}, 'num_experts_per_tok'),
    ('deepseek_v3', {'topk_method': 'greedy'}, "topk_method = 'greedy'"),
    ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func = 'softmax'"),
    ('deepseek_v3', {'n_shared_experts': None}, 'n_shared_experts'),
    ('deepseek_v3', {'n_group': 3, 'topk_group': 3}, 'groups'),
    ('deepseek_v3', {'moe_layer_freq': 2}, 'moe_layer_freq = 2'),
    ('deepseek_v3', {'num_key_value_heads': 8}, 'num_key_value_heads = 8'),
    ('deepseek_v3', {'first_k_dense_replace': -1}, 'first_k_dense_replace = -1'),
    ('deepseek_v3', {'mlp_bias': True}, 'mlp_bias = True'),
    ('deepseek_v3', {'rope_scaling': {'type': 'longrope'}}, "type = 'longrope'"),
    ('deepseek_v3', {'rope_scaling': YARN | {'mscale_all_dim': 1.0}}, 'mscale'),
    ('deepseek_v3', {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'mscale_all_dim': 1.0}},
     'mscale_all_dim'),
  ],
)  # fmt: skip
def test_what_is_refused(family, fields, message):
  published = {'deepseek_v2': V2, 'deepseek_v3': V3}[family]
  with pytest.raises(InputError, match=message):
    FAMILIES[family].read(Settings(published | fields))


def _small(router, q_rank):
  return deepseek(
    16,
    3,
    24,
    latent(2, 8, q_rank=q_rank),
    dense=1,
    experts=4,
    expert_hidden=12,
    shared=1,
    router=router,
    context_length=12,
    vocab_size=30,
  )


@pytest.mark.parametrize(
  ('model', 'queries'),
  [
    (_small(SoftmaxTopK(k=2), None), ('q_proj', 16)),
    (_small(BiasBalanced(k=2, groups=2), 6), ('q_b_proj', 6)),
  ],
  ids=['v2', 'v3'],
)
def test_weights_survive_files(model, queries, tmp_path):
  from safetensors.numpy import load_file

  params = noisy(model)
  save_hf(tmp_path / 'hf', model, params)
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  stored = load_file(file)
  assert stored[f'model.layers.2.self_attn.{queries[0]}.weight'].shape == (2 * 12, queries[1])
  assert stored['model.layers.0.mlp.gate_proj.weight'].shape == (24, 16)
  assert stored['model.layers.2.mlp.experts.3.up_proj.weight'].shape == (12, 16)
  again, loaded = load_hf(tmp_path / 'hf')
  assert functional(again) == functional(model)
  for name, p in params.items():
    np.testing.assert_array_equal(loaded[name], p)


def test_layers_of_multi_token_prediction_are_not_read(tmp_path):
  """They follow the last layer of the published files, with index 61; any others are refused."""
  from safetensors.numpy import load_file, save_file

  model = _small(BiasBalanced(k=2, groups=2), 6)
  save_hf(tmp_path / 'hf', model, noisy(model))
  (file,) = (tmp_path / 'hf').glob('*.safetensors')
  stored, extra = load_file(file), {'model.layers.61.eh_proj.weight': np.ones((16, 32), 'float32')}
  save_file(stored | extra, file)
  _, params = load_hf(tmp_path / 'hf')
  assert set(params) == set(define(model).info)
  save_file(stored | {n.replace('61', '62'): a for n, a in extra.items()}, file)
  with pytest.raises(InputError, match=r'unexpected: model\.layers\.62\.eh_proj'):
    load_hf(tmp_path / 'hf')
