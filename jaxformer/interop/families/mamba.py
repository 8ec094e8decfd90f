"""Mamba. Two of its tensors are several of ours: `in_proj` is W_x and W_z, side by side."""

from __future__ import annotations

from typing import Any

from jaxformer.interop.family import CheckpointFormat, blocks, branches, family, layer_of
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import TRANSPOSE, Concat, Names, NewAxis, Rule, linear, same
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import Mamba, StepBias
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.user_code import is_a

# The authors' value. Their format has no field for it; we write the one that other families have.
CONTEXT = 2048


def build(
  hf: Settings, layer: LayerConfig, *, layers: int, width: int, vocab_size: int, tied: bool
) -> LanguageModel.Config:
  """The architecture around a layer, from the fields that Mamba and Mamba-2 share; the keywords are
  defaults that differ.

  Initialization is the authors': transformers' own scheme (`initializer_range`,
  `rescale_prenorm_residual`, `time_step_scale`, `time_step_init_scheme`) is ignored."""
  for name, needed in (('hidden_act', ('silu', 'swish')), ('rms_norm', (True,))):
    hf.only(name, *needed)
  norm = RMSNorm(eps=hf.get('layer_norm_epsilon', float, 1e-5))
  block = Block.Config(branches=(PreNorm(layer=layer, norm=norm),))
  return LanguageModel.Config(
    vocab_size=hf.count('vocab_size', vocab_size),
    width=width,
    context_length=hf.count('max_position_embeddings', CONTEXT),
    stack=(Group(pattern=(block,), repeats=hf.count('num_hidden_layers', layers)),),
    final_norm=norm,
    tied=hf.get('tie_word_embeddings', bool, tied),
  )


def steps(hf: Settings) -> StepBias:
  low, high, floor = (
    hf.get(f'time_step_{n}', float, v) for n, v in (('min', 1e-3), ('max', 1e-1), ('floor', 1e-4))
  )
  return StepBias(low=low, high=high, floor=floor)


def read(hf: Settings) -> LanguageModel.Config:
  width, expand = hf.count('hidden_size', 768), hf.count('expand', 2)
  hf.only('intermediate_size', expand * width)
  automatic = -(-width // 16)
  rank = (
    automatic if hf.fields.get('time_step_rank', 'auto') == 'auto' else hf.count('time_step_rank')
  )
  layer = Mamba.Config(
    d_state=hf.count('state_size', 16),
    expand=expand,
    d_conv=hf.count('conv_kernel', 4),
    dt_rank=None if rank == automatic else rank,
    bias=hf.get('use_bias', bool, False),
    conv_bias=hf.get('use_conv_bias', bool, True),
    dt_init=steps(hf),
  )
  return build(hf, layer, layers=32, width=width, vocab_size=50280, tied=True)


def write_model(config: LanguageModel.Config) -> dict[str, Any]:
  """The fields that Mamba and Mamba-2 share."""
  stack = blocks(config)
  (first,) = branches(stack[0], 1)
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'num_hidden_layers': len(stack),
    'hidden_act': 'silu',
    'layer_norm_epsilon': first.norm.eps,
    'max_position_embeddings': config.context_length,
    'tie_word_embeddings': config.tied,
    'residual_in_fp32': True,
    'initializer_range': 0.02,
  }


def write_layer(layer: Any) -> dict[str, Any]:
  """The fields that a `Mamba` and a `Mamba2` share."""
  fields = {
    'state_size': layer.d_state,
    'expand': layer.expand,
    'conv_kernel': layer.d_conv,
    'use_bias': layer.bias,
    'use_conv_bias': layer.conv_bias,
  }
  if is_a(layer.dt_init, StepBias):
    fields |= {
      'time_step_min': layer.dt_init.low,
      'time_step_max': layer.dt_init.high,
      'time_step_floor': layer.dt_init.floor,
    }
  return fields


def write(config: LanguageModel.Config) -> dict[str, Any]:
  layer = layer_of(config, 0, Mamba.Config)
  return (
    write_model(config)
    | write_layer(layer)
    | {'intermediate_size': layer.expand * config.width, 'time_step_rank': layer.rank(config.width)}
  )


CONV = (TRANSPOSE, NewAxis(1))  # ours [d_conv, channels], theirs [channels, 1, d_conv]
OURS, THEIRS = 'stack.{layer}.branches.0.layer', 'backbone.layers.{layer}.mixer'


def outer_rules() -> list[Rule]:
  """Rules for the parameters outside the layers, and those that Mamba and Mamba-2 layers share."""
  return [
    same('embedder.input.table', 'backbone.embeddings.weight'),
    same('stack.{layer}.branches.0.norm.scale', 'backbone.layers.{layer}.norm.weight'),
    same(f'{OURS}.A_log', f'{THEIRS}.A_log'),
    same(f'{OURS}.D', f'{THEIRS}.D'),
    linear(f'{OURS}.out.kernel', f'{THEIRS}.out_proj.weight'),
    same(f'{OURS}.out.bias', f'{THEIRS}.out_proj.bias'),
    same('final_norm.scale', 'backbone.norm_f.weight'),
    linear('head.kernel', 'lm_head.weight'),
  ]


def rules(config: LanguageModel.Config) -> list[Rule]:
  return [
    *outer_rules(),
    Rule(
      (f'{OURS}.x.kernel', f'{OURS}.z.kernel'), f'{THEIRS}.in_proj.weight', (Concat(1), TRANSPOSE)
    ),
    Rule((f'{OURS}.x.bias', f'{OURS}.z.bias'), f'{THEIRS}.in_proj.bias', (Concat(0),)),
    Rule((f'{OURS}.conv.kernel',), f'{THEIRS}.conv1d.weight', CONV),
    same(f'{OURS}.conv.bias', f'{THEIRS}.conv1d.bias'),
    linear(f'{OURS}.selection.kernel', f'{THEIRS}.x_proj.weight'),
    linear(f'{OURS}.dt.kernel', f'{THEIRS}.dt_proj.weight'),
    same(f'{OURS}.dt_bias', f'{THEIRS}.dt_proj.bias'),
  ]


def names(config: LanguageModel.Config) -> Names:
  return Names(
    prefix='backbone.',
    copies={'lm_head.weight': 'backbone.embeddings.weight'} if config.tied else {},
  )


family(CheckpointFormat('mamba', 'MambaForCausalLM', read, write, rules, names))
