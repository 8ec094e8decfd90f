"""Mamba. Two of its tensors are several of ours: `in_proj` is W_x and W_z, side by side."""

from typing import Any

from jaxformer.interop.family import branches_of, depth, family, part
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import (
  MIXER,
  CheckpointFormat,
  Rule,
  arrays,
  depthwise,
  fused,
  modules,
)
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import Mamba, StepBias
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

MODEL: Table = {
  'vocab_size': ('vocab_size', 50280),
  'width': ('hidden_size', 768),
  # The authors' value. Their format has no field for it; we write the one of other families.
  'context_length': ('max_position_embeddings', 2048),
  'tied': ('tie_word_embeddings', True),
}
LAYER: Table = {
  'd_state': ('state_size', 16),
  'expand': ('expand', 2),
  'd_conv': ('conv_kernel', 4),
  'bias': ('use_bias', False),
  'conv_bias': ('use_conv_bias', True),
}
STEPS: Table = {
  'low': ('time_step_min', 1e-3),
  'high': ('time_step_max', 1e-1),
  'floor': ('time_step_floor', 1e-4),
}


def build(
  hf: Settings, model: dict[str, Any], layer: LayerConfig, layers: int
) -> LanguageModel.Config:
  """The architecture around a layer, from the fields that Mamba and Mamba-2 share; `layers` is the
  default number.

  Initialization is the authors': transformers' own scheme (`initializer_range`,
  `rescale_prenorm_residual`, `time_step_scale`, `time_step_init_scheme`) is ignored."""
  hf.only('hidden_act', 'silu', 'swish')
  hf.only('rms_norm', True)
  norm = RMSNorm(eps=hf.get('layer_norm_epsilon', float, 1e-5))
  block = Block.Config(branches=(PreNorm(layer=layer, norm=norm),))
  return LanguageModel.Config(
    **model,
    stack=(Group(pattern=(block,), repeats=hf.count('num_hidden_layers', layers)),),
    final_norm=norm,
    residual_dtype='float32' if hf.get('residual_in_fp32', bool, True) else 'compute',
  )


def dt_rank(hf: Settings, name: str, width: int) -> int | None:
  """The size of dt'; None where it is the one that our config derives from the width."""
  if hf.value(name, 'auto') in ('auto', None):
    return None
  rank = hf.count(name)
  return None if rank == Mamba.Config().rank(width) else rank


def read(hf: Settings) -> LanguageModel.Config:
  model = hf.read(MODEL)
  layer = Mamba.Config(
    **hf.read(LAYER),
    dt_rank=dt_rank(hf, 'time_step_rank', model['width']),
    dt_init=StepBias(**hf.read(STEPS)),
  )
  hf.only('intermediate_size', layer.expand * model['width'])
  return build(hf, model, layer, 32)


def write_shared(config: LanguageModel.Config, layer: Any, table: Table) -> dict[str, Any]:
  """The fields of a Mamba or a Mamba-2; `table` holds those of the layer."""
  return {
    **written(config, MODEL),
    **written(layer, table),
    **(written(layer.dt_init, STEPS) if type(layer.dt_init) is StepBias else {}),
    'num_hidden_layers': depth(config.stack),
    'hidden_act': 'silu',
    'layer_norm_epsilon': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'residual_in_fp32': config.residual_dtype == 'float32',
    'initializer_range': 0.02,
  }


def write(config: LanguageModel.Config) -> dict[str, Any]:
  (branch,) = branches_of(config.stack, Mamba.Config)
  layer = branch.layer
  return write_shared(config, layer, LAYER) | {
    'architectures': ['MambaForCausalLM'],
    'intermediate_size': layer.expand * config.width,
    'time_step_rank': layer.rank(config.width),
  }


OURS, THEIRS = f'{MIXER}.layer.', 'backbone.layers.{layer}.mixer.'


def shared_rules() -> list[Rule]:
  """Rules for the parameters outside the layers."""
  return modules(
    {
      'embedder.input': 'backbone.embeddings',
      f'{MIXER}.norm': 'backbone.layers.{layer}.norm',
      'final_norm': 'backbone.norm_f',
      'head': 'lm_head',
    }
  )


def projections(
  theirs: str, inputs: tuple[str, ...], convolutions: tuple[str, ...], steps: str, ours: str = OURS
) -> list[Rule]:
  """Rules for a Mamba or a Mamba-2 layer, whose names begin with `theirs` and `ours`; `steps` is
  their name of the bias of the step sizes."""
  return [
    *arrays({'A_log': 'A_log', 'D': 'D', 'dt_bias': steps}, ours, theirs),
    *fused([ours + p for p in inputs], f'{theirs}in_proj'),
    *fused([ours + c for c in convolutions], f'{theirs}conv1d', reshape=depthwise),
    *modules({'out': 'out_proj'}, ours, theirs),
  ]


def mixer_rules(theirs: str) -> list[Rule]:
  """Rules for a Mamba layer, whose names begin with `theirs`."""
  return [
    *projections(theirs, ('x', 'z'), ('conv',), 'dt_proj.bias'),
    *modules({'selection': 'x_proj', 'dt': 'dt_proj'}, OURS, theirs),
  ]


def rules(config: LanguageModel.Config) -> list[Rule]:
  return [*shared_rules(), *mixer_rules(THEIRS)]


MAMBA = CheckpointFormat(
  'mamba',
  read,
  write,
  rules,
  prefix='backbone.',
  copies={'lm_head.weight': 'backbone.embeddings.weight'},
)
family(MAMBA)
