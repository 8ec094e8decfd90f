"""Llama 2, 3, 3.1, 3.2, and Mistral, which is Llama with a sliding window."""

from __future__ import annotations

from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.family import (
  CheckpointFormat,
  blocks,
  branches,
  family,
  layer_of,
  part,
  std_of,
)
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name
from jaxformer.interop.weights import Names, Rule, dense, linear, same
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Llama3Scaling, Rotary
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

_SCALING = {  # our field -> theirs
  'factor': 'factor',
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'original_context': 'original_max_position_embeddings',
}


def read_rotary(hf: Settings) -> Rotary:
  """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
  (before), which must agree if both are given. Frequencies are unscaled or scaled as in Llama 3.1;
  other `rope_type`s raise `InputError`."""
  forms = [f for f in ('rope_scaling', 'rope_parameters') if hf.fields.get(f) is not None]
  theta = hf.get('rope_theta', float, 10000.0)
  found = [_rotary(Settings(hf.get(f, dict), f'{hf.where}: {f}'), theta) for f in forms] or [
    Rotary(theta=theta)
  ]
  hf.only('partial_rotary_factor', 1.0, None)
  if found[0] != found[-1]:
    both = ' and '.join(f'{f} = {hf.fields[f]!r}' for f in forms)
    raise InputError(f'{hf.where}: {both} disagree')
  return found[0]


def _rotary(rope: Settings, theta: float) -> Rotary:
  kind = rope.get('rope_type', str, None) or rope.get('type', str, 'default')
  rope.only('partial_rotary_factor', 1.0, None)
  theta = rope.get('rope_theta', float, theta)
  if kind == 'default':
    return Rotary(theta=theta)
  if kind != 'llama3':
    raise rope.fail('rope_type' if 'rope_type' in rope.fields else 'type', "'default' or 'llama3'")
  return Rotary(
    theta=theta,
    scaling=Llama3Scaling(
      factor=rope.get('factor', float),
      low=rope.get('low_freq_factor', float),
      high=rope.get('high_freq_factor', float),
      original_context=rope.count('original_max_position_embeddings'),
    ),
  )


def write_rotary(rotary: Rotary) -> dict[str, Any]:
  """The fields of transformers 4 and of transformers 5."""
  kind = (
    {'rope_type': 'default'}
    if rotary.scaling is None
    else {
      'rope_type': 'llama3',
      **{theirs: getattr(rotary.scaling, ours) for ours, theirs in _SCALING.items()},
    }
  )
  return {
    'rope_theta': rotary.theta,
    'rope_scaling': None if rotary.scaling is None else kind,
    'rope_parameters': {'rope_theta': rotary.theta, **kind},
  }


def build(
  hf: Settings, *, bias: bool = False, mlp_bias: bool = False, window: int | None = None
) -> LanguageModel.Config:
  """The architecture, from the fields that Llama and its descendants share; Llama's defaults."""
  width, heads, std = (
    hf.count('hidden_size', 4096),
    hf.count('num_attention_heads', 32),
    hf.get('initializer_range', float, 0.02),
  )
  head_dim = hf.count('head_dim', None)
  init, norm = Normal(std=std), RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6))
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', heads),
    head_dim=None if head_dim and head_dim * heads == width else head_dim,
    position=read_rotary(hf),
    window=window,
    bias=bias,
    init=init,
    out_init=init,
  )
  mlp = GatedMlp.Config(
    hidden=hf.count('intermediate_size', 11008),
    activation=hf.choose('hidden_act', ACTIVATIONS, 'silu'),
    bias=mlp_bias,
    init=init,
    out_init=init,
  )
  block = Block.Config(
    branches=(PreNorm(layer=attention, norm=norm), PreNorm(layer=mlp, norm=norm))
  )
  return LanguageModel.Config(
    vocab_size=hf.count('vocab_size', 32000),
    width=width,
    context_length=hf.count('max_position_embeddings', 2048),
    stack=(Group(pattern=(block,), repeats=hf.count('num_hidden_layers', 32)),),
    final_norm=norm,
    tied=hf.get('tie_word_embeddings', bool, False),
    embedding_init=init,
  )


def read(hf: Settings) -> LanguageModel.Config:
  """`pretraining_tp` is ignored: it splits products and does not affect the function."""
  return build(
    hf, bias=hf.get('attention_bias', bool, False), mlp_bias=hf.get('mlp_bias', bool, False)
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  stack = blocks(config)
  first, _ = branches(stack[0], 2)
  attention = layer_of(config, 0, Attention.Config)
  mlp = layer_of(config, 1, GatedMlp.Config)
  rotary = part(attention.position, Rotary, 'the position of layer 0 of block 0')
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': mlp.hidden,
    'num_hidden_layers': len(stack),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'head_dim': attention.head_size(config.width),
    'hidden_act': activation_name(mlp.activation),
    'max_position_embeddings': config.context_length,
    'rms_norm_eps': first.norm.eps,
    'initializer_range': std_of(config.embedding_init),
    'tie_word_embeddings': config.tied,
    'attention_bias': attention.bias,
    'mlp_bias': mlp.bias,
    'attention_dropout': 0.0,
    **write_rotary(rotary),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, attention, mlp = (
    'model.layers.{layer}',
    'stack.{layer}.branches.0',
    'stack.{layer}.branches.1',
  )
  projections = [
    *((f'{attention}.layer.{p}', f'{layer}.self_attn.{p}_proj') for p in 'qkvo'),
    *((f'{mlp}.layer.{p}', f'{layer}.mlp.{p}_proj') for p in ('gate', 'up', 'down')),
  ]
  return [
    same('embedder.input.table', 'model.embed_tokens.weight'),
    same(f'{attention}.norm.scale', f'{layer}.input_layernorm.weight'),
    *(rule for ours, theirs in projections for rule in dense(ours, theirs)),
    same(f'{mlp}.norm.scale', f'{layer}.post_attention_layernorm.weight'),
    same('final_norm.scale', 'model.norm.weight'),
    linear('head.kernel', 'lm_head.weight'),
  ]


def names(config: LanguageModel.Config) -> Names:
  return Names(
    prefix='model.',
    ignored=(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq',),
    copies={'lm_head.weight': 'model.embed_tokens.weight'} if config.tied else {},
  )


# ---- Mistral -----------------------------------------------------------------------------------

_MISTRAL = {
  'intermediate_size': 14336,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'sliding_window': 4096,
}


def read_mistral(hf: Settings) -> LanguageModel.Config:
  hf = Settings(_MISTRAL | dict(hf.fields), hf.where)
  return build(hf, window=hf.count('sliding_window', None))


def write_mistral(config: LanguageModel.Config) -> dict[str, Any]:
  fields = write(config)
  del fields['attention_bias'], fields['mlp_bias']
  return fields | {'sliding_window': layer_of(config, 0, Attention.Config).window}


family(CheckpointFormat('llama', 'LlamaForCausalLM', read, write, rules, names))
family(CheckpointFormat('mistral', 'MistralForCausalLM', read_mistral, write_mistral, rules, names))
