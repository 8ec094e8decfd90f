"""Models with their parameters from a name: a run, weights of another library, or a preset."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import jax

from jaxformer.data import load_tokenizer
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training import default_experiment, load_experiment
from jaxformer.training.checkpoint import load_params
from jaxformer.training.paths import local_copy
from jaxformer.user_code import load_file
from jaxformer.workflows.model import Model
from jaxformer.workflows.names import foreign_weights, trained_folder

Code = Sequence[str | os.PathLike[str]]
"""Python files of the user that define types of a run, named by the user."""


def load_model(name: str, code: Code, seed: int) -> Model:
  """Return a model; see `jaxformer.load`."""
  if name in set(PRESETS) and not any(pathlib.Path(p, name).is_dir() for p in ('.', 'runs')):
    return _initialized(name, seed)
  foreign = foreign_weights(name)
  if foreign is not None:
    model, params = foreign.load(foreign.path)
    folder = foreign.path if foreign.path.is_dir() else foreign.path.parent
    has_tokenizer = (folder / 'tokenizer.json').is_file()
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    return Model(foreign.path.name, define(model), lambda: params, tokenizer)
  path, at = trained_folder(name)
  trained_by = load_experiment(path, code)
  definition = define(trained_by.model)
  params, step = load_params(f'{path}{at}', definition)
  tokenizer = None
  if (path / 'tokenizer').exists():
    with local_copy(path / 'tokenizer') as folder:
      tokenizer = load_tokenizer(folder)
  return Model(path.name, definition, lambda: params, tokenizer, trained_by, step)


def _initialized(name: str, seed: int) -> Model:
  """A preset with initial parameters, made when they are used, and the tokenizer of its default
  experiment if that needs no training."""
  made = default_experiment(PRESETS[name].model, name)
  definition, task = define(made.model), made.model.task
  tokenizer = ByteTokenizer()
  text = task in (LANGUAGE_MODELING, TRANSLATION)
  if not text or (task.vocab_size or 0) < tokenizer.vocab_size:
    tokenizer = None
  return Model(name, definition, lambda: definition.init(jax.random.key(seed)), tokenizer, made)


def name_code(code: Code) -> None:
  """Load files that the user named, so that runs may use their types."""
  for path in code:
    load_file(path, named=True)
