"""RWKV's own weight files, both ways: one file of tensors named as in RWKV-LM, `.safetensors` or
`.pth`, without a config.

The version follows from the names of the tensors, the sizes from their shapes. The context length
and the initializers, which no shape determines, are those of the published models."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import safetensors.numpy

from jaxformer.config import InputError
from jaxformer.interop import weights
from jaxformer.interop.family import branches_of, match
from jaxformer.interop.tensors import Shape, new_path, open_safetensors, shortened
from jaxformer.interop.torch_file import open_torch, write_torch
from jaxformer.interop.weights import (
  FEED_FORWARD,
  MIXER,
  CheckpointFormat,
  Rule,
  arrays,
  as_row,
  modules,
)
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.layers.rwkv7 import TimeMix7
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params
from jaxformer.models.zoo.rwkv4 import rwkv4
from jaxformer.models.zoo.rwkv5 import rwkv5
from jaxformer.models.zoo.rwkv6 import rwkv6
from jaxformer.models.zoo.rwkv7 import rwkv7
from jaxformer.sharding import Parallel

SUFFIXES = ('.safetensors', '.pth')


class Sizes:
  """The sizes of a model, from the shapes of a file's tensors."""

  def __init__(self, shapes: Mapping[str, Shape], where: str):
    self.shapes, self.where = shapes, where

  def __call__(self, name: str, rank: int = 2) -> Shape:
    """The shape of a tensor. Raises `InputError` if it is missing or has another number of axes."""
    if name not in self.shapes:
      raise InputError(self.where, problem=f'tensor {name} is missing')
    shape = self.shapes[name]
    if len(shape) != rank:
      raise InputError(f'{self.where}: {name}', list(shape), f'a shape of {rank} axes')
    return shape

  def time(self, name: str, rank: int = 2) -> int:
    """The size of axis 1 of a tensor in the first block's time mixing."""
    return self(f'blocks.0.att.{name}', rank)[1]

  def outer(self) -> dict[str, Any]:
    """The sizes that all versions have, as arguments of their functions in the zoo."""
    vocab_size, width = self('emb.weight')
    blocks = {m[1] for m in (re.match(r'blocks\.(\d+)\.', n) for n in self.shapes) if m}
    hidden, _ = self('blocks.0.ffn.key.weight')
    return {'vocab_size': vocab_size, 'width': width, 'layers': len(blocks), 'hidden': hidden}


# ---- rules -------------------------------------------------------------------------------------

TIME, ATT = f'{MIXER}.layer.', 'blocks.{layer}.att.'
CHANNELS, FFN = f'{FEED_FORWARD}.layer.', 'blocks.{layer}.ffn.'
MATRICES = {'r': 'receptance', 'k': 'key', 'v': 'value', 'g': 'gate', 'o': 'output'}
SHARED = [
  *modules(
    {
      'embedder.input': 'emb',
      'embedder.norm': 'blocks.0.ln0',
      f'{MIXER}.norm': 'blocks.{layer}.ln1',
      f'{FEED_FORWARD}.norm': 'blocks.{layer}.ln2',
      'final_norm': 'ln_out',
      'head': 'head',
    }
  ),
  *modules({**MATRICES, 'norm': 'ln_x'}, TIME, ATT),
  *modules(MATRICES, CHANNELS, FFN),
]
"""What all versions have, as far as their layers have these parameters."""


def shifts(prefix: str, letters: str) -> list[Rule]:
  """Rules for the token-shift vectors of both layers."""
  names = {f'mix_{z}': f'{prefix}_{z}' for z in letters}
  return [*arrays(names, TIME, ATT, as_row), *arrays(names, CHANNELS, FFN, as_row)]


