"""Mamba-2. `in_proj` is W_z, W_x, W_bc and W_dt side by side, `conv1d` the convolutions of x and of
[B, C]."""

from __future__ import annotations

import math
from typing import Any

from jaxformer.interop.families.mamba import (
  CONV,
  OURS,
  THEIRS,
  build,
  names,
  outer_rules,
  steps,
  write_layer,
  write_model,
)
from jaxformer.interop.family import CheckpointFormat, family, layer_of
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import TRANSPOSE, Concat, Rule, same
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.models.language_model import LanguageModel


def read(hf: Settings) -> LanguageModel.Config:
  """`chunk_size` and `time_step_rank` do not affect the function."""
  width, expand, head_dim = (
    hf.count('hidden_size', 4096),
    hf.count('expand', 2),
    hf.count('head_dim', 64),
  )
  if hf.count('num_heads', 128) * head_dim != expand * width:
    raise hf.fail('num_heads', f'{expand} x hidden_size / head_dim = {expand * width / head_dim:g}')
  hf.only('norm_before_gate', False)
  _unlimited(hf)
  layer = Mamba2.Config(
    d_state=hf.count('state_size', 128),
    expand=expand,
    head_dim=head_dim,
    groups=hf.count('n_groups', 8),
    d_conv=hf.count('conv_kernel', 4),
    bias=hf.get('use_bias', bool, False),
    conv_bias=hf.get('use_conv_bias', bool, True),
    norm_eps=hf.get('layer_norm_epsilon', float, 1e-5),
    dt_init=steps(hf),
  )
  return build(hf, layer, layers=64, width=width, vocab_size=32768, tied=False)


def _unlimited(hf: Settings) -> None:
  """Require unclipped step sizes: `time_step_limit` = [0, infinity], which files write in several
  ways."""
  limit = hf.fields.get('time_step_limit')
  if limit is None:
    return
  numbers = (
    [v.get('__float__') if isinstance(v, dict) else v for v in limit]
    if isinstance(limit, (list, tuple))
    else []
  )
  try:
    accepted = [float(v) for v in numbers] == [0.0, math.inf]
  except (TypeError, ValueError):
    accepted = False
  if not accepted:
    raise hf.fail('time_step_limit', '[0, Infinity]')


def write(config: LanguageModel.Config) -> dict[str, Any]:
  layer = layer_of(config, 0, Mamba2.Config)
  return (
    write_model(config)
    | write_layer(layer)
    | {
      'num_heads': layer.heads(config.width),
      'head_dim': layer.head_dim,
      'n_groups': layer.groups,
      'chunk_size': 256,
    }
  )


def rules(config: LanguageModel.Config) -> list[Rule]:
  return [
    *outer_rules(),
    Rule(
      tuple(f'{OURS}.{p}.kernel' for p in ('z', 'x', 'bc', 'dt')),
      f'{THEIRS}.in_proj.weight',
      (Concat(1), TRANSPOSE),
    ),
    Rule(
      tuple(f'{OURS}.{p}.bias' for p in ('z', 'x', 'bc', 'dt')),
      f'{THEIRS}.in_proj.bias',
      (Concat(0),),
    ),
    Rule(
      (f'{OURS}.conv_x.kernel', f'{OURS}.conv_bc.kernel'),
      f'{THEIRS}.conv1d.weight',
      (Concat(1), *CONV),
    ),
    Rule((f'{OURS}.conv_x.bias', f'{OURS}.conv_bc.bias'), f'{THEIRS}.conv1d.bias', (Concat(0),)),
    same(f'{OURS}.dt_bias', f'{THEIRS}.dt_bias'),
    same(f'{OURS}.scale', f'{THEIRS}.norm.weight'),
  ]


family(CheckpointFormat('mamba2', 'Mamba2ForCausalLM', read, write, rules, names))
