"""Models with their parameters from a name: a run, weights of another library, or a preset."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxformer.config import InputError, differences, first_lines, nearest, to_json
from jaxformer.data import load_tokenizer
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.files import regular_file, user_path
from jaxformer.interop import is_rwkv, load_hf, load_rwkv, read_generation
from jaxformer.interop.family import TRAINING_ONLY
from jaxformer.interop.huggingface import is_of_mamba_authors
from jaxformer.json_data import parse_json
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params, define
from jaxformer.models.zoo import PRESETS
from jaxformer.sharding import make_parallel
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training import load_experiment
from jaxformer.training.checkpoint import canonical, load_params, steps_in
from jaxformer.training.experiment import Experiment
from jaxformer.training.paths import AnyPath, is_url, local_copy, to_path
from jaxformer.training.recipes import preset_experiment
from jaxformer.training.rows import started_from
from jaxformer.training.run import run_folder
from jaxformer.training.setup import Initial
from jaxformer.user_code import load_file
from jaxformer.workflows.model import Model

Code = Sequence[str | os.PathLike[str]]
"""Python files of the user that define types of a run, named by the user."""
RUNS = pathlib.Path('runs')


def load(name: str | os.PathLike[str], *, code: Code = (), seed: int = 0) -> Model:
  """Return a model with its parameters and tokenizer.

  Args:
    name: a run (a folder, a name in `runs`, gs://BUCKET/FOLDER; `RUN@STEP` for an older
      checkpoint), a folder of Hugging Face weights (safetensors) with a `tokenizer.json`, a file of
      RWKV weights with a `tokenizer.json` beside it, or a preset, whose parameters are initialized
      (unless a run has its name).
    code: Python files that define the types of the run, for a file that changed since or that
      somebody else wrote. Unchanged files of yours are found by themselves.
    seed: of the initial parameters of a preset.
  """
  name = os.fspath(name)
  if name in PRESETS and _folder_of(name) is None:
    return _initialized(name, seed)
  if (foreign := foreign_weights(name)) is not None:
    path, read = foreign
    model, params = read(path)
    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder) if (folder / 'tokenizer.json').is_file() else None
    of_folder: dict[str, Any] = (
      {} if read is load_rwkv else {'source': path, 'generation': read_generation(path)}
    )
    return Model(path.name, define(model), lambda: params, tokenizer, **of_folder)
  path, at = trained_folder(name)
  trained_by = load_experiment(path, code)
  definition = define(trained_by.model)
  found = load_params(f'{path}{at}', definition)
  tokenizer = None
  if (path / 'tokenizer').exists():
    with local_copy(path / 'tokenizer') as folder:
      tokenizer = load_tokenizer(folder)
  return Model(
    path.name,
    definition,
    lambda: found.params,
    tokenizer,
    trained_by,
    found.step,
    validation_sha256=found.data.get('validation_sha256'),
  )


def name_code(code: Code) -> None:
  """Load files that the user named, so that runs may use their types."""
  for path in code:
    load_file(path, named=True)


def _initialized(name: str, seed: int) -> Model:
  """A preset with initial parameters, made when they are used, and the tokenizer of its default
  experiment if that needs no training."""
  made = preset_experiment(name)
  definition, task, tokenizer = define(made.model), made.model.task, ByteTokenizer()
  if task not in (LANGUAGE_MODELING, TRANSLATION) or (task.vocab_size or 0) < tokenizer.vocab_size:
    tokenizer = None
  return Model(name, definition, lambda: definition.init(jax.random.key(seed)), tokenizer, made)


# ---- runs and weights of other libraries -------------------------------------------------------


def _places(name: str) -> tuple[pathlib.Path, pathlib.Path]:
  """Where a run of this name may be."""
  path = user_path(name, 'run')
  return path, RUNS / path


def _folder_of(name: str) -> pathlib.Path | None:
  """Return the folder of a run or of weights: of the places where it may be, the first that has a
  `config.json`. A folder of the user's with the name of a run is not in its way."""
  folders = [p for p in _places(name) if name and p.is_dir()]
  return next((p for p in folders if (p / 'config.json').exists()), None)


def trained_folder(name: str) -> tuple[AnyPath, str]:
  """Return the folder of a run, given by path, by name in `runs` or by URL, and its '@STEP' or ''.

  Raises `InputError` with the nearest names of runs."""
  folder, at, step = name.partition('@')
  if is_url(folder):
    return to_path(folder), at + step
  path = _folder_of(folder) or next((p for p in _places(folder) if folder and p.is_dir()), None)
  if path is not None:
    return path, at + step
  if _places(folder)[0].is_file():
    raise InputError(
      f'{folder} is a file; a run, a folder of Hugging Face weights or a .safetensors or .pth '
      'file is expected'
    )
  known = sorted(str(p.parent.relative_to(RUNS)) for p in RUNS.glob('**/config.json'))
  raise InputError(
    f'no run {folder!r}, here or in runs/{nearest(folder.removeprefix("runs/"), known)}'
  )


Reader = Callable[..., tuple[ModelConfig, Params]]


def foreign_weights(name: str) -> tuple[pathlib.Path, Reader] | None:
  """Return the weights of another library that a name stands for, with the function of
  `jaxformer.interop` that reads them; None for a run."""
  if is_url(name):
    return None
  if is_rwkv(name) and _places(name)[0].is_file():
    return _places(name)[0], load_rwkv
  path = pathlib.Path(trained_folder(name)[0])
  return (path, load_hf) if _is_hugging_face(path) else None


def _is_hugging_face(folder: pathlib.Path) -> bool:
  file = folder / 'config.json'
  try:
    value = parse_json(regular_file(file).read_text())
  except FileNotFoundError:
    return False
  except (OSError, ValueError) as e:
    raise InputError(
      f'{file}: cannot be read as JSON ({e}); run folders and folders of Hugging Face weights have '
      'one'
    ) from None
  return isinstance(value, dict) and ('model_type' in value or is_of_mamba_authors(value))


def _canonical(name: str) -> set[str]:
  """Return what a name of a run or of weights may stand for, each in one spelling."""
  base, at, step = name.partition('@')
  places = [base] if is_url(base) else _places(base)
  return {canonical(f'{place}{at}{step}') for place in places}


def initial_params(source: str, experiment: Experiment) -> Initial | None:
  """Return what `--init-from` names as `training.train` takes it: the path of a checkpoint, or
  weights of another library, checked against the model of the experiment. A run that is resumed
  needs no weights: those that it was started from may be gone."""
  folder = run_folder(experiment)
  resumed = bool(steps_in(folder / 'checkpoints'))
  if resumed and (began := started_from(folder)) and canonical(began) in _canonical(source):
    return Initial(began)
  found = foreign_weights(source)
  if found is None:
    folder, at = trained_folder(source)
    return Initial.of(f'{folder}{at}')
  path, read = found
  name = str(path.absolute())
  if resumed:
    return Initial(name)
  model, params = read(path, parallel=make_parallel(experiment.mesh))
  if read is load_rwkv:  # such files do not hold a context length
    model = model.replace(context_length=experiment.model.context_length)
  lines = [
    d
    for d in differences(to_json(model), to_json(experiment.model))
    if not any(map(TRAINING_ONLY.fullmatch, d.partition(':')[0].split('.')))
  ]
  if lines:
    raise InputError(
      f"--init-from {source}: its model is not the experiment's (weights -> experiment):"
      f'\n  {first_lines(lines)}'
    )
  return Initial(name, params)
