"""What people call from Python; the command line calls the same functions. Import `jaxformer`,
which re-exports all of it lazily. Functions with an answer of their own stand in `workflows`."""

import os
import sys
from collections.abc import Sequence
from typing import Unpack

import jax
from flax import nnx

from jaxformer.config import InputError
from jaxformer.evaluation import EvalResult
from jaxformer.files import user_path
from jaxformer.inference.decoding import check_positive
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.study.report import report_study, train_study
from jaxformer.study.results import Results
from jaxformer.study.runner import finished_part
from jaxformer.study.sharing import worthwhile
from jaxformer.study.study import Study
from jaxformer.training.interrupt import Interrupt
from jaxformer.workflows.benchmark import bench
from jaxformer.workflows.check import check
from jaxformer.workflows.data import inspect_data, train_tokenizer
from jaxformer.workflows.describe import Description, describe_model
from jaxformer.workflows.evaluate import EvaluateOptions
from jaxformer.workflows.launch import plan_launch
from jaxformer.workflows.load import Code, load, name_code
from jaxformer.workflows.model import GenerateOptions, Model, Texts, TranslateOptions
from jaxformer.workflows.names import experiment, get_study
from jaxformer.workflows.overrides import Overrides, pairs_of
from jaxformer.workflows.plan import plan
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.recipes import recipe_notes
from jaxformer.workflows.sizes import shapes
from jaxformer.workflows.train import train

__all__ = [
  'bench',
  'build',
  'check',
  'compare',
  'convert',
  'describe',
  'evaluate',
  'experiment',
  'generate',
  'get_study',
  'inspect_data',
  'load',
  'plan',
  'plan_launch',
  'preset',
  'recipe_notes',
  'report',
  'shapes',
  'train',
  'train_runs',
  'train_tokenizer',
  'translate',
]

# ---- architectures -----------------------------------------------------------------------------


def preset(name: str) -> ModelConfig:
  """Return the architecture published under a name (see `jaxformer list`)."""
  return PRESETS[name].model


def build(model: ModelConfig | str, seed: int = 0) -> nnx.Module:
  """Return the module of a config or preset with initialized parameters, on one device."""
  definition = define(preset(model) if isinstance(model, str) else model)
  return definition.merge(definition.init(jax.random.key(seed)))


def describe(
  model: ModelConfig | Model | str,
  *,
  target: str | None = None,
  overrides: Overrides = (),
  code: Code = (),
) -> Description:
  """Return a model read from top to bottom: formulas and papers of its layers, shapes, parameters,
  FLOPs and state bytes of each part, and the implementations of operations that run.

  Args:
    model: a config, a loaded model, or what `load` accepts; also a Python file that defines
      `experiment`, or a layer as FILE.py:NAME.
    target: a slice such as 'v5e-64', for the implementations that run there.
    overrides: of fields of the model, `{'model.width': 256}`; see `experiment`.
    code: see `load`.
  """
  if isinstance(model, Model):
    return model.describe(target)
  if not isinstance(model, str) or model in PRESETS or '.py' in model:
    e = experiment(model, overrides=overrides)
    name = model if isinstance(model, str) else model.tag
    return describe_model(name, e.model, target, e.data.positions)
  pairs = pairs_of(overrides)
  if pairs:
    raise InputError(f'--{pairs[0][0]}: the model of a run has its own settings')
  return load(model, code=code).describe(target)


# ---- trained models ----------------------------------------------------------------------------


def generate(
  model: Model | str,
  prompt: Texts = '',  # ty: ignore[invalid-parameter-default]
  *,
  code: Code = (),
  **options: Unpack[GenerateOptions],
) -> Texts:
  """Return the continuation of a prompt by a trained model (see `load`); of several prompts, a
  list. The options are `GenerateOptions`; `code` is that of `load`."""
  return _loaded(model, code).generate(prompt, **options)


def translate(
  model: Model | str, source: Texts, *, code: Code = (), **options: Unpack[TranslateOptions]
) -> Texts:
  """Return the translation of a text by a trained encoder-decoder (see `load`); of several texts, a
  list. The options are `TranslateOptions`; `code` is that of `load`."""
  return _loaded(model, code).translate(source, **options)


def evaluate(
  model: Model | str, *, code: Code = (), **options: Unpack[EvaluateOptions]
) -> EvalResult:
  """Score a trained model (see `load`) on held-out data, by default of the data that it was trained
  on. The options are `EvaluateOptions`; `code` is that of `load`."""
  return _loaded(model, code).evaluate(**options)


def convert(
  model: Model | str,
  out: str | os.PathLike[str],
  *,
  dtype: str = 'float32',
  code: Code = (),
  log: Log = log_progress,
) -> None:
  """Write a trained model for other libraries; see `Model.export`. `dtype` is 'float32', 'bfloat16'
  or 'float16'."""
  found = _loaded(model, code)
  found.export(user_path(out, 'out'), dtype=dtype)
  log(f'wrote {found.name} to {out}: {found.definition.size:,} parameters, {dtype}')


def _loaded(model: Model | str, code: Code) -> Model:
  return model if isinstance(model, Model) else load(model, code=code)


# ---- studies -----------------------------------------------------------------------------------


def compare(
  target: Study | str,
  *,
  overrides: Overrides = (),
  add: Sequence[str] = (),
  workers: int | None = None,
  log: Log = log_progress,
) -> Results:
  """Train the architectures of a study and write its report to DIR/STUDY/report. A study that was
  interrupted resumes.

  Args:
    target, overrides, add: see `get_study`.
    workers: processes that train at once, for a study given by name or file; by default one per
      core, at most 4, and one on an accelerator.

  Raises `study.sharing.Interrupted` after a signal, when all runs are saved.
  """
  pairs = pairs_of(overrides)
  chosen = get_study(target, overrides=pairs, add=add)
  check_positive(workers=workers)
  commands = []
  if isinstance(target, str):
    words = [f'--add={name}' for name in add] + [f'--{path}={value}' for path, value in pairs]
    command = [sys.executable, '-m', 'jaxformer', 'compare', target, *words, '--train-only']
    commands = [command] * ((workers or worthwhile(len(chosen.entries))) - 1)
  return report_study(chosen, log, commands)


def train_runs(
  target: Study | str,
  *,
  overrides: Overrides = (),
  add: Sequence[str] = (),
  log: Log = log_progress,
) -> None:
  """Train the runs of a study that no other process is training, and write no report; see
  `compare`."""
  with Interrupt() as interrupt:
    train_study(get_study(target, overrides=overrides, add=add), log, interrupt)


def report(
  target: Study | str,
  *,
  overrides: Overrides = (),
  add: Sequence[str] = (),
  code: Code = (),
  log: Log = log_progress,
) -> Results:
  """Write the report of a study from its finished runs, and train nothing; see `compare`. `code`:
  see `load`."""
  name_code(code)
  chosen = get_study(target, overrides=overrides, add=add)
  part = finished_part(chosen)
  if missing := [e.title for e in chosen.entries if e not in part.entries]:
    log(f'not finished and left out: {", ".join(missing)}')
  return report_study(part, log)
