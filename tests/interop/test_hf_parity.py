"""Against transformers, the oracle: the same logits and the same greedy tokens, in both directions,
fp32 on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.interop import load_hf
from jaxformer.interop.families import FAMILIES
from jaxformer.interop.generation import OF_GENERATION
from jaxformer.interop.huggingface import ABOUT_THE_FILE
from jaxformer.interop.settings import Settings
from jaxformer.models.params import define
from tests.interop.parity import (
  MARKS,
  TOLERANCE,
  agree,
  our_logits,
  random_model,
  same_after_export,
  same_after_import,
  same_greedy_tokens,
  their_logits,
  tokens,
)

pytestmark = MARKS

SIZE = {
  'vocab_size': 97,
  'hidden_size': 64,
  'num_hidden_layers': 2,
  'intermediate_size': 96,
  'max_position_embeddings': 256,
}
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  # short, so that the sequences here are far beyond it
  'original_max_position_embeddings': 32,
}
GPT2 = {'vocab_size': 97, 'n_embd': 64, 'n_layer': 2, 'n_head': 4, 'n_positions': 256}

MAMBA = {'vocab_size': 97, 'hidden_size': 64, 'num_hidden_layers': 2}
RWKV = {'vocab_size': 97, 'hidden_size': 64, 'num_hidden_layers': 2, 'context_length': 256}

MODELS = {
  'gpt2': ('GPT2', GPT2),
  'gpt2-unusual': (
    'GPT2',
    GPT2
    | {
      'n_inner': 80,
      'activation_function': 'gelu',
      'layer_norm_epsilon': 1e-2,
      'scale_attn_weights': False,
      'tie_word_embeddings': False,
    },
  ),
  'llama2': ('Llama', SIZE | {'num_attention_heads': 4, 'rms_norm_eps': 1e-5}),
  'llama3.1': (
    'Llama',
    SIZE | {'num_attention_heads': 4, 'num_key_value_heads': 2, 'rope_parameters': LLAMA3},
  ),
  'llama3.2': (
    'Llama',
    SIZE
    | {
      'num_attention_heads': 4,
      'num_key_value_heads': 1,
      'tie_word_embeddings': True,
      'head_dim': 24,
      'rope_parameters': LLAMA3 | {'factor': 32.0, 'rope_theta': 5e5},
    },
  ),
  'llama-biases': (
    'Llama',
    SIZE
    | {'num_attention_heads': 4, 'attention_bias': True, 'mlp_bias': True, 'rms_norm_eps': 1e-2},
  ),
  'mistral': (
    'Mistral',
    SIZE | {'num_attention_heads': 4, 'num_key_value_heads': 2, 'sliding_window': 7},
  ),
}
MODELS |= {
  'mamba': ('Mamba', MAMBA),
  'mamba-unusual': (
    'Mamba',
    MAMBA
    | {
      'state_size': 5,
      'expand': 3,
      'conv_kernel': 3,
      'time_step_rank': 7,
      'use_bias': True,
      'use_conv_bias': False,
      'layer_norm_epsilon': 1e-2,
      'tie_word_embeddings': False,
    },
  ),
  'mamba2': (
    'Mamba2',
    MAMBA
    | {
      'num_heads': 8,
      'head_dim': 16,
      'state_size': 16,
      'n_groups': 1,
      'tie_word_embeddings': True,
    },
  ),
  'mamba2-unusual': (
    'Mamba2',
    MAMBA
    | {
      'num_heads': 12,
      'head_dim': 16,
      'expand': 3,
      'n_groups': 4,
      'conv_kernel': 3,
      'state_size': 8,
      'use_bias': True,
      'use_conv_bias': False,
      'layer_norm_epsilon': 1e-2,
      'chunk_size': 32,
    },
  ),
  'rwkv4': ('Rwkv', RWKV),
  'rwkv4-unusual': (
    'Rwkv',
    RWKV
    | {
      'num_hidden_layers': 3,
      'attention_hidden_size': 64,
      'intermediate_size': 80,
      'layer_norm_epsilon': 1e-2,
      'rescale_every': 0,
    },
  ),
  # Theirs halves weights when it runs, never what is stored. More halvings show in their logits
  # too, by the norms' eps.
  'rwkv4-rescaled': (
    'Rwkv',
    RWKV | {'num_hidden_layers': 3, 'rescale_every': 2, 'layer_norm_epsilon': 1e-6},
  ),
}

MOE = SIZE | {'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_experts_per_tok': 2}
MODELS |= {
  'mixtral': ('Mixtral', MOE | {'num_local_experts': 4}),
  'mixtral-unusual': (
    'Mixtral',
    MOE
    | {
      'num_local_experts': 6,
      'num_experts_per_tok': 3,
      'sliding_window': 7,
      'head_dim': 24,
      'tie_word_embeddings': True,
      'router_aux_loss_coef': 0.0,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
    },
  ),
  'jamba': ('Jamba', MOE | {'num_experts': 4, 'num_hidden_layers': 8, 'mamba_dt_rank': 5}),
  'jamba-unusual': (
    'Jamba',
    MOE
    | {
      'num_experts': 3,
      'num_hidden_layers': 6,
      'attn_layer_period': 3,
      'attn_layer_offset': 1,
      'expert_layer_period': 4,
      'expert_layer_offset': 2,
      'mamba_d_state': 5,
      'mamba_expand': 3,
      'mamba_d_conv': 3,
      'mamba_proj_bias': True,
      'mamba_conv_bias': False,
      'rms_norm_eps': 1e-2,
      'tie_word_embeddings': True,
    },
  ),
}


def theirs(name):
  """A random model of transformers."""
  return random_model(*MODELS[name])


@pytest.fixture(scope='module', params=MODELS)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = theirs(request.param), tmp_path_factory.mktemp('hf') / 'theirs'
  model.save_pretrained(folder)
  ours, params = load_hf(folder)
  assert define(ours).size == sum(p.numel() for p in model.parameters())
  return model, ours, params


def test_import_gives_the_same_logits(imported, request):
  same_after_import(*imported, request.node.callspec.id)


def test_export_gives_the_same_logits(imported, request, tmp_path):
  same_after_export(imported[1], tmp_path / 'ours', request.node.callspec.id)


@pytest.mark.parametrize(
  'imported',
  [
    'gpt2',
    'llama2',
    'llama3.1',
    'llama3.2',
    'mistral',
    'mamba',
    'mamba2',
    'mixtral',
    'jamba',
    'rwkv4',
  ],
  indirect=True,
)
def test_greedy_tokens_are_the_same(imported):
  model, config, params = imported
  # Their cache of RWKV-4 is right for one row: of several, each token meets the states of all.
  same_greedy_tokens(model, config, params, rows=1 if model.config.model_type == 'rwkv' else 2)


def test_scaling_matters_here():
  """The Llama 3.1 case would notice a wrong scaling: without it the logits are far off."""
  import torch

  model = theirs('llama3.1')
  scaled = their_logits(model, tokens())
  model.model.rotary_emb.inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
  assert np.abs(scaled - their_logits(model, tokens())).max() > 100 * TOLERANCE


def test_bf16_files_and_divided_files_of_theirs(tmp_path):
  import torch

  model = theirs('llama3.1').to(torch.bfloat16)
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB')
  assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
  config, params = load_hf(tmp_path / 'theirs')
  assert {p.dtype for p in params.values()} == {jnp.dtype('float32')}
  # Read anew: the conversion above has also rounded the frequencies that the module keeps.
  model = type(model).from_pretrained(tmp_path / 'theirs', dtype=torch.float32).eval()
  agree(our_logits(config, params, tokens()), their_logits(model, tokens()), 'bf16 files')


# Fields of transformers' configs that say nothing of the outputs of a trained model.
NOT_USED = {
  'attention_dropout', 'activation_dropout', 'attn_pdrop', 'classifier_dropout',
  'encoder_layerdrop', 'decoder_layerdrop', 'rescale_prenorm_residual', 'initializer_range',
  'time_step_init_scheme', 'time_step_scale', 'time_step_rank', 'init_std',
  'output_attentions', 'output_hidden_states', 'output_router_logits', 'return_dict', 'use_cache',
  'id2label', 'label2id', 'problem_type', 'finetuning_task', 'task_specific_params',
  '_name_or_path',
  'summary_type', 'summary_use_proj', 'summary_activation', 'summary_proj_to_labels',
  'summary_first_dropout',
  'is_decoder', 'is_encoder_decoder', 'cross_attention_hidden_size', 'pruned_heads', 'prefix',
  'chunk_size_feed_forward', 'tf_legacy_loss', 'torchscript', 'use_bfloat16', 'sep_token_id',
  'tokenizer_class', 'remove_invalid_values', 'typical_p', 'num_beam_groups', 'diversity_penalty',
  'num_return_sequences', 'output_scores', 'return_dict_in_generate',
  # how the same numbers are computed
  'pretraining_tp', 'reorder_and_upcast_attn', 'residual_in_fp32', 'rescale_every', 'chunk_size',
  'use_mambapy', 'use_associative_scan', 'use_mamba_kernels', 'num_logits_to_keep',
}  # fmt: skip


# The same, of one family.
NOT_USED_BY: dict[str, set[str]] = {
  'gemma3_text': {'_sliding_window_pattern'},
  'xlstm': {
    'norm_reduction_force_float32', 'chunkwise_kernel', 'sequence_kernel', 'step_kernel', 'mode',
    'return_last_states', 'autocast_kernel_dtype', 'inference_state_dtype',
    'max_inference_chunksize',
  },
  'recurrent_gemma': {'w_init_variance_scale', 'final_w_init_variance_scale'},
  'nemotron_h': {
    'expand', 'mamba_ssm_cache_dtype', 'moe_shared_expert_overlap', 'mtp_layers_block_type',
    'n_shared_experts',
  },
  'falcon_h1': {'mamba_chunk_size'},
  'zamba2': {
    'chunk_size', 'use_mem_eff_path', 'kv_channels', 'num_query_groups', 'num_logits_to_keep',
  },
  'granitemoehybrid': {'mamba_chunk_size'},
  'minimax': {'block_size'},
  # `head_dim` and `qk_head_dim` follow from others; groups have no effect with 'greedy'
  'deepseek_v2': {'qk_head_dim', 'n_group', 'topk_group'},
  'deepseek_v3': {'qk_head_dim', 'num_mtp_layers', 'num_nextn_predict_layers'},
  'kimi_linear': {'qk_head_dim'},
}  # fmt: skip
# Fields without a default with which their model works.
NEEDED_BY = {'deepseek_v2': {'num_experts_per_tok': 6}}


@pytest.mark.parametrize('family', FAMILIES)
def test_every_field_of_their_config_is_read_or_known_not_to_matter(family):
  import transformers

  fields = transformers.CONFIG_MAPPING[family](**NEEDED_BY.get(family, {})).to_dict()
  hf = Settings(fields)
  FAMILIES[family].read(hf)
  assert set(fields) - hf.read_names - {*ABOUT_THE_FILE, *OF_GENERATION} <= (
    NOT_USED | NOT_USED_BY.get(family, set())
  )
