"""RWKV's own weight files, both ways: one file of tensors named as in RWKV-LM, `.safetensors` or
`.pth`, without a config.

The version follows from the names of the tensors, the sizes from their shapes. The context length
and the initializers, which no shape determines, are those of the published models."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import safetensors.numpy

from jaxformer.config import InputError, differences
from jaxformer.interop import weights
from jaxformer.interop.family import functional, layer_of
from jaxformer.interop.huggingface import dtype_of, placing
from jaxformer.interop.tensors import Reader, Shape, Tensors, cast, new_file, shortened
from jaxformer.interop.torch_file import TorchReader, write_torch
from jaxformer.interop.weights import NewAxis, Rule, Step, linear, norm, same
from jaxformer.layers.rwkv4 import TimeMix4
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.layers.rwkv7 import TimeMix7
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params, define
from jaxformer.models.zoo.rwkv4 import rwkv4
from jaxformer.models.zoo.rwkv5 import rwkv5
from jaxformer.models.zoo.rwkv6 import rwkv6
from jaxformer.models.zoo.rwkv7 import rwkv7
from jaxformer.sharding import Parallel

SUFFIXES = ('.safetensors', '.pth')
Shapes = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Version:
  """One version of the architecture.

  Attributes:
    name: as published.
    sign: pattern of a tensor's name that no earlier version has.
    read: the shapes of a file's tensors -> our config. The rules check the other shapes.
    rules: our config -> the map of weights.
    ignored: patterns of unused tensors.
  """

  name: str
  sign: str
  read: Callable[[Sizes], LanguageModel.Config]
  rules: Callable[[Any], Sequence[Rule]]
  ignored: tuple[str, ...] = ()


class Sizes:
  """The sizes of a model, from the shapes of a file's tensors."""

  def __init__(self, shapes: Shapes, where: str):
    self.shapes, self.where = shapes, where

  def __call__(self, name: str, rank: int = 2) -> Shape:
    """The shape of a tensor. Raises `InputError` if it is missing or has another number of axes."""
    if name not in self.shapes:
      raise InputError(f'{self.where}: tensor {name} is missing')
    if len(self.shapes[name]) != rank:
      raise InputError(
        f'{self.where}: {name} is {list(self.shapes[name])}, but must have {rank} axes'
      )
    return self.shapes[name]

  @property
  def layers(self) -> int:
    found = [int(m[1]) for m in (re.match(r'blocks\.(\d+)\.', n) for n in self.shapes) if m]
    return max(found) + 1


