"""What the names that users give stand for: experiments by name, file or size, studies by name or
file."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar, Unpack, cast

from jaxformer.config import InputError, nearest
from jaxformer.files import user_path
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import FAMILIES, PRESETS
from jaxformer.overrides import override
from jaxformer.study.sizing import Sized
from jaxformer.study.studies import STUDIES
from jaxformer.study.study import Entry, FixedModel, ScaledFamily, Study, TokenMixer
from jaxformer.training.experiment import Experiment
from jaxformer.training.recipes import RECIPES, is_large, model_experiment, preset_experiment
from jaxformer.user_code import errors_of, is_a, load_file, object_in_file
from jaxformer.workflows.overrides import Overrides, Pairs, pairs_of
from jaxformer.workflows.sizes import Size, is_layer, name_of, size_of, sized_model

T = TypeVar('T')


# ---- experiments -------------------------------------------------------------------------------


def experiment(
  target: Experiment | ModelConfig | str, *, overrides: Overrides = (), **size: Unpack[Size]
) -> Experiment:
  """Return an experiment.

  Args:
    target: a preset's name, a Python file that defines `experiment`, a family's name with a size, a
      layer as FILE.py:NAME in a frame like Llama's, a model config, or an experiment.
    overrides: values by dotted path, `{'training.steps': 100, 'model.width': 256}`: Python values
      or text as on the command line. Types are applied first, then fields. For changes that a type
      checker sees, use `replace`: `e.replace(training=e.training.replace(steps=100))`.
    size: one of `params`, `active_params`, `flops_per_token`, `state_bytes`, as a number or text
      such as '125M': the model of the family is built to it.
  """
  found = resolve(target, pairs_of(overrides), size)
  return override(found.experiment, found.overrides)


class Resolved(NamedTuple):
  """What a target of `experiment` stands for.

  Attributes:
    experiment: without the overrides.
    overrides: those that are left to apply.
    sized: result of building its model to a size; None if it was not.
    ours: whether the settings are the package's: neither those of a file nor of a given experiment.
    open_mesh: whether a mesh is to be chosen for a target (see `on_target`): of recipes, and of
      large models that have none. A small model is trained in data parallel.
  """

  experiment: Experiment
  overrides: Pairs
  sized: Sized | None = None
  ours: bool = False
  open_mesh: bool = False


def resolve(target: Experiment | ModelConfig | str, overrides: Pairs, size: Size) -> Resolved:
  """Return what a target of `experiment` stands for."""
  wanted = size_of(size)
  if not isinstance(target, str):
    if wanted is not None:
      raise InputError(
        wanted[0], wanted[1], problem='needs a family by name or a layer FILE.py:NAME'
      )
    if is_a(target, ModelConfig):
      e = model_experiment(target, target.tag)
      return Resolved(e, overrides, ours=True, open_mesh=is_large(target))
    return Resolved(cast(Experiment, target), overrides)
  if wanted is not None or is_layer(target):
    sized, overrides = sized_model(target, wanted, overrides)
    e = model_experiment(sized.model, name_of(sized))
    return Resolved(e, overrides, sized, ours=True, open_mesh=is_large(sized.model))
  if _is_file(target):
    found = _defined(target, 'experiment', Experiment)
    if found.run.name is None:
      found = found.replace(run=found.run.replace(name=pathlib.Path(target).stem))
    return Resolved(found, overrides)
  if target in PRESETS:
    return Resolved(preset_experiment(target), overrides, ours=True, open_mesh=target in RECIPES)
  family = f'; the family {target} needs a size: --params 1M' if target in FAMILIES else ''
  raise InputError(
    f'no preset named {target!r}{nearest(target, PRESETS)}; `jaxformer list` shows all; the name '
    f'of a file ends in .py{family}'
  )


# ---- studies -----------------------------------------------------------------------------------


def get_study(target: Study | str, *, overrides: Overrides = (), add: Sequence[str] = ()) -> Study:
  """Return a study: a name (see `study.studies`), a Python file that defines `study`, or a `Study`.

  Args:
    overrides: values by dotted path, `{'study.tokens': 1e6}`.
    add: further entries: families by name, and layer or model configs as FILE.py:NAME.
  """
  if not isinstance(target, str):
    study = target
  elif _is_file(target):
    study = _defined(target, 'study', Study)
  elif target in STUDIES:
    study = STUDIES[target]
  else:
    raise InputError(
      f'no study named {target!r}{nearest(target, STUDIES)}; the name of a file ends in .py'
    )
  for name in add:
    entry = _entry(name)
    if entry in [e.replace(name=None) for e in study.entries]:
      raise InputError('--add', name, problem='the study has this entry')
    study = study.replace(entries=(*study.entries, entry))
  return override(study, pairs_of(overrides), 'study')


def _entry(name: str) -> Entry:
  if not _is_file(name.partition(':')[0]):
    if name in FAMILIES:
      return ScaledFamily(family=name)
    if name in PRESETS:
      own = PRESETS[name].family
      raise InputError('--add', name, problem=f'a preset, whose size is fixed; its family is {own}')
    problem = f'neither a family{nearest(name, FAMILIES)} nor a layer as FILE.py:NAME'
    raise InputError('--add', name, problem=problem)
  found = object_in_file(name)
  if is_a(found, LayerConfig):
    return TokenMixer(layer=found)
  if is_a(found, ModelConfig):
    return FixedModel(model_config=found)
  raise InputError('--add', name, problem='neither a layer config nor a model config')


# ---- Python files ------------------------------------------------------------------------------


def _is_file(target: str) -> bool:
  return target.endswith('.py') or os.sep in target


def _defined(target: str, name: str, kind: type[T]) -> T:
  """Return what a Python file defines under `name`: an object of this type, or a function that
  returns one."""
  module = load_file(target)
  with errors_of(user_path(target)):
    found = getattr(module, name, None)
    if callable(found):
      found = found()
  if not is_a(found, kind):
    raise InputError(
      f'{target}: defines no `{name}`; it must be of type {kind.__name__}, or a function that '
      'returns one'
    )
  return found
