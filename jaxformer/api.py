"""What people call from Python; the command line calls the same functions. Import `jaxformer`,
which re-exports all of it lazily."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Unpack, cast, overload

import jax
from flax import nnx

from jaxformer.config import InputError
from jaxformer.evaluation import EvalResult
from jaxformer.launch import ENGINES, Engine
from jaxformer.layers.layer import LayerConfig
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Params, define
from jaxformer.models.zoo import PRESETS
from jaxformer.overrides import override
from jaxformer.planning.estimate import UTILIZATION
from jaxformer.study.report import report_study, train_study
from jaxformer.study.results import Results
from jaxformer.study.runner import finished_part
from jaxformer.study.sharing import worthwhile
from jaxformer.study.study import Study
from jaxformer.training import Experiment, default_experiment
from jaxformer.training.interrupt import Interrupt
from jaxformer.user_code import is_a
from jaxformer.workflows.benchmark import Benchmark, measure
from jaxformer.workflows.check import Verdicts, check_examples
from jaxformer.workflows.data import DataReport, data_report, write_tokenizer
from jaxformer.workflows.describe import Description, describe_model
from jaxformer.workflows.evaluate import EvaluateOptions
from jaxformer.workflows.launch import LaunchPlan, prepare
from jaxformer.workflows.load import Code, load_model, name_code
from jaxformer.workflows.model import GenerateOptions, Model, TranslateOptions
from jaxformer.workflows.names import Overrides, changed_study, experiment_of, pairs_of, study_of
from jaxformer.workflows.plan import ModelPlan, Phase, PlanOptions, plan_model
from jaxformer.workflows.progress import Log
from jaxformer.workflows.progress import log as _log
from jaxformer.workflows.sizes import ALL, Amount, Shapes, Size, all_shapes, layer_in_file, sizes_of
from jaxformer.workflows.train import TrainingReport, train_experiment

# ---- architectures -----------------------------------------------------------------------------


def preset(name: str) -> ModelConfig:
  """Return the architecture published under a name (see `jaxformer list`)."""
  return PRESETS[name].model


def build(model: ModelConfig | str, seed: int = 0) -> nnx.Module:
  """Return the module of a config or preset with initialized parameters, on one device."""
  definition = define(preset(model) if isinstance(model, str) else model)
  return definition.merge(definition.init(jax.random.key(seed)))


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
  pairs = pairs_of(overrides)
  if isinstance(target, str):
    return experiment_of(target, pairs, **size)
  if is_a(target, ModelConfig):
    return override(default_experiment(target, target.tag), pairs)
  return override(cast(Experiment, target), pairs)


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
  made = not isinstance(model, str) or model in set(PRESETS) or '.py' in model
  if made:
    e = experiment(model, overrides=overrides)
    return describe_model(model if isinstance(model, str) else model.tag, e.model, target)
  pairs = pairs_of(overrides)
  if pairs:
    raise InputError(f'--{pairs[0][0]}: the model of a run has its own settings')
  return load(model, code=code).describe(target)


def check(layer: LayerConfig | str, *, log: Log = _log) -> Verdicts:
  """Check a layer, or the layer that FILE.py:NAME names, and the examples of its class against the
  contract of layers."""
  return check_examples(layer_in_file(layer) if isinstance(layer, str) else layer, log)


# ---- trained models ----------------------------------------------------------------------------


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
  return load_model(os.fspath(name), code, seed)


@overload
def generate(model: Model | str, prompt: str = '', **options: Unpack[GenerateOptions]) -> str: ...
@overload
def generate(
  model: Model | str, prompt: Sequence[str], **options: Unpack[GenerateOptions]
) -> list[str]: ...


def generate(
  model: Model | str, prompt: str | Sequence[str] = '', **options: Unpack[GenerateOptions]
) -> str | list[str]:
  """Return the continuation of a prompt by a trained model (see `load`); of several prompts, a
  list. The options are `GenerateOptions`."""
  return _loaded(model).generate(prompt, **options)


@overload
def translate(model: Model | str, source: str, **options: Unpack[TranslateOptions]) -> str: ...
@overload
def translate(
  model: Model | str, source: Sequence[str], **options: Unpack[TranslateOptions]
) -> list[str]: ...


def translate(
  model: Model | str, source: str | Sequence[str], **options: Unpack[TranslateOptions]
) -> str | list[str]:
  """Return the translation of a text by a trained encoder-decoder (see `load`); of several texts, a
  list. The options are `TranslateOptions`."""
  return _loaded(model).translate(source, **options)


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
  log: Log = _log,
) -> None:
  """Write a trained model for other libraries; see `Model.export`. `dtype` is 'float32', 'bfloat16'
  or 'float16'."""
  found = _loaded(model, code)
  found.export(pathlib.Path(out), dtype=dtype)
  log(f'wrote {found.name} to {out}: {found.definition.size:,} parameters, {dtype}')


def _loaded(model: Model | str, code: Code = ()) -> Model:
  return model if isinstance(model, Model) else load(model, code=code)


# ---- training ----------------------------------------------------------------------------------


def train(
  target: Experiment | str,
  *,
  overrides: Overrides = (),
  init_from: str | Params | None = None,
  code: Code = (),
  log: Log = _log,
  **size: Unpack[Size],
) -> TrainingReport:
  """Train in the experiment's run folder; the same run name resumes.

  Args:
    target, overrides, size: see `experiment`.
    init_from: start a new run from these weights: what `load` accepts except presets, or parameters
      by name, which are copied.
    code: files that define the types of the run to resume, or of `init_from`; see `load`.
    log: receives a line per event; the logger 'jaxformer' by default.

  Raises `InputError`, before anything is written, for what cannot be trained, and for a run folder
  that holds another experiment.
  """
  name_code(code)
  return train_experiment(experiment(target, overrides=overrides, **size), init_from, log)


# ---- plans and studies -------------------------------------------------------------------------


def plan(
  model: Experiment | ModelConfig | str,
  *,
  overrides: Overrides = (),
  length: int | None = None,
  target: str | None = None,
  tokens: Amount | None = None,
  utilization: float = UTILIZATION,
  price: float | None = None,
  hardware: str | None = None,
  phase: Phase = 'train',
  compile: bool = False,
  search: bool = False,
  log: Log = _log,
  **size: Unpack[Size],
) -> ModelPlan:
  """Return what a model costs, from shapes alone; on a target also time, price, memory per device
  and the bottleneck of training or inference.

  FLOPs per token are averaged over the model's context length for a preset (on a target, over at
  most 8,192 tokens), and over the sequence length of an experiment.

  Args:
    model, overrides, size: see `experiment`.
    length: sequence length, in place of these.
    target: a slice or a host of GPUs: 'v5p-2048', 'v6e-256', '2 x v5e-256', 'v5e:2x4', 'h100:8'.
    tokens: of the training run, a number or text such as '2T'; by default 20 per active parameter
      (Hoffmann et al. 2022).
    utilization: share of the peak FLOPs per second that time and price assume.
    price: USD per chip-hour, in place of the list price.
    hardware: a TOML or JSON file with chips of your own; see `planning.hardware`.
    phase: 'train', 'prefill' or 'decode'.
    compile: compile the program with the TPU compiler, and report memory, FLOPs and collectives.
    search: try meshes, batch sizes and remat policies, compile the best few and recommend one.
  """
  options = PlanOptions(
    target=target,
    tokens=tokens,
    utilization=utilization,
    price=price,
    hardware=hardware,
    phase=phase,
    compile=compile,
    search=search,
  )
  return plan_model(model, pairs_of(overrides), size, length, options, log)


def shapes(
  family: str = ALL, *, overrides: Overrides = (), log: Log = _log, **size: Unpack[Size]
) -> Shapes:
  """Return the shapes of a family, or of all families, at one or several sizes (`params='1M,10M'`);
  the vocabulary and context length may be overridden."""
  return all_shapes(family, sizes_of(size), pairs_of(overrides), log)


def get_study(target: Study | str, *, overrides: Overrides = (), add: Sequence[str] = ()) -> Study:
  """Return a study: a name (see `study.studies`), a Python file that defines `study`, or a `Study`.

  Args:
    overrides: values by dotted path, `{'study.tokens': 1e6}`.
    add: layer or model configs FILE.py:NAME, as further entries.
  """
  pairs = pairs_of(overrides)
  if isinstance(target, str):
    return study_of(target, pairs, add)
  return changed_study(target, pairs, add)


def compare(
  target: Study | str,
  *,
  overrides: Overrides = (),
  add: Sequence[str] = (),
  workers: int | None = None,
  log: Log = _log,
) -> Results:
  """Train the architectures of a study and write its report to DIR/STUDY/report. A study that was
  interrupted resumes.

  Args:
    target, overrides, add: see `get_study`.
    workers: processes that train at once, for a study given by name or file; by default one per
      core, at most 4, and one on an accelerator.

  Raises `study.sharing.Interrupted` after a signal, when all runs are saved.
  """
  chosen = get_study(target, overrides=overrides, add=add)
  if workers is not None and workers < 1:
    raise InputError('workers', workers, 'at least 1')
  commands = []
  if isinstance(target, str):
    words = [word for name in add for word in ('--add', name)]
    words += [f'--{path}={value}' for path, value in pairs_of(overrides)]
    command = [sys.executable, '-m', 'jaxformer', 'compare', target, *words, '--train-only']
    commands = [command] * ((workers or worthwhile(len(chosen.entries))) - 1)
  return report_study(chosen, log, commands)


def train_runs(
  target: Study | str, *, overrides: Overrides = (), add: Sequence[str] = (), log: Log = _log
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
  log: Log = _log,
) -> Results:
  """Write the report of a study from its finished runs, and train nothing; see `compare`. `code`:
  see `load`."""
  name_code(code)
  chosen = get_study(target, overrides=overrides, add=add)
  part = finished_part(chosen)
  if missing := [e.title for e in chosen.entries if e not in part.entries]:
    log(f'not finished and left out: {", ".join(missing)}')
  return report_study(part, log)


# ---- text --------------------------------------------------------------------------------------


def inspect_data(*, overrides: Overrides = (), log: Log = _log) -> DataReport:
  """Return what the splits of a text or parallel corpus hold. Overrides are of `data`."""
  return data_report(pairs_of(overrides), log)


def train_tokenizer(
  out: str | os.PathLike[str], *, vocab_size: int = 4096, overrides: Overrides = (), log: Log = _log
) -> int:
  """Train byte pairs (BPE) on the training text and write them to `out`, a tokenizer.json. Return
  the size of the vocabulary. Overrides are of `data`."""
  return write_tokenizer(pairs_of(overrides), vocab_size, os.fspath(out), log)


# ---- machines ----------------------------------------------------------------------------------


def bench(
  target: Experiment | ModelConfig | str,
  *,
  overrides: Overrides = (),
  steps: int = 10,
  context_lengths: Sequence[int] = (),
  new_tokens: int = 128,
  log: Log = _log,
) -> Benchmark:
  """Measure training and decoding on this machine, with random weights and tokens.

  Args:
    target, overrides: see `experiment`.
    steps: training steps measured; 0 omits training.
    context_lengths: tokens in the prompt before decoding is measured; by default 128 and 1,024.
    new_tokens: tokens decoded after each prompt; 0 omits decoding.
  """
  e = experiment(target, overrides=overrides)
  name = target if isinstance(target, str) else e.run.name or e.model.tag
  return measure(
    name, e, steps=steps, context_lengths=context_lengths, new_tokens=new_tokens, log=log
  )


def plan_launch(
  engine: Engine | str,
  target_experiment: str,
  *,
  target: str,
  overrides: Overrides = (),
  spot: bool = False,
  source: str | None = None,
  sweep: Sequence[str] = (),
  utilization: float = UTILIZATION,
) -> LaunchPlan:
  """Return training jobs for rented machines or a cluster, checked and priced. `.write(log)` writes
  their files and `.submit()` starts them; until then nothing is written or started.

  Args:
    engine: a config from `jaxformer.launch`, or 'sky', 'xpk', 'gcloud' or 'slurm'.
    target_experiment, overrides: see `experiment`; settings of the engine are overrides too,
      `{'sky.infra': 'gcp/us-east5'}`.
    target: slices or hosts to rent, 'v6e-16', '2xv5e-256', 'h100:8'.
    spot: on machines that may be preempted, at the lower price.
    source: what the machines install: git+URL@COMMIT, a wheel, a folder with a pyproject.toml, or
      'installed'.
    sweep: a job for each value, 'optimizer.learning_rate=1e-3,3e-3'; several make a grid.
    utilization: share of the peak that the estimated time assumes.
  """
  pairs = pairs_of(overrides)
  if isinstance(engine, str):
    own = [pair for pair in pairs if pair[0].partition('.')[0] == engine]
    engine, pairs = (
      override(ENGINES[engine](), own, root=engine),
      [pair for pair in pairs if pair not in own],
    )
  return prepare(
    engine,
    target_experiment,
    pairs,
    target=target,
    spot=spot,
    source=source,
    sweep=sweep,
    utilization=utilization,
  )
