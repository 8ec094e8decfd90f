"""What the checkpoint formats of hybrids of the delta rule share: the fields and the weights of a
gated DeltaNet layer, and the kinds of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxformer.config import InputError
from jaxformer.interop.decoder import read_layer_types
from jaxformer.interop.family import blocks_of, first_of
from jaxformer.interop.rotary import FULL
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.tensors import Shape
from jaxformer.interop.weights import MIXER, Rule, arrays, depthwise, fused, in_block, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.language_model import LanguageModel

D = TypeVar('D', bound=DeltaNet.Config)
L = TypeVar('L', bound=LayerConfig)
DELTA_RULE = GatedDeltaNet.Config, KimiDeltaAttention.Config
LINEAR = 'linear_attention'
LAYER: Table = {
  'heads': ('linear_num_key_heads', 16),
  'value_heads': ('linear_num_value_heads', 32),
  'head_dim': ('linear_key_head_dim', 128),
  'value_head_dim': ('linear_value_head_dim', 128),
  'd_conv': ('linear_conv_kernel_dim', 4),
}


def every(period: int) -> Callable[[int], str]:
  """The kind of a layer, where every layer whose number from 1 on is a multiple of `period` has
  attention."""
  return lambda i: LINEAR if (i + 1) % period else FULL


def read_kinds(hf: Settings, default: Callable[[int], str]) -> list[str]:
  """`layer_types`: whether each layer has the delta rule or attention; `default` of an index, where
  it is missing."""
  kinds = read_layer_types(hf, default, (LINEAR, FULL))
  if set(kinds) != {LINEAR, FULL}:
    raise hf.fail('layer_types', f'at least one of {LINEAR} and of {FULL}')
  return kinds


def both_of(config: LanguageModel.Config, linear: type[D], full: type[L]) -> tuple[D, L]:
  """The first layer of each kind, which stands for all, that of the delta rule with derived sizes;
  raises `InputError` where there is none."""
  blocks = blocks_of(config.stack)
  layer, attention = first_of(blocks, linear), first_of(blocks, full)
  if layer is None or attention is None:
    raise InputError('stack', problem=f'no block has {linear.tag}, or none has {full.tag}')
  return layer.resolved(config.width), attention


def gated_and_attention(
  config: LanguageModel.Config,
) -> tuple[GatedDeltaNet.Config, Attention.Config]:
  """`both_of` gated DeltaNet and attention."""
  return both_of(config, GatedDeltaNet.Config, Attention.Config)


def write_kinds(config: LanguageModel.Config) -> dict[str, Any]:
  """`layer_types`."""
  layers = (block.branches[0].layer for block in blocks_of(config.stack))
  return {'layer_types': [LINEAR if type(x) in DELTA_RULE else FULL for x in layers]}


def write_layer(layer: GatedDeltaNet.Config) -> dict[str, Any]:
  """The fields of a layer with derived sizes."""
  return written(layer, LAYER)


def layer_rules(
  theirs: str, names: Mapping[str, str], rate: Callable[[Shape], Shape] | None = None
) -> list[Rule]:
  """Rules for a layer, whose tensors' names begin with `theirs`; `names` are those of its
  projections and its norm, ours -> theirs, `rate` makes the shape of their `A_log` from ours."""
  ours = f'{MIXER}.layer.'
  return [
    *arrays({'A_log': 'A_log'}, ours, theirs, rate),
    *arrays({'dt_bias': 'dt_bias'}, ours, theirs),
    *modules(names, ours, theirs),
  ]


CONVOLUTIONS = {f'conv_{p}': f'{p}_conv1d' for p in 'qkv'}


def convolution_rules(theirs: str, names: Mapping[str, str] | None = None) -> list[Rule]:
  """Rules for the convolutions of queries, keys and values: ours -> theirs, or if `names` is None
  one tensor `conv1d`."""
  ours = f'{MIXER}.layer.'
  if names is None:
    return fused([ours + name for name in CONVOLUTIONS], f'{theirs}conv1d', reshape=depthwise)
  return [
    rule for o, t in names.items() for rule in fused([ours + o], theirs + t, reshape=depthwise)
  ]


def rules_by_kind(
  config: LanguageModel.Config, linear: Sequence[Rule], full: Sequence[Rule]
) -> list[Rule]:
  """Rules for each block of a kind, whose parameters partly have the same names."""
  kinds = write_kinds(config)['layer_types']
  return [
    in_block(rule, i)
    for i, kind in enumerate(kinds)
    for rule in (linear if kind == LINEAR else full)
  ]
