"""The text models of Qwen3.5: Qwen3-Next with separate projections of gated DeltaNet, dense or with
experts. Multi-token prediction and the weights of the vision model are not read.

With texts alone all three coordinates of a position are equal, so that the sections of the rotary
frequencies (`mrope_section`) change nothing."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import decoder_rules
from jaxformer.interop.delta_net import convolution_rules, layer_rules, rules_by_kind
from jaxformer.interop.families import qwen3_next
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.families.qwen3_next import (
  expert_rules,
  full_rules,
  read_experts,
  read_hybrid,
  write_experts,
  write_hybrid,
)
from jaxformer.interop.family import blocks_of, family, first_of, part
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import MIXER, Rule, fused
from jaxformer.layers.mlp import GatedMlp
from jaxformer.models.language_model import LanguageModel

DENSE = {
  'vocab_size': 248320,
  'hidden_size': 4096,
  'intermediate_size': 12288,
  'num_hidden_layers': 32,
  'num_attention_heads': 16,
  'num_key_value_heads': 4,
  'max_position_embeddings': 32768,
  'head_dim': 256,
  'partial_rotary_factor': 0.25,
}
SPARSE = DENSE | {
  'hidden_size': 2048,
  'intermediate_size': 512,  # of no layer
  'num_hidden_layers': 40,
  'num_key_value_heads': 2,
  'moe_intermediate_size': 512,
  'shared_expert_intermediate_size': 512,
  'num_experts_per_tok': 8,
  'num_experts': 256,
}
SECTIONS = {'mrope_section', 'mrope_interleaved'}


def _without_sections(hf: Settings) -> Settings:
  """The fields without the sections of rotary frequencies."""
  fields = dict(hf.fields)
  for name in ('rope_parameters', 'rope_scaling'):
    if isinstance(given := fields.get(name), dict):
      fields[name] = {k: v for k, v in given.items() if k not in SECTIONS}
  found = Settings(fields, hf.where)
  found.read_names = hf.read_names
  return found


def read(hf: Settings) -> LanguageModel.Config:
  return read_hybrid(_without_sections(hf).with_defaults(DENSE), lambda _, mlp: mlp)


def read_moe(hf: Settings) -> LanguageModel.Config:
  hf = _without_sections(hf).with_defaults(SPARSE)
  hf.only('norm_topk_prob', True, None)
  return read_hybrid(hf, lambda _, mlp: read_experts(hf, mlp))


def write(config: LanguageModel.Config) -> dict[str, Any]:
  mlp = first_of(blocks_of(config.stack), GatedMlp.Config)
  mlp = part(mlp, GatedMlp.Config, 'the feed-forward layer of block 0')
  return {'architectures': ['Qwen3_5ForCausalLM'], **write_hybrid(config, mlp)}


def write_moe(config: LanguageModel.Config) -> dict[str, Any]:
  experts, expert = write_experts(config)
  return {'architectures': ['Qwen3_5MoeForCausalLM'], **write_hybrid(config, expert), **experts}


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = f'{MIXER}.layer.', 'model.layers.{layer}.linear_attn.'
  names = {'gate': 'in_proj_z', 'beta': 'in_proj_b', 'a': 'in_proj_a'}
  linear = [
    *fused([ours + p for p in 'qkv'], f'{theirs}in_proj_qkv'),
    *convolution_rules(theirs),
    *layer_rules(theirs, names | {'norm': 'norm', 'out': 'out_proj'}),
  ]
  return [
    *decoder_rules(attention={}),
    *expert_rules(),
    *rules_by_kind(config, linear, full_rules(config)),
  ]


TEXT = dataclasses.replace(
  LLAMA,
  name='qwen3_5_text',
  read=read,
  write=write,
  rules=rules,
  ignored=(*qwen3_next.IGNORED, r'model\.visual\..*'),
  renamed={r'^model\.language_model\.': 'model.'},
)
family(TEXT)
family(dataclasses.replace(TEXT, name='qwen3_5_moe_text', read=read_moe, write=write_moe))
