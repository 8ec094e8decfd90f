"""Mamba-2. `in_proj` is W_z, W_x, W_bc and W_dt side by side, `conv1d` the convolutions of x and of
[B, C]."""

import dataclasses
import math
from typing import Any

from jaxformer.interop.families import mamba
from jaxformer.interop.families.mamba import OURS, STEPS, THEIRS
from jaxformer.interop.family import branches_of, family
from jaxformer.interop.settings import Settings, Table
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


def layer_rules(theirs: str) -> list[Rule]:
  """Rules for a Mamba-2 layer, whose names begin with `theirs`."""
  return [
    *mamba.projections(theirs, ('z', 'x', 'bc', 'dt'), ('conv_x', 'conv_bc'), 'dt_bias'),
    *arrays({'scale': 'norm.weight'}, OURS, theirs),
  ]


def rules(config: LanguageModel.Config) -> list[Rule]:
  return [*mamba.shared_rules(), *layer_rules(THEIRS)]


family(dataclasses.replace(mamba.MAMBA, name='mamba2', read=read, write=write, rules=rules))
