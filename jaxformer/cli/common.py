"""What several commands need: experiments by name or file, and how answers are printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxformer.config import InputError, nearest
from jaxformer.overrides import override
from jaxformer.user_code import errors_of, load_file

Overrides = list[tuple[str, str]]
SECTIONS = ('model', 'data', 'optimizer', 'schedule', 'training', 'mesh', 'run')

# ---- experiments by name or file ---------------------------------------------------------------


def experiment_of(target: str, overrides: Overrides, size: Any = None) -> Any:
  """The experiment that a preset's name or a file stands for, with overrides.

  A file is Python that defines `experiment` (an `Experiment`, or a function that returns one); the
  file's name is its name. With a size (`cli.sizes`) the target is a family or, as it may be without
  one too, a layer in a file, FILE.py:NAME."""
  from jaxformer.cli import sizes
  from jaxformer.models.zoo import FAMILIES, PRESETS
  from jaxformer.training.experiment import Experiment, default_experiment

  if size is not None or sizes.is_layer(target):
    sized, overrides = sizes.made(target, size, overrides)
    experiment = sizes.experiment(sized)
  elif target.endswith('.py') or os.sep in target:
    path = pathlib.Path(target)
    if not path.is_file():
      raise InputError(f'{target}: no such file')
    with errors_of(path):
      experiment = getattr(load_file(path), 'experiment', None)
      experiment = experiment() if callable(experiment) else experiment
    if not isinstance(experiment, Experiment):
      raise InputError(
        f'{target}: defines no `experiment`; it must be an Experiment or a function that returns '
        'one'
      )
    if experiment.run.name is None:
      experiment = experiment.replace(run=experiment.run.replace(name=path.stem))
  else:
    if target not in set(PRESETS):
      sized = (
        f'; of the family {target} --params 1M makes a model' if target in set(FAMILIES) else ''
      )
      raise InputError(
        f'no preset named {target!r}{nearest(target, PRESETS)}; `jaxformer list` has all; a file '
        f'ends in .py{sized}'
      )
    preset = PRESETS[target]
    experiment = default_experiment(preset.model, preset.name)
  return override(experiment, overrides)


def study_of(target: str) -> Any:
  """The study of a name or a file; a file is Python that defines `study` (a `Study`, or a function
  that returns one)."""
  from jaxformer.study.studies import STUDIES
  from jaxformer.study.study import Study

  if not (target.endswith('.py') or os.sep in target):
    if target not in set(STUDIES):
      raise InputError(f'no study named {target!r}{nearest(target, STUDIES)}; a file ends in .py')
    return STUDIES[target]
  path = pathlib.Path(target)
  if not path.is_file():
    raise InputError(f'{target}: no such file')
  with errors_of(path):
    study = getattr(load_file(path), 'study', None)
    study = study() if callable(study) else study
  if not isinstance(study, Study):
    raise InputError(
      f'{target}: defines no `study`; it must be a Study or a function that returns one'
    )
  return study


def of_data(path: str) -> bool:
  """Whether an override is of the section `data`."""
  return path.partition('.')[0] == 'data'


# ---- output ------------------------------------------------------------------------------------


_speaks = True


def note(line: str) -> None:
  """Progress and remarks: stderr."""
  if _speaks:
    print(line, file=sys.stderr, flush=True)


def join_processes() -> None:
  """Joins the processes that run this command together (`jaxformer.training.processes`); after that
  the first alone says what comes of it, and each what goes wrong with it."""
  global _speaks
  from jaxformer.training.processes import join

  if join(log=note) is not None:
    import jax

    _speaks = jax.process_index() == 0
    # Until the program ends. The library that joins CPUs writes about its connections on the
    # descriptor of standard output.
    sys.stdout = open(os.dup(1) if _speaks else os.devnull, 'w')  # noqa: SIM115
    os.dup2(2, 1)


def answer(value: Any, as_json: bool, lines: Callable[[], list[str]]) -> None:
  """The answer: one JSON value, or lines for a reader."""
  print(json.dumps(value, indent=2) if as_json else '\n'.join(lines()))


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Rows in columns; the first `left` columns are flush left, the others right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return [
    '  '.join(
      c.ljust(w) if i < left else c.rjust(w)
      for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def amount(n: float) -> str:
  """A count for a reader: 6.7B."""
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('K', 1e3)):
    if abs(n) >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.3g}'


# ---- trained models ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model with its weights, ready to be asked.

  Attributes:
    name: the run's, folder's or file's.
    experiment: what it was trained by; None for weights from elsewhere.
    tokenizer: of the text that it was trained on; None for one trained on a task, or where it was
      not asked for.
    step: of the checkpoint; None for weights from elsewhere.
  """

  name: str
  experiment: Any
  definition: Any
  params: Any
  tokenizer: Any
  step: int | None


