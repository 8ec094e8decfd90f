"""What the names that users give stand for: experiments and studies by name or file, trained
models by folder."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, Unpack

from jaxformer.config import Config, InputError, differences, first_lines, nearest, to_json
from jaxformer.interop import is_rwkv, load_hf, load_rwkv
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.language_model import ModelConfig
from jaxformer.models.params import Params
from jaxformer.models.zoo import FAMILIES, PRESETS
from jaxformer.overrides import override
from jaxformer.sharding import make_parallel
from jaxformer.study.studies import STUDIES
from jaxformer.study.study import FixedModel, Study, TokenMixer
from jaxformer.training.checkpoint import steps_in
from jaxformer.training.experiment import Experiment, default_experiment
from jaxformer.training.paths import AnyPath, is_url, to_path
from jaxformer.training.run import run_folder
from jaxformer.user_code import errors_of, is_a, load_file, object_in_file
from jaxformer.workflows.sizes import Pairs, Size, is_layer, name_of, size_of, sized_model

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Values by dotted path, `{'training.steps': 100}`: Python values, configs, or text as the command
line has it."""
T = TypeVar('T')

# Settings of a model that do not change what its weights compute.
FREE = {'dropout', 'init', 'key_init', 'out_init', 'embedding_init', 'head_init'}


# ---- overrides ---------------------------------------------------------------------------------


def pairs_of(overrides: Overrides) -> Pairs:
  """Return overrides as (path, text) in their order."""
  items = overrides.items() if isinstance(overrides, Mapping) else overrides
  return [(str(path), _text(value)) for path, value in items]


def _text(value: Any) -> str:
  if isinstance(value, str):
    return value
  if value is None:
    return 'none'
  return json.dumps(to_json(value)) if isinstance(value, Config | list | tuple) else _plain(value)


