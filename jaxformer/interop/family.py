"""The registry of checkpoint formats, what they share, and the match of a model to one of them."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jaxformer.code_record import code_of
from jaxformer.config import Config, InputError, Registry, differences, to_json
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import shortened
from jaxformer.interop.weights import CheckpointFormat
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.block import Block, BranchConfig, PreNorm
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group

FAMILIES: Registry[CheckpointFormat] = Registry('model_type')
"""The formats of Hugging Face. To add one, write a file in `families/` that adds it."""


def family(new: CheckpointFormat) -> None:
  """Register a format."""
  FAMILIES.add(new.name, new)


C = TypeVar('C', bound=Config)
L = TypeVar('L', bound=LayerConfig)


def part(value: Any, kind: type[C], where: str) -> C:
  """`value`, which is at `where` in the config, if it is a `kind`; else raise `InputError`."""
  if type(value) is not kind:
    raise InputError(where, problem=f'must be {kind.tag}, not {value and value.tag}')
  return value


def depth(groups: Iterable[Group]) -> int:
  """The number of blocks of a stack."""
  return sum(len(g.pattern) * g.repeats for g in groups)


def blocks_of(groups: Iterable[Group]) -> list[Block.Config]:
  """The blocks of a stack from the bottom up."""
  return [block for g in groups for _ in range(g.repeats) for block in g.pattern]


def first_of(blocks: Iterable[Block.Config], layer: type[L]) -> L | None:
  """The first layer of a type, which stands for all; None if there is none."""
  for found in (branch.layer for block in blocks for branch in block.branches):
    if isinstance(found, layer) and type(found) is layer:
      return found
  return None


def branches_of(
  groups: tuple[Group, ...], *layers: type[LayerConfig], branch: type[BranchConfig] = PreNorm
) -> tuple[Any, ...]:
  """The branches of a stack's first block, which stands for all, if each is a `branch` with a layer
  of these types; else raise `InputError`."""

  def named(kind: type[Config]) -> str:
    code = code_of(kind)
    return kind.tag if code is None else f'{kind.tag} of {code.get("file", code["module"])}'

  def listed(types: list[tuple[type[BranchConfig], type[LayerConfig]]]) -> str:
    return ', '.join(f'{outer.tag}({named(inner)})' for outer, inner in types)

  branches = groups[0].pattern[0].branches
  found = [(type(b), type(b.layer)) for b in branches]
  wanted = [(branch, layer) for layer in layers]
  if found != wanted:
    raise InputError('block 0', problem=f'must be {listed(wanted)}, not {listed(found)}')
  return branches


def std_of(init: Init) -> float:
  """The standard deviation of an initializer, for `initializer_range`; 0.02 if not normal."""
  return init.std if type(init) is Normal else 0.02


NEAREST = 3  # formats whose obstacles are named for a model that no format represents


def match(
  config: ModelConfig,
  formats: Iterable[CheckpointFormat],
  header: Callable[[Mapping[str, Any], str], Any] = Settings,
) -> CheckpointFormat:
  """The format of a model: the one whose `read` returns, from the `header` that its `write` wrote,
  a config that is `functional`ly equal. Raises `InputError` with the obstacles in the formats that
  are nearest: first those with the same layers that differ in the fewest fields, then those with
  other layers."""
  function, reasons = functional(config), []
  outside = {field.name for field in dataclasses.fields(config)} - {'stack'}
  for candidate in formats:
    other_layers = False
    try:
      mine = candidate.write(part(config, candidate.model, 'model'))
      back = candidate.read(header(mine, candidate.name))
      # The files of RWKV have no context length.
      differ = differences(function, functional(back.replace(context_length=config.context_length)))
    except InputError as e:
      differ, other_layers = [str(e)], e.field not in outside
    if not differ:
      return candidate
    reasons.append((other_layers, len(differ), f'As {candidate.name}: {shortened(differ, 3)}'))
  nearest = [reason for *_, reason in sorted(reasons, key=lambda r: r[:2])]
  listed = '. '.join(nearest[:NEAREST])
  rest = f'. {len(nearest) - NEAREST} other formats fit less' if len(nearest) > NEAREST else ''
  raise InputError('model', problem=f'no format represents it. {listed}{rest}')


TRAINING_ONLY = re.compile(
  '(.+_)?(dropout|balance|init|lr_scale|learning_rate)|z_loss|jitter|bias_rate|residual_dtype'
)
"""Names of settings of a model that do not change what its weights compute, up to rounding."""


def functional(config: ModelConfig) -> Any:
  """The part of a config that determines the function of the weights, as JSON data: without
  initializers, dropout and router losses, with a group for each block and with derived sizes
  resolved. Models for which it is equal compute the same from the same weights."""

  def resolved(block: Block.Config) -> Block.Config:
    return block.replace(
      branches=tuple(b.replace(layer=b.layer.resolved(config.width)) for b in block.branches)
    )

  stacks = {
    name: tuple(
      Group(pattern=(resolved(block),))
      for group in groups
      for _ in range(group.repeats)
      for block in group.pattern
    )
    for name, groups in vars(config).items()
    if groups in config.stacks
  }
  return _functional(to_json(config.replace(**stacks)))


def _functional(value: Any) -> Any:
  if isinstance(value, dict):
    kept = {k: v for k, v in value.items() if not TRAINING_ONLY.fullmatch(k)}
    return {k: _functional(v) for k, v in kept.items()}
  return [_functional(v) for v in value] if isinstance(value, list) else value
