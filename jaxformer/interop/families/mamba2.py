"""Mamba-2. `in_proj` is W_z, W_x, W_bc and W_dt side by side, `conv1d` the convolutions of x and of
[B, C]."""

import dataclasses
import math
from typing import Any

from jaxformer.interop.families import mamba
from jaxformer.interop.families.mamba import OURS, STEPS, THEIRS
from jaxformer.interop.family import branches_of, family
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import Rule, arrays
from jaxformer.layers.mamba import StepBias
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.models.language_model import LanguageModel

MODEL: Table = {
  **mamba.MODEL,
  'vocab_size': ('vocab_size', 32768),
  'width': ('hidden_size', 4096),
  'tied': ('tie_word_embeddings', False),
}
LAYER: Table = {
  **mamba.LAYER,
  'd_state': ('state_size', 128),
  'head_dim': ('head_dim', 64),
  'groups': ('n_groups', 8),
}


def read(hf: Settings) -> LanguageModel.Config:
  """`chunk_size` and `time_step_rank` do not affect the function."""
  model = hf.read(MODEL)
  layer = Mamba2.Config(
    **hf.read(LAYER),
    norm_eps=hf.get('layer_norm_epsilon', float, 1e-5),
    dt_init=StepBias(**hf.read(STEPS)),
    **step_limits(hf),
  )
  expand, head_dim, inner = layer.expand, layer.head_dim, layer.expand * model['width']
  if hf.count('num_heads', 128) * head_dim != inner:
    raise hf.fail('num_heads', f'{expand} x hidden_size / head_dim = {inner / head_dim:g}')
  hf.only('norm_before_gate', False)
  return mamba.build(hf, model, layer, 64)


NAMED: Table = {
  'd_state': ('mamba_d_state', 256),
  'groups': ('mamba_n_groups', 1),
  'd_conv': ('mamba_d_conv', 4),
  'bias': ('mamba_proj_bias', False),
  'conv_bias': ('mamba_conv_bias', True),
}
"""The fields of a Mamba-2 layer in a hybrid, as Bamba and its descendants call them."""


def read_named(hf: Settings, width: int, channels: int | None, eps: float) -> Mamba2.Config:
  """The Mamba-2 layer of a hybrid; `channels` of it, None for `mamba_expand` times the width."""
  heads, expand = hf.count('mamba_n_heads', 128), hf.count('mamba_expand', 2)
  inner = expand * width if channels is None else channels
  automatic = hf.value('mamba_d_head', 'auto') in ('auto', None)
  head_dim = inner // heads if automatic else hf.count('mamba_d_head')
  if heads * head_dim != inner:
    raise hf.fail('mamba_n_heads', f'{inner} channels / mamba_d_head = {inner / head_dim:g}')
  size: dict[str, Any] = {'expand': expand} if channels is None else {'heads': heads}
  return Mamba2.Config(**hf.read(NAMED), **size, head_dim=head_dim, norm_eps=eps, **step_limits(hf))


def written_named(layer: Mamba2.Config, width: int) -> dict[str, Any]:
  """The same fields, from the layer."""
  return {
    **written(layer, NAMED),
    **written_limits(layer),
    'mamba_expand': layer.expand,
    'mamba_n_heads': layer.head_count(width),
    'mamba_d_head': layer.head_dim,
  }


def step_limits(hf: Settings) -> dict[str, Any]:
  """The limits of step sizes, `time_step_limit`, whose infinity files write in several ways."""
  limit = hf.value('time_step_limit')
  if limit is None:
    return {}
  try:
    low, high = (float(v['__float__'] if isinstance(v, dict) else v) for v in limit)
  except (KeyError, TypeError, ValueError):
    low, high = -1.0, -1.0
  if not 0 <= low < high:
    raise hf.fail('time_step_limit', 'two numbers, not negative and rising, as [0, Infinity]')
  return {'dt_min': low, 'dt_max': None if high == math.inf else high}


def written_limits(layer: Mamba2.Config) -> dict[str, Any]:
  """The same, of a layer; none where there are none."""
  if layer.dt_min == 0.0 and layer.dt_max is None:
    return {}
  return {'time_step_limit': [layer.dt_min, math.inf if layer.dt_max is None else layer.dt_max]}


def write(config: LanguageModel.Config) -> dict[str, Any]:
  (branch,) = branches_of(config.stack, Mamba2.Config)
  return mamba.write_shared(config, branch.layer, LAYER) | {
    'architectures': ['Mamba2ForCausalLM'],
    'num_heads': branch.layer.head_count(config.width),
    'chunk_size': 256,
    **written_limits(branch.layer),
  }


def layer_rules(theirs: str, ours: str = OURS) -> list[Rule]:
  """Rules for a Mamba-2 layer, whose names begin with `theirs` and `ours`."""
  inputs, convolutions = ('z', 'x', 'bc', 'dt'), ('conv_x', 'conv_bc')
  return [
    *mamba.projections(theirs, inputs, convolutions, 'dt_bias', ours),
    *arrays({'scale': 'norm.weight'}, ours, theirs),
  ]


def rules(config: LanguageModel.Config) -> list[Rule]:
  return [*mamba.shared_rules(), *layer_rules(THEIRS)]


family(dataclasses.replace(mamba.MAMBA, name='mamba2', read=read, write=write, rules=rules))