def _plain(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


# ---- experiments and studies -------------------------------------------------------------------


def experiment_of(target: str, overrides: Pairs, **size: Unpack[Size]) -> Experiment:
  """Return the experiment of a preset's name, a Python file that defines `experiment`, a family at
  a size, or a layer FILE.py:NAME in a frame like Llama's."""
  wanted = size_of(size)
  if wanted is not None or is_layer(target):
    sized, overrides = sized_model(target, wanted, overrides)
    experiment = default_experiment(sized.model, name_of(sized))
  elif _is_file(target):
    experiment = _defined(target, 'experiment', Experiment)
    if experiment.run.name is None:
      experiment = experiment.replace(run=experiment.run.replace(name=pathlib.Path(target).stem))
  elif target in set(PRESETS):
    experiment = default_experiment(PRESETS[target].model, target)
  else:
    family = f'; the family {target} needs a size: --params 1M' if target in set(FAMILIES) else ''
    raise InputError(
      f'no preset named {target!r}{nearest(target, PRESETS)}; `jaxformer list` shows all; the name '
      f'of a file ends in .py{family}'
    )
  return override(experiment, overrides)


def study_of(target: str, overrides: Pairs, add: Sequence[str] = ()) -> Study:
  """Return the study of a name, or of a Python file that defines `study`, with the layers and
  models FILE.py:NAME of `add` as further entries."""
  if _is_file(target):
    study = _defined(target, 'study', Study)
  else:
    if target not in set(STUDIES):
      raise InputError(
        f'no study named {target!r}{nearest(target, STUDIES)}; the name of a file ends in .py'
      )
    study = STUDIES[target]
  return changed_study(study, overrides, add)


def changed_study(study: Study, overrides: Pairs, add: Sequence[str]) -> Study:
  """Return a study with entries added and fields changed (`study.tokens`)."""
  if add:
    study = study.replace(entries=(*study.entries, *map(_entry, add)))
  return override(study, overrides, 'study')


def _entry(name: str) -> TokenMixer | FixedModel:
  found = object_in_file(name)
  if is_a(found, LayerConfig):
    return TokenMixer(layer=found)
  if is_a(found, ModelConfig):
    return FixedModel(model_config=found)
  raise InputError(f'--add {name}: neither a layer config nor a model config')


def _is_file(target: str) -> bool:
  return target.endswith('.py') or os.sep in target


def _defined(target: str, name: str, *kinds: type[T]) -> T:
  """Return what a Python file defines under `name`: an object of one of `kinds`, or a function that
  returns one."""
  found = getattr(load_file(target), name, None)
  if callable(found):
    with errors_of(pathlib.Path(target)):
      found = found()
  if not is_a(found, *kinds):
    classes = ' or '.join(k.__name__ for k in kinds)
    raise InputError(
      f'{target}: defines no `{name}`; it must be of type {classes}, or a function that returns one'
    )
  return found


# ---- trained models ----------------------------------------------------------------------------


class Foreign(NamedTuple):
  """Weights of another library, and the function of `jaxformer.interop` that reads them."""

  path: pathlib.Path
  load: Callable[..., tuple[ModelConfig, Params]]


def foreign_weights(name: str) -> Foreign | None:
  """Return the weights of another library that a name stands for; None for a run."""
  if is_url(name):
    return None
  if is_rwkv(name) and pathlib.Path(name).is_file():
    return Foreign(pathlib.Path(name), load_rwkv)
  path, _ = trained_folder(name)
  return Foreign(pathlib.Path(path), load_hf) if _is_hugging_face(pathlib.Path(path)) else None


def trained_folder(name: str) -> tuple[AnyPath, str]:
  """Return the folder of a run, given by path, by name in `runs` or by URL, and its '@STEP' or ''.

  Raises `InputError` with the nearest names of runs."""
  folder, at, step = name.partition('@')
  if is_url(folder):
    return to_path(folder), f'{at}{step}'
  candidates = (pathlib.Path(folder), pathlib.Path('runs') / folder)
  path = next((p for p in candidates if folder and p.is_dir()), None)
  if path is not None:
    return path, f'{at}{step}'
  if pathlib.Path(folder).is_file():
    raise InputError(
      f'{folder} is a file; a run, a folder of Hugging Face weights or a .safetensors or .pth '
      'file is expected'
    )
  runs = pathlib.Path('runs')
  known = sorted(str(p.parent.relative_to(runs)) for p in runs.glob('**/config.json'))
  raise InputError(
    f'no run {folder!r}, here or in runs/{nearest(folder.removeprefix("runs/"), known)}'
  )


def _is_hugging_face(folder: pathlib.Path) -> bool:
  file = folder / 'config.json'
  try:
    value = json.loads(file.read_text())
  except FileNotFoundError:
    return False
  except (OSError, ValueError) as e:
    raise InputError(
      f'{file}: cannot be read as JSON ({e}); run folders and folders of Hugging Face weights have '
      'one'
    ) from None
  return isinstance(value, dict) and 'model_type' in value


def initial_params(source: str, experiment: Experiment) -> str | Params:
  """Return what `--init-from` names as `training.train` takes it: the path of a checkpoint, or
  weights of another library, checked against the model of the experiment."""
  foreign = foreign_weights(source)
  if foreign is None:
    return ''.join(map(str, trained_folder(source)))
  if steps_in(run_folder(experiment) / 'checkpoints'):  # a resumed run needs no weights
    return str(foreign.path)
  model, params = foreign.load(foreign.path, parallel=make_parallel(experiment.mesh))
  if foreign.load is load_rwkv:  # such files do not hold a context length
    model = model.replace(context_length=experiment.model.context_length)
  lines = [
    d
    for d in differences(to_json(model), to_json(experiment.model))
    if not FREE & set(d.partition(':')[0].split('.'))
  ]
  if lines:
    raise InputError(
      f"--init-from {source}: its model is not the experiment's (weights -> experiment):"
      f'\n  {first_lines(lines)}'
    )
  return params