@dataclasses.dataclass(frozen=True)
class ByHead(Step):
  """Theirs is our vector as a matrix [heads, channels per head]."""

  head_dim: int

  def shapes(self, ours):
    return [(s[0] // self.head_dim, self.head_dim) for s in ours]

  def save(self, ours):
    return [a.reshape(-1, self.head_dim) for a in ours]

  def load(self, theirs, ours):
    return [a.reshape(-1) for a in theirs]


ROW = (NewAxis(0), NewAxis(0))  # vectors over the channels are stored as [1, 1, D]


def _frame() -> list[Rule]:
  """Rules for everything except the two layers of a block."""
  norms = {
    'embedder.norm': 'blocks.0.ln0',
    'final_norm': 'ln_out',
    'stack.{layer}.branches.0.norm': 'blocks.{layer}.ln1',
    'stack.{layer}.branches.1.norm': 'blocks.{layer}.ln2',
    'stack.{layer}.branches.0.layer.norm': 'blocks.{layer}.att.ln_x',
  }
  return [
    same('embedder.input.table', 'emb.weight'),
    linear('head.kernel', 'head.weight'),
    *(rule for ours, theirs in norms.items() for rule in norm(ours, theirs)),
  ]


def _mixing(
  matrices: Mapping[str, str], rows: Mapping[str, str], layer: int, theirs: str
) -> list[Rule]:
  """Rules for matrices and vectors of layer `layer` of every block, by our name -> theirs."""
  ours = f'stack.{{layer}}.branches.{layer}.layer'
  return [
    *(linear(f'{ours}.{o}', f'blocks.{{layer}}.{theirs}.{t}.weight') for o, t in matrices.items()),
    *(Rule((f'{ours}.{o}',), f'blocks.{{layer}}.{theirs}.{t}', ROW) for o, t in rows.items()),
  ]


# ---- RWKV-4 ------------------------------------------------------------------------------------


def _read_4(sizes: Sizes) -> LanguageModel.Config:
  vocab, width = sizes('emb.weight')
  return rwkv4(width, sizes.layers, vocab_size=vocab, hidden=sizes('blocks.0.ffn.key.weight')[0])


def _mixes(layer: int, theirs: str, letters: str, name: str = 'time_mix') -> list[Rule]:
  """Rules for the matrices and token-shift vectors with the same names in RWKV-4, 5 and 6."""
  words = {'r': 'receptance', 'k': 'key', 'v': 'value', 'g': 'gate', 'o': 'output'}
  matrices = {f'{z}.kernel': words[z] for z in {'att': 'rkvgo', 'ffn': 'rkv'}[theirs]}
  return _mixing(matrices, {f'mix_{z}': f'{name}_{z}' for z in letters}, layer, theirs)


TIME, ATT = 'stack.{layer}.branches.0.layer', 'blocks.{layer}.att'
CHANNELS_4 = _mixes(1, 'ffn', 'kr')


def _rules_4(config: LanguageModel.Config) -> list[Rule]:
  layer_of(config, 0, TimeMix4.Config)
  vectors = same(f'{TIME}.decay', f'{ATT}.time_decay'), same(f'{TIME}.bonus', f'{ATT}.time_first')
  return [*_frame(), *_mixes(0, 'att', 'kvr'), *vectors, *CHANNELS_4]


# ---- RWKV-5.2 and RWKV-6 -----------------------------------------------------------------------


def _read_5(sizes: Sizes) -> LanguageModel.Config:
  vocab, width = sizes('emb.weight')
  # A matrix; RWKV-5.0 and 5.1, with one decay per head, are not supported.
  head_dim = sizes('blocks.0.att.time_decay')[1]
  return rwkv5(
    width,
    sizes.layers,
    vocab_size=vocab,
    hidden=sizes('blocks.0.ffn.key.weight')[0],
    head_dim=head_dim,
  )


def _rules_5(config: LanguageModel.Config) -> list[Rule]:
  by_head = (ByHead(layer_of(config, 0, TimeMix5.Config).head_dim),)
  vectors = (
    Rule((f'{TIME}.decay',), f'{ATT}.time_decay', by_head),
    Rule((f'{TIME}.bonus',), f'{ATT}.time_faaaa', by_head),
  )
  return [*_frame(), *_mixes(0, 'att', 'kvrg'), *vectors, *CHANNELS_4]


def _read_6(sizes: Sizes) -> LanguageModel.Config:
  (vocab, width), att = sizes('emb.weight'), 'blocks.0.att'
  return rwkv6(
    width,
    sizes.layers,
    (sizes(f'{att}.time_maa_w2', 3)[1], sizes(f'{att}.time_decay_w1')[1]),
    vocab_size=vocab,
    hidden=sizes('blocks.0.ffn.key.weight')[0],
    head_dim=sizes(f'{att}.time_faaaa')[1],
  )


def _rules_6(config: LanguageModel.Config) -> list[Rule]:
  by_head = (ByHead(layer_of(config, 0, TimeMix6.Config).head_dim),)
  return [
    *_frame(),
    *_mixes(0, 'att', 'xwkvrg', 'time_maa'),
    *(
      same(f'{TIME}.{o}', f'{ATT}.time_{t}')
      for o, t in (
        ('mix_a', 'maa_w1'),
        ('mix_b', 'maa_w2'),
        ('decay.a', 'decay_w1'),
        ('decay.b', 'decay_w2'),
      )
    ),
    Rule((f'{TIME}.decay.bias',), f'{ATT}.time_decay', ROW),
    Rule((f'{TIME}.bonus',), f'{ATT}.time_faaaa', by_head),
    *_mixes(1, 'ffn', 'kr', 'time_maa'),
  ]


# ---- RWKV-7 ------------------------------------------------------------------------------------


def _read_7(sizes: Sizes) -> LanguageModel.Config:
  (vocab, width), layers, att = sizes('emb.weight'), sizes.layers, 'blocks.0.att'
  value = sizes('blocks.1.att.v1')[1] if layers > 1 else 1
  ranks = sizes(f'{att}.w1')[1], sizes(f'{att}.a1')[1], value, sizes(f'{att}.g1')[1]
  return rwkv7(
    width,
    layers,
    ranks,
    vocab_size=vocab,
    hidden=sizes('blocks.0.ffn.key.weight')[0],
    head_dim=sizes(f'{att}.r_k')[1],
  )


def _rules_7(config: LanguageModel.Config) -> list[Rule]:
  time = layer_of(config, 0, TimeMix7.Config)
  low_rank = {'decay': 'w', 'rate': 'a', 'value': 'v', 'gate': 'g'}
  rows = {f'mix_{z}': f'x_{z}' for z in 'rwkvag'} | {'xi': 'k_k', 'alpha': 'k_a'}
  rows |= {f'{o}.bias': f'{t}0' for o, t in low_rank.items() if o != 'gate'}
  return [
    *_frame(),
    *_mixing(
      {'r.kernel': 'receptance', 'k.kernel': 'key', 'v.kernel': 'value', 'o.kernel': 'output'},
      rows,
      0,
      'att',
    ),
    *(
      same(f'{TIME}.{o}.{a}', f'{ATT}.{t}{b}')
      for o, t in low_rank.items()
      for a, b in (('a', 1), ('b', 2))
    ),
    Rule((f'{TIME}.rho',), f'{ATT}.r_k', (ByHead(time.head_dim),)),
    *_mixing({'k.kernel': 'key', 'v.kernel': 'value'}, {'mix_k': 'x_k'}, 1, 'ffn'),
  ]


VERSIONS: tuple[Version, ...] = (  # latest first: the first whose sign is found
  # The first block has no earlier values to mix in; the official code creates these parameters
  # there too, but never uses them.
  Version(
    'RWKV-7', r'blocks\.0\.att\.r_k', _read_7, _rules_7, ignored=(r'blocks\.0\.att\.v[012]',)
  ),
  Version('RWKV-6', r'blocks\.0\.att\.time_maa_x', _read_6, _rules_6),
  Version('RWKV-5.2', r'blocks\.0\.att\.gate\.weight', _read_5, _rules_5),
  Version('RWKV-4', r'blocks\.0\.att\.time_first', _read_4, _rules_4),
)
_READ = ', '.join(v.name for v in VERSIONS)


def version_of(shapes: Shapes, where: str) -> Version:
  """The version of a file. Raises `InputError` if it is none of `VERSIONS`."""
  for version in VERSIONS:
    if any(re.fullmatch(version.sign, n) for n in shapes):
      return version
  raise InputError(f'{where}: not the weights of {_READ}; it holds {shortened(shapes, 4)}')


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
    raise InputError(f'{path}: no such file')
  with _open(path) as reader:
    shapes = {n: i.shape for n, i in reader.info.items()}
    version = version_of(shapes, str(path))
    config = version.read(Sizes(shapes, str(path)))
    info, names = define(config).info, weights.Names(ignored=version.ignored)
    links = weights.connect(info, version.rules(config), version.name)
    return config, weights.load(
      links, info, reader, names, dtype_of(dtype), placing(config, parallel)
    )


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Generator[Tensors]:
  if Path(path).suffix == '.pth':
    yield TorchReader(path)
  else:
    with Reader(path) as reader:
      yield reader


def save_rwkv(
  path: str | os.PathLike, model_config: ModelConfig, params: Params, dtype: Any = jnp.float32
) -> None:
  """Write a weight file, `.safetensors` or `.pth`. It appears only when it is complete; an existing
  file is not overwritten.

  Raises `InputError` for a model that no version represents, with the reasons, and for `.pth`
  without PyTorch."""
  if not is_rwkv(path):
    raise InputError(f'{path}: must end in {" or ".join(SUFFIXES)}')
  dtype, info = dtype_of(dtype), define(model_config).info
  links = _links(model_config)
  weights.check_params(info, params)
  export = weights.Export(links, params)
  if Path(path).suffix == '.pth':
    write_torch(path, list(export.shapes), export, dtype)
    return
  with new_file(path) as partial:
    safetensors.numpy.save_file(
      {n: cast(n, export(n), dtype) for n in export.shapes}, partial, metadata={'format': 'pt'}
    )


def _links(config: ModelConfig) -> list[weights.Link]:
  """The links of a model: those of the version whose `read` returns, from the shapes that would be
  written, a functionally equal config."""
  reasons = []
  for version in VERSIONS:
    try:
      links = weights.connect(define(config).info, version.rules(config), version.name)
      read = version.read(
        Sizes({n: s for link in links for n, s in link.theirs.items()}, version.name)
      )
      differ = differences(
        functional(config), functional(read.replace(context_length=config.context_length))
      )
    except InputError as e:
      differ = [str(e)]
    if not differ:
      return links
    reasons.append(f'As {version.name}: {shortened(differ, 3)}')
  raise InputError(f'no version of RWKV ({_READ}) computes this model. ' + '. '.join(reasons))
