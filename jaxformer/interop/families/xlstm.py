"""xLSTM as of the 7B model, with separate weights (`weight_mode` 'single')."""

import math
from typing import Any

from jaxformer.interop.family import branches_of, depth, family, part
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, modules
from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.mlstm import SMALL, MLstm, WangNormal
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

CONTEXT_LENGTH = 8192  # that of the published model; files do not say it
MODEL: Table = {
  'vocab_size': ('vocab_size', 50304),
  'width': ('hidden_size', 4096),
  'softcap': ('output_logit_soft_cap', 30.0),
}
LAYER: Table = {
  'heads': ('num_heads', 8),
  'key_factor': ('qk_dim_factor', 0.5),
  'value_factor': ('v_dim_factor', 1.0),
  'gate_cap': ('gate_soft_cap', 15.0),
  'eps': ('eps', 1e-6),
  'norm_eps': ('norm_eps', 1e-6),
}


def read(hf: Settings) -> LanguageModel.Config:
  """Fields of kernels, chunks and modes are ignored: they do not affect the function."""
  model, layers = hf.read(MODEL), hf.count('num_hidden_layers', 32)
  hf.only('embedding_dim', None, model['width'])
  hf.only('num_blocks', None, layers)
  hf.only('use_bias', False)
  hf.only('tie_word_embeddings', False)
  hf.only('add_out_norm', True)
  hf.only('weight_mode', 'single')
  mixer = MLstm.Config(**hf.read(LAYER))
  multiple = hf.count('ffn_round_up_to_multiple_of', 64)
  units = math.ceil(int(hf.positive('ffn_proj_factor', 2.667) * model['width']) / multiple)
  mlp = GatedMlp.Config(hidden=units * multiple, init=SMALL, out_init=WangNormal())
  norm = RMSNorm(eps=mixer.norm_eps)
  return LanguageModel.Config(
    **model,
    context_length=CONTEXT_LENGTH,
    stack=(Group(pattern=(pre_norm(norm, mixer, mlp),), repeats=layers),),
    final_norm=norm,
    embedding_init=Normal(std=math.sqrt(2 / 5 / model['width'])),
    head_init=SMALL,
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, MLstm.Config, GatedMlp.Config)
  mixer, hidden = first.layer, second.layer.hidden
  layers = depth(config.stack)
  return {
    'architectures': ['xLSTMForCausalLM'],
    **written(config, MODEL),
    **written(mixer, LAYER),
    'norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'embedding_dim': config.width,
    'num_hidden_layers': layers,
    'num_blocks': layers,
    # rounded up, so that half a unit less is the number itself whatever the rounding of floats
    'ffn_proj_factor': (hidden - 0.5) / config.width,
    'ffn_round_up_to_multiple_of': 64 if hidden % 64 == 0 else hidden,
    'tie_word_embeddings': config.tied,
    'weight_mode': 'single',
    'use_bias': False,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  block = 'backbone.blocks.{layer}.'
  gates = {'gate': 'ogate_preact', 'input_gate': 'igate_preact', 'forget_gate': 'fgate_preact'}
  mixer = {p: p for p in 'qkv'} | gates | {'norm': 'multihead_norm', 'out': 'out_proj'}
  mlp = {'gate': 'proj_up_gate', 'up': 'proj_up', 'down': 'proj_down'}
  return [
    *modules(
      {
        'embedder.input': 'backbone.embeddings',
        f'{MIXER}.norm': f'{block}norm_mlstm',
        f'{FEED_FORWARD}.norm': f'{block}norm_ffn',
        'final_norm': 'backbone.out_norm',
        'head': 'lm_head',
      }
    ),
    *modules(mixer, f'{MIXER}.layer.', f'{block}mlstm_layer.'),
    *modules(mlp, f'{FEED_FORWARD}.layer.', f'{block}ffn.'),
  ]


family(CheckpointFormat('xlstm', read, write, rules, prefix='backbone.'))