def load_trained(run: str, tokenizer: bool = True) -> Trained:
  """A run (`runs/NAME`, `NAME` in `runs`, either with `@STEP`), a folder of Hugging Face weights
  with a `tokenizer.json`, or a file of RWKV weights with a `tokenizer.json` beside it. `tokenizer`
  False does without the tokenizer."""
  import jaxformer.models.zoo  # noqa: F401  (registers the configs that a saved experiment names)
  from jaxformer.data import load_tokenizer
  from jaxformer.models.params import define
  from jaxformer.training.checkpoint import load_params
  from jaxformer.training.folder import fetched
  from jaxformer.training.run import load_experiment

  foreign = foreign_weights(run)
  if foreign is not None:
    path, load = foreign
    model, params = load(path)
    beside = path if path.is_dir() else path.parent
    return Trained(
      path.name, None, define(model), params, load_tokenizer(beside) if tokenizer else None, None
    )
  path, at = trained_folder(run)
  experiment = load_experiment(path)
  definition = define(experiment.model)
  params, found = load_params(f'{path}{at}', definition)
  text = None
  if tokenizer and experiment.data.has_text:
    with fetched(path / 'tokenizer') as folder:
      text = load_tokenizer(folder)
  return Trained(path.name, experiment, definition, params, text, found)


def foreign_weights(name: str) -> tuple[pathlib.Path, Callable[..., Any]] | None:
  """Where RUN names weights of another library: their path, and the function of `jaxformer.interop`
  that reads them. None for a run of ours."""
  from jaxformer.interop import is_rwkv, load_hf, load_rwkv
  from jaxformer.training.folder import is_url

  if is_url(name):
    return None
  if is_rwkv(name) and pathlib.Path(name).is_file():
    return pathlib.Path(name), load_rwkv
  path, _ = trained_folder(name)
  return (path, load_hf) if is_hugging_face(path) else None


def load_writer(run: str, what: str) -> Trained:
  """`load_trained` of a model of text. Raises `InputError` for one trained on a task, which `what`
  (a command) has no use for."""
  trained = load_trained(run)
  if trained.tokenizer is None:
    model, data = trained.definition.config.tag, trained.experiment.data.tag
    raise InputError(
      f'{run}: a {model} trained on {data}; {what} takes models of text (`jaxformer eval {run}` '
      'scores this one)'
    )
  return trained


def translates(trained: Trained) -> bool:
  """Whether the model is an encoder-decoder."""
  from jaxformer.task_type import TRANSLATION

  return trained.definition.config.task == TRANSLATION


def source_tokenizer(trained: Trained) -> Any:
  """The tokenizer of an encoder-decoder's sources: of two it is the `source` of that of its
  targets."""
  return trained.tokenizer.source


def source_ids(trained: Trained, text: str) -> list[int]:
  """A text as an encoder-decoder reads it, with the end of the document."""
  tokenizer = source_tokenizer(trained)
  if tokenizer.end_of_document is None or trained.tokenizer.end_of_document is None:
    raise InputError(
      f'{trained.name}: its tokenizer has no token for the end of a document, which sources and '
      'translations end with'
    )
  return [*tokenizer.encode(text).tolist(), tokenizer.end_of_document]


def translated(
  trained: Trained,
  texts: Sequence[str],
  *,
  beam: Any,
  max_new_tokens: int | None = None,
  dtype: Any = None,
) -> list[tuple[str, Any]]:
  """Translations by an encoder-decoder, as text and as `inference.Translation`, in the order of the
  texts; `beam` is an `inference.Beam`."""
  from jaxformer.inference import translate

  tokenizer = trained.tokenizer
  found = translate(
    trained.definition,
    trained.params,
    [source_ids(trained, text) for text in texts],
    end=tokenizer.end_of_document,
    beam=beam,
    max_new_tokens=max_new_tokens,
    vocab_size=tokenizer.vocab_size,
    dtype=dtype,
  )
  return [(tokenizer.decode(t.tokens), t) for t in found]


def trained_folder(name: str) -> tuple[Any, str]:
  """The folder that RUN names, here, in `runs` or in a bucket, and its '@STEP' or ''. Raises
  `InputError` with the nearest runs."""
  from jaxformer.training.folder import is_url, place

  folder, at, step = name.partition('@')
  if is_url(folder):
    return place(folder), f'{at}{step}'
  path = next(
    (p for p in (pathlib.Path(folder), pathlib.Path('runs') / folder) if folder and p.is_dir()),
    None,
  )
  if path is None:
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
  return path, f'{at}{step}'


def is_hugging_face(folder: pathlib.Path) -> bool:
  """Whether a folder holds weights of Hugging Face, rather than a run or a checkpoint of ours."""
  file = folder / 'config.json'
  try:
    value = json.loads(file.read_text())
  except FileNotFoundError:
    return False
  except (OSError, ValueError) as e:
    raise InputError(
      f'{file}: cannot be read as JSON ({e}); a run folder or a folder of Hugging Face weights has '
      'one'
    ) from None
  return isinstance(value, dict) and 'model_type' in value


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of sampling, named as the fields of `Sampling`."""
  parser.add_argument(
    '--temperature',
    type=float,
    default=0.8,
    help='divides the logits; 0 takes the likeliest token (0.8)',
  )
  parser.add_argument('--top-k', type=int, help='keep the k likeliest tokens')
  parser.add_argument(
    '--top-p', type=float, help='keep the likeliest tokens with so much probability together'
  )
  parser.add_argument(
    '--min-p', type=float, help='keep tokens at least so likely, compared to the likeliest'
  )
  parser.add_argument(
    '--repetition-penalty', type=float, help='makes tokens that have been there less likely'
  )


def sampling_of(args: argparse.Namespace) -> Any:
  from jaxformer.inference import Sampling

  return Sampling(
    repetition_penalty=args.repetition_penalty,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    min_p=args.min_p,
  )