def by_head(
  config: LanguageModel.Config, names: Mapping[str, str], time: type[LayerConfig]
) -> list[Rule]:
  """Rules for vectors over the channels that are stored as [heads, channels per head]."""
  branch, _ = branches_of(config.stack, time, ChannelMix.Config)
  head_dim = branch.layer.head_dim
  return arrays(names, TIME, ATT, lambda shape: (shape[0] // head_dim, head_dim))


def rules_4(config: LanguageModel.Config) -> list[Rule]:
  vectors = arrays({'decay': 'time_decay', 'bonus': 'time_first'}, TIME, ATT)
  return [*SHARED, *shifts('time_mix', 'rkv'), *vectors]


def rules_5(config: LanguageModel.Config) -> list[Rule]:
  vectors = by_head(config, {'decay': 'time_decay', 'bonus': 'time_faaaa'}, TimeMix5.Config)
  return [*SHARED, *shifts('time_mix', 'rkvg'), *vectors]


def rules_6(config: LanguageModel.Config) -> list[Rule]:
  low_rank = {
    'mix_a': 'time_maa_w1',
    'mix_b': 'time_maa_w2',
    'decay.a': 'time_decay_w1',
    'decay.b': 'time_decay_w2',
  }
  return [
    *SHARED,
    *shifts('time_maa', 'xrwkvg'),
    *arrays(low_rank, TIME, ATT),
    *arrays({'decay.bias': 'time_decay'}, TIME, ATT, as_row),
    *by_head(config, {'bonus': 'time_faaaa'}, TimeMix6.Config),
  ]


def rules_7(config: LanguageModel.Config) -> list[Rule]:
  parts = {'decay': 'w', 'rate': 'a', 'value': 'v', 'gate': 'g'}
  low_rank = {
    f'{o}.{ours}': f'{t}{n}' for o, t in parts.items() for ours, n in (('a', 1), ('b', 2))
  }
  rows = {f'{o}.bias': f'{t}0' for o, t in parts.items()} | {'xi': 'k_k', 'alpha': 'k_a'}
  return [
    *SHARED,
    *shifts('x', 'rwkvag'),
    *arrays(low_rank, TIME, ATT),
    *arrays(rows, TIME, ATT, as_row),
    *by_head(config, {'rho': 'r_k'}, TimeMix7.Config),
  ]


# ---- versions ----------------------------------------------------------------------------------


def read_4(sizes: Sizes) -> LanguageModel.Config:
  return rwkv4(**sizes.outer())


def read_5(sizes: Sizes) -> LanguageModel.Config:
  # A matrix; RWKV-5.0 and 5.1, with one decay per head, are not supported.
  return rwkv5(**sizes.outer(), head_dim=sizes.time('time_decay'))


def read_6(sizes: Sizes) -> LanguageModel.Config:
  ranks = sizes.time('time_maa_w2', 3), sizes.time('time_decay_w1')
  return rwkv6(**sizes.outer(), ranks=ranks, head_dim=sizes.time('time_faaaa'))


def read_7(sizes: Sizes) -> LanguageModel.Config:
  outer = sizes.outer()
  value = sizes('blocks.1.att.v1')[1] if outer['layers'] > 1 else 1
  ranks = sizes.time('w1'), sizes.time('a1'), value, sizes.time('g1')
  return rwkv7(**outer, ranks=ranks, head_dim=sizes.time('r_k'))


def version(
  name: str,
  read: Callable[[Sizes], LanguageModel.Config],
  rules: Callable[[Any], Sequence[Rule]],
  ignored: tuple[str, ...] = (),
) -> CheckpointFormat:
  """A version as a format whose headers are the shapes of the tensors."""
  kind = CheckpointFormat(
    name, read, lambda config: weights.shapes(weights.connect(kind, config)), rules, ignored=ignored
  )
  return kind


VERSIONS: dict[str, CheckpointFormat] = {
  # The first block has no earlier values to mix in; the official code creates these parameters
  # there too, but never uses them.
  'blocks.0.att.r_k': version('RWKV-7', read_7, rules_7, (r'blocks\.0\.att\.v[012]',)),
  'blocks.0.att.time_maa_x': version('RWKV-6', read_6, rules_6),
  'blocks.0.att.gate.weight': version('RWKV-5.2', read_5, rules_5),
  'blocks.0.att.time_first': version('RWKV-4', read_4, rules_4),
}
"""A tensor that no earlier version has -> the version, latest first."""


def version_of(shapes: Mapping[str, Shape], where: str) -> CheckpointFormat:
  """The version of a file. Raises `InputError` if it is none of `VERSIONS`."""
  for sign, found in VERSIONS.items():
    if sign in shapes:
      return found
  known = ', '.join(v.name for v in VERSIONS.values())
  raise InputError(where, problem=f'not the weights of {known}; it holds {shortened(shapes, 4)}')


# ---- load and save -----------------------------------------------------------------------------


def is_rwkv(path: str | os.PathLike) -> bool:
  """Whether a path names a single weight file."""
  return Path(path).suffix in SUFFIXES


def load_rwkv(
  path: str | os.PathLike, dtype: Any = jnp.float32, parallel: Parallel | None = None
) -> tuple[ModelConfig, Params]:
  """The model config and parameters of a weight file. Arguments as for `load_hf`.

  Raises `InputError` for a file that is not an RWKV model of these versions, and for `.pth` without
  PyTorch."""
  if not Path(path).is_file():
    raise InputError('path', str(path), problem='no such file')
  with (open_torch if Path(path).suffix == '.pth' else open_safetensors)(path) as file:
    shapes = {n: i.shape for n, i in file.info.items()}
    kind = version_of(shapes, str(path))
    config = kind.read(Sizes(shapes, str(path)))
    return config, weights.load(kind, config, file, dtype, parallel)


def save_rwkv(
  path: str | os.PathLike, model_config: ModelConfig, params: Params, dtype: Any = jnp.float32
) -> None:
  """Write a weight file, `.safetensors` or `.pth`. It appears only when it is complete; an existing
  file is not overwritten.

  Raises `InputError` for a model that no version represents, with the reasons, and for `.pth`
  without PyTorch."""
  if not is_rwkv(path):
    raise InputError('path', str(path), f'a file that ends in {" or ".join(SUFFIXES)}')
  kind = match(model_config, VERSIONS.values(), Sizes)
  _, tensors = weights.export(kind, model_config, params, dtype)
  with new_path(path) as partial:
    if Path(path).suffix == '.pth':
      write_torch(dict(tensors), partial)
    else:
      safetensors.numpy.save_file(dict(tensors), partial, metadata={'format': 'pt'})
