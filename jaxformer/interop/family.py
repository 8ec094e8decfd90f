"""Checkpoint formats, one per architecture, and the match of a model to one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxformer.config import Config, InputError, Registry, code_of, differences
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import shortened
from jaxformer.interop.weights import Names, Rule
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group
from jaxformer.user_code import is_a


@dataclasses.dataclass(frozen=True)
class CheckpointFormat:
  """The checkpoint format of one architecture. To add one, write a file in `families/` that
  constructs it and passes it to `family`.

  Attributes:
    model_type: the field of that name in `config.json`.
    architecture: the class of transformers that runs it.
    read: `config.json` -> our config. Raises `InputError` for features that our layers lack.
    write: our config -> `config.json`, without `model_type` and `architectures`. It reads only the
      fields that it needs: `match` compares the config with what `read` makes of the result.
      `part` helps.
    rules: our config -> the map of weights.
    names: our config -> prefix, ignored tensors and copies.
  """

  model_type: str
  architecture: str
  read: Callable[[Settings], ModelConfig]
  write: Callable[[Any], dict[str, Any]]
  rules: Callable[[Any], Sequence[Rule]]
  names: Callable[[Any], Names]


FAMILIES: Registry[CheckpointFormat] = Registry('model_type')


def family(new: CheckpointFormat) -> None:
  """Register a format."""
  FAMILIES.add(new.model_type, new)


C = TypeVar('C', bound=Config)


def part(value: Any, kind: type[C], where: str) -> C:
  """`value`, which is at `where` in the config, if it is a `kind`; else raise `InputError`."""
  if not is_a(value, kind):
    raise InputError(
      f'{where} is {value.tag if isinstance(value, Config) else value!r}, not {kind.tag}'
    )
  return value


def blocks(config: Any) -> list[Block.Config]:
  """The blocks of a language model in order. Raises `InputError` for another kind of model."""
  return [
    b
    for g in part(config, LanguageModel.Config, 'model').stack
    for _ in range(g.repeats)
    for b in g.pattern
  ]


def branches(block: Block.Config, count: int) -> tuple[PreNorm, ...]:
  """The branches of the block that stands for all, if they are `count` pre-norm ones; else raise
  `InputError`."""
  if len(block.branches) != count:
    raise InputError(f'block 0 has {len(block.branches)} branches, not {count}')
  return tuple(part(b, PreNorm, f'branch {i} of block 0') for i, b in enumerate(block.branches))


def layer_of(config: Any, branch: int, kind: type[C]) -> C:
  """The layer of a branch of block 0, if it is a `kind`; else raise `InputError`."""
  layer = blocks(config)[0].branches[branch].layer
  return part(layer, kind, f'layer {branch} of block 0')


def std_of(init: Init) -> float:
  """The standard deviation of an initializer, for `initializer_range`; 0.02 if not normal."""
  return init.std if is_a(init, Normal) else 0.02


def match(config: ModelConfig) -> tuple[CheckpointFormat, dict[str, Any]]:
  """The format of a model, and its `config.json`: the format whose `read` returns, from what its
  `write` wrote, a config that is `functional`ly equal. Raises `InputError` with the obstacles in
  each format."""
  mine, reasons = functional(config), {}
  for name in FAMILIES:
    candidate = FAMILIES[name]
    try:
      fields = {
        'model_type': name,
        'architectures': [candidate.architecture],
        **candidate.write(config),
      }
      differ = differences(mine, functional(candidate.read(Settings(fields, name))))
    except InputError as e:
      differ = [str(e)]
    if not differ:
      return candidate, fields
    reasons[name] = shortened(differ, 3)
  raise InputError(
    'no Hugging Face model computes this one. '
    + '. '.join(f'As {n}: {why}' for n, why in reasons.items())
  )


_TRAINING_ONLY = ('dropout', 'balance', 'z_loss')


def functional(config: ModelConfig) -> Any:
  """The part of a config that determines the function of the weights, as JSON data: without
  initializers, dropout and router losses, with each stack as the list of its blocks and with
  derived sizes resolved. Models for which it is equal compute the same from the same weights."""
  return _functional(config, config.width)


def _functional(value: Any, width: int) -> Any:
  if isinstance(value, tuple):
    if value and all(is_a(v, Group) for v in value):
      value = [b for g in value for _ in range(g.repeats) for b in g.pattern]
    return [_functional(v, width) for v in value]
  if is_a(value, LayerConfig):
    value = value.resolved(width)
  if not is_a(value, Config):
    return value
  fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  kept = {k: v for k, v in fields.items() if k not in _TRAINING_ONLY and not is_a(v, Init)}
  code = code_of(type(value))  # a user's layer may have the name of one of ours
  kind = {'type': value.tag} if code is None else {'type': value.tag, 'code': code}
  return kind | {k: _functional(v, width) for k, v in kept.items()}
