"""Llama 2, 3, 3.1, 3.2, and Mistral, which is Llama with a sliding window."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxformer.interop.family import branches_of, depth, family, part, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Llama3Scaling, Rotary
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

# ---- positions ---------------------------------------------------------------------------------

SCALING: Table = {
  'factor': ('factor', float),
  'low': ('low_freq_factor', float),
  'high': ('high_freq_factor', float),
  'original_context': ('original_max_position_embeddings', int),
}


def read_rotary(hf: Settings) -> Rotary:
  """Rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
  (before), which must agree if both are given. Frequencies are unscaled or scaled as in Llama 3.1;
  other `rope_type`s raise `InputError`."""
  forms = [f for f in ('rope_scaling', 'rope_parameters') if hf.value(f) is not None]
  theta = hf.positive('rope_theta', 10000.0)
  found = [_rotary(Settings(hf.get(f, dict), f'{hf.where}: {f}'), theta) for f in forms] or [
    Rotary(theta=theta)
  ]
  hf.only('partial_rotary_factor', 1.0, None)
  if found[0] != found[-1]:
    first, second = forms
    raise hf.fail(first, f'equivalent to {second} = {hf.fields[second]!r}')
  return found[0]


def _rotary(rope: Settings, theta: float) -> Rotary:
  # Files have `type`, `rope_type` or both; without either, frequencies are unscaled.
  names = [n for n in ('rope_type', 'type') if rope.value(n) is not None]
  for name in names:
    rope.only(name, 'default', 'llama3')
  kinds = {rope.value(n) for n in names} or {'default'}
  if len(kinds) > 1:
    raise rope.fail('type', f'rope_type, {rope.fields["rope_type"]!r}')
  rope.only('partial_rotary_factor', 1.0, None)
  theta = rope.positive('rope_theta', theta)
  scaling = Llama3Scaling(**rope.read(SCALING)) if kinds == {'llama3'} else None
  if unread := rope.unread():
    raise rope.fail(
      unread[0], 'absent' if names else "with a rope_type, 'default' or 'llama3', which is missing"
    )
  return Rotary(theta=theta, scaling=scaling)


def write_rotary(rotary: Rotary) -> dict[str, Any]:
  """The fields of transformers 4 and of transformers 5."""
  kind = (
    {'rope_type': 'default'}
    if rotary.scaling is None
    else {'rope_type': 'llama3', **written(rotary.scaling, SCALING)}
  )
  return {
    'rope_theta': rotary.theta,
    'rope_scaling': None if rotary.scaling is None else kind,
    'rope_parameters': {'rope_theta': rotary.theta, **kind},
  }


# ---- what Llama and its descendants share ------------------------------------------------------

MODEL: Table = {
  'vocab_size': ('vocab_size', 32000),
  'width': ('hidden_size', 4096),
  'context_length': ('max_position_embeddings', 2048),
  'tied': ('tie_word_embeddings', False),
}


def build(
  hf: Settings,
  *,
  bias: bool = False,
  mlp_bias: bool = False,
  window: int | None = None,
  feed_forward: Callable[[GatedMlp.Config], LayerConfig] = lambda mlp: mlp,
) -> LanguageModel.Config:
  """The architecture, from the shared fields, with Llama's defaults.

  Args:
    feed_forward: makes the second layer of a block from Llama's.
  """
  model, std = hf.read(MODEL), hf.get('initializer_range', float, 0.02)
  layers = hf.count('num_hidden_layers', 32)
  hf.only('layer_types', None, [f'{"full" if window is None else "sliding"}_attention'] * layers)
  heads, head_dim = hf.count('num_attention_heads', 32), hf.count('head_dim', None)
  init, norm = Normal(std=std), RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6))
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', heads),
    head_dim=None if head_dim and head_dim * heads == model['width'] else head_dim,
    position=read_rotary(hf),
    window=window,
    bias=bias,
    attention_dropout=hf.get('attention_dropout', float, 0.0),
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
    branches=tuple(PreNorm(layer=layer, norm=norm) for layer in (attention, feed_forward(mlp)))
  )
  return LanguageModel.Config(
    **model, stack=(Group(pattern=(block,), repeats=layers),), final_norm=norm, embedding_init=init
  )


def write_shared(
  config: LanguageModel.Config, attention: Attention.Config, mlp: GatedMlp.Config
) -> dict[str, Any]:
  """The shared fields, from the layers of a block."""
  rotary = part(attention.position, Rotary, 'the position of layer 0 of block 0')
  return {
    **written(config, MODEL),
    'intermediate_size': mlp.hidden,
    'num_hidden_layers': depth(config.stack),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'head_dim': attention.head_size(config.width),
    'hidden_act': activation_name(mlp.activation),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'attention_dropout': attention.attention_dropout,
    **write_rotary(rotary),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer = 'model.layers.{layer}'
  return [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}.input_layernorm',
        f'{FEED_FORWARD}.norm': f'{layer}.post_attention_layernorm',
        'final_norm': 'model.norm',
        'head': 'lm_head',
      }
    ),
    *modules({p: f'{p}_proj' for p in 'qkvo'}, f'{MIXER}.layer.', f'{layer}.self_attn.'),
    *modules(
      {p: f'{p}_proj' for p in ('gate', 'up', 'down')}, f'{FEED_FORWARD}.layer.', f'{layer}.mlp.'
    ),
  ]


# ---- Llama and Mistral -------------------------------------------------------------------------


def read(hf: Settings) -> LanguageModel.Config:
  """`pretraining_tp` is ignored: it splits products and does not affect the function."""
  return build(
    hf, bias=hf.get('attention_bias', bool, False), mlp_bias=hf.get('mlp_bias', bool, False)
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return write_shared(config, first.layer, second.layer) | {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': first.layer.bias,
    'mlp_bias': second.layer.bias,
  }


_MISTRAL = {
  'intermediate_size': 14336,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'sliding_window': 4096,
}


def read_mistral(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_MISTRAL, 'sliding_window')
  return build(hf, window=hf.count('sliding_window', None))


def write_mistral(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return write_shared(config, first.layer, second.layer) | {
    'architectures': ['MistralForCausalLM'],
    'sliding_window': first.layer.window,
  }


LLAMA = CheckpointFormat(
  'llama',
  read,
  write,
  rules,
  prefix='model.',
  ignored=(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq',),
  copies={'lm_head.weight': 'model.embed_tokens.weight'},
)
family(LLAMA)
family(dataclasses.replace(LLAMA, name='mistral', read=read_mistral, write=write_mistral))
