"""What a family of checkpoints is, and which one a model belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from jaxformer.config import (
  Config,
  InputError,
  Registry,
  config_type,
  differences,
  from_json,
  hints,
  to_json,
  types_of,
)
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import shortened
from jaxformer.interop.weights import Names, Rule
from jaxformer.layers.init import Init
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class CheckpointFormat:
  """A checkpoint format of one architecture. To add one: a file in `families/` that makes one of
  these and calls `family`.

  Attributes:
    model_type: the field of that name in `config.json`.
    architecture: the class of transformers that runs it.
    read: `config.json` -> our config. Refuses (`InputError`) what our layers do not do.
    write: our config -> `config.json`, without `model_type` and `architectures`. It takes what it
      needs from the place where it would stand, and need not look for the rest: what `read` does
      not give back is found by comparison. `part` helps.
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
  """Registers a family."""
  FAMILIES.add(new.model_type, new)


C = TypeVar('C', bound=Config)


def part(value: Any, kind: type[C], where: str) -> C:
  """`value`, which stands at `where`, if it is a `kind`; else `InputError`."""
  if not isinstance(value, kind):
    raise InputError(
      f'{where} is {value.tag if isinstance(value, Config) else value!r}, not {kind.tag}'
    )
  return value


def blocks(config: Any) -> list[Block.Config]:
  """The blocks of a language model in order; `InputError` for another kind of model."""
  return [
    b
    for g in part(config, LanguageModel.Config, 'model').stack
    for _ in range(g.repeats)
    for b in g.pattern
  ]


def branches(block: Block.Config, count: int) -> tuple[PreNorm.Config, ...]:
  """The branches of the block that `write` takes for all, if they are `count` pre-norm ones; else
  `InputError`."""
  if len(block.branches) != count:
    raise InputError(f'block 0 has {len(block.branches)} branches, not {count}')
  return tuple(
    part(b, PreNorm.Config, f'branch {i} of block 0') for i, b in enumerate(block.branches)
  )


def match(config: ModelConfig) -> tuple[CheckpointFormat, dict[str, Any]]:
  """The family that a model belongs to, and its `config.json`. Raises `InputError` saying what
  stands in the way in each.

  A model belongs to a family when reading what was written gives it back, up to `functional`.
  """
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


_TRAINING = ('dropout', 'balance', 'z_loss')  # fields that bear on training alone


def functional(config: ModelConfig) -> Any:
  """The config as JSON without what leaves the function of the weights alone: initial values,
  dropout and the losses of routers are left out, a stack is the list of its blocks, and derived
  sizes are spelt out. Models with equal forms compute the same from the same weights."""
  return _functional(to_json(config), getattr(config, 'width', 0))


def _functional(value: Any, width: int) -> Any:
  if isinstance(value, list):
    if value and all(isinstance(v, dict) and v.get('type') == 'Group' for v in value):
      return [
        _functional(b, width) for g in value for _ in range(g['repeats']) for b in g['pattern']
      ]
    return [_functional(v, width) for v in value]
  if not isinstance(value, dict) or 'code' in value:  # a type of the user's own is like no other
    return value
  kind = config_type(value['type'])
  if kind in types_of(LayerConfig):
    value = to_json(cast(LayerConfig, from_json(value)).resolved(width))
  return {
    k: _functional(v, width)
    for k, v in value.items()
    if k not in _TRAINING and not (k in hints(kind) and _is_init(hints(kind)[k]))
  }


def _is_init(hint: Any) -> bool:
  options = getattr(hint, '__args__', (hint,))
  return any(isinstance(o, type) and issubclass(o, Init) for o in options)
