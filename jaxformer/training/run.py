"""The folder of a run: what was trained, where, and what came of it. Only process 0 writes. It may
be in a bucket (see `folder`).

    runs/<name>/config.json         the experiment
                environment.json    versions, devices, commit, command and data; one entry a start
                metrics.jsonl       one object a line: `step` and numbers
                events.jsonl        one object a line: what happened when
                checkpoints/<step>/
                tokenizer/          as `jaxformer.data.load_tokenizer` reads it
                tensorboard/  samples.txt
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import Tokenizer
from jaxformer.training.experiment import Experiment
from jaxformer.training.folder import Place, check_bucket, folder_at, place, reaching
from jaxformer.training.processes import first_decides

# What may differ from the saved config when a run goes on: how long, how often, where it runs and
# what it keeps. Other numbers of steps stretch or shrink a schedule that depends on them, from
# where the run is.
FREE = (
  'training.steps',
  'training.eval_every',
  'training.checkpoint_every',
  'training.log_every',
  'training.keep_latest',
  'training.keep_best',
  'training.trackers',
  'training.profile',
  'training.remat',
  'mesh',
  'run',
)

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'tokenizers',
  'libtpu',
  'jax-cuda13-plugin',
)


def run_folder(experiment: Experiment) -> Place:
  """`run.dir`/`run.name`. Raises `InputError` for a store that cannot be used."""
  name = experiment.run.name or f'run-{config.digest(experiment)[:8]}'
  return place(experiment.run.dir, 'run.dir') / name


def load_experiment(folder: str | Place) -> Experiment:
  """The experiment of a run folder. Raises `InputError` where there is none."""
  where, file = place(folder), f'{folder}/config.json'
  try:
    with reaching(where):
      text = (where / 'config.json').read_text()
    data = json.loads(text)
  except FileNotFoundError:
    check_bucket(where)
    raise InputError(f'{folder}: not a run folder: there is no config.json') from None
  except OSError as e:
    raise InputError(f'{file}: cannot be read ({e.strerror})') from None
  except ValueError as e:
    raise InputError(f'{file}: not valid JSON ({e})') from None
  _register_configs()
  experiment = config.from_json(data, str(file))
  if not isinstance(experiment, Experiment):
    raise InputError(f'{file}: holds {experiment.tag}, not an experiment')
  return experiment


def _register_configs() -> None:
  """A config is known by its type once its module is imported; a file may name any."""
  importlib.import_module('jaxformer.models.zoo')
  importlib.import_module('jaxformer.models.classifier')
  package = importlib.import_module('jaxformer.layers')
  for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f'{package.__name__}.{module.name}')


class Run:
  """A run folder that is being written. A context manager, at whose end all that was written is in
  the folder.

  Attributes:
    folder: where.
    home: the local folder in which its files are written: `folder` itself where that is local.
    fresh: whether the run begins here.
  """

  def __init__(self, experiment: Experiment):
    """Opens the folder, without writing. Raises `InputError`, naming the fields, if the run there
    is of another experiment."""
    self.experiment, self.folder = experiment, run_folder(experiment)
    self.writes = jax.process_index() == 0
    self._files = folder_at(self.folder)
    self._started = False
    self.changed: list[str] = []
    self.fresh = first_decides(self._is_fresh)

  def _is_fresh(self) -> bool:
    with reaching(self.folder):
      fresh = not (self.folder / 'config.json').exists()
    if fresh:
      check_bucket(self.folder)
      if self.folder.exists() and any(self.folder.iterdir()):
        raise InputError(
          f'{self.folder} is not empty and not a run folder (it has no config.json); give another '
          '--run.name'
        )
      return True
    saved = config.to_json(load_experiment(self.folder))
    self.changed = config.differences(saved, config.to_json(self.experiment))
    fixed = [
      d
      for d in self.changed
      if not d.startswith(tuple(f'{path}{end}' for path in FREE for end in ('.', ':')))
    ]
    if fixed:
      lines = '\n  '.join(fixed)
      raise InputError(
        f'{self.folder} is a run of another experiment:\n  {lines}\n'
        'give this one another --run.name, or go on with the same settings'
      )
    return False

  @property
  def home(self) -> Path:
    return self._files.home

  def check_initialization(self) -> None:
    """Raises `InputError` where the run has begun from random weights: to give it others now would
    have no effect."""

    def began_otherwise() -> bool:
      starts = [row for row in _rows(self.folder / 'events.jsonl') if row.get('event') == 'start']
      return bool(starts) and starts[-1].get('init_from') is None

    if first_decides(began_otherwise):
      raise InputError(
        f'--init-from: {self.folder} is a run that began from random weights and would go on from '
        'where it is; '
        'give another --run.name, or leave --init-from out'
      )

  def start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Writes what is known at the start; `tokenizer` is that of text. Raises `InputError` where the
    folder cannot be made."""
    first_decides(lambda: self._write_start(data_manifest, tokenizer))
    self._started = True

  def _write_start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> bool:
    try:
      self._files.open()
      (self.home / 'checkpoints').mkdir(exist_ok=True)
      if tokenizer is not None:
        (self.home / 'tokenizer').mkdir(exist_ok=True)
    except OSError as e:
      raise InputError(
        f'run.dir = {self.experiment.run.dir!r}: the folder {self.folder} cannot be made '
        f'({e.strerror})'
      ) from None
    if not os.access(self.home, os.W_OK):
      raise InputError(
        f'run.dir = {self.experiment.run.dir!r}: the folder {self.folder} cannot be written'
      )
    if tokenizer is not None:
      tokenizer.save(self.home / 'tokenizer')
    file = self.home / 'environment.json'
    starts = _list(file)
    write(file, json.dumps([*starts, environment(data_manifest)], indent=2, default=str) + '\n')
    # last: it is what makes the folder a run
    write(self.home / 'config.json', config.text(self.experiment))
    self._files.publish()
    return True

  def rewind(self, step: int) -> None:
    """Drops the metrics of later steps, which will come again: the file reads like that of a run
    never interrupted."""
    if not self.writes:
      return
    file = self.home / 'metrics.jsonl'
    if file.exists():
      kept = [json.dumps(row) + '\n' for row in _rows(file) if row['step'] <= step]
      write(file, ''.join(kept))

  def metrics(self, row: dict[str, Any]) -> None:
    """Adds a line to `metrics.jsonl`."""
    self._append('metrics.jsonl', row)

  def event(self, name: str, **facts: Any) -> None:
    """Adds a line to `events.jsonl`."""
    self._append('events.jsonl', {'time': round(time.time(), 3), 'event': name} | facts)

  def samples(self, step: int, text: str) -> None:
    """Adds generated text to `samples.txt`."""
    if self.writes:
      with (self.home / 'samples.txt').open('a') as f:
        f.write(f'==== step {step} ====\n{text}\n')

  def sync(self) -> None:
    """Makes the lines outlast this process, before a checkpoint that will count on them."""
    if self.writes:
      self._files.push(('metrics.jsonl', 'events.jsonl'))

  def _append(self, name: str, row: dict[str, Any]) -> None:
    if self.writes:
      with (self.home / name).open('a') as f:
        f.write(json.dumps(row, default=str) + '\n')

  def __enter__(self) -> Run:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # the error on its way out says more
    with contextlib.suppress(*(() if kind is None else (InputError,))):
      self._files.close(publish=self._started)


def read_metrics(folder: str | Place) -> list[dict[str, Any]]:
  """The rows of `metrics.jsonl`; a last line that a crash cut is left out."""
  return _rows(place(folder) / 'metrics.jsonl')


def read_events(folder: str | Place) -> list[dict[str, Any]]:
  """The rows of `events.jsonl`, like `read_metrics`."""
  return _rows(place(folder) / 'events.jsonl')


def _rows(file: Place) -> list[dict[str, Any]]:
  rows = []
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def _list(file: Path) -> list[Any]:
  """A JSON list; one that is damaged is not worth stopping a run for."""
  try:
    value = json.loads(file.read_text())
  except (OSError, ValueError):
    return []
  return value if isinstance(value, list) else []


def write(file: Path, text: str) -> None:
  """Replaces a file at once: a crash leaves the old one or the new one."""
  part = file.with_name(f'{file.name}.part')
  part.write_text(text)
  os.replace(part, file)


def environment(data_manifest: dict[str, Any]) -> dict[str, Any]:
  """What a result may depend on beside the config."""
  devices = jax.devices()
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'command': sys.argv,
    'python': platform.python_version(),
    'platform': platform.platform(),
    'cpus': os.cpu_count(),
    'versions': {'jaxformer': _version('jaxformer')}
    | {p: v for p in PACKAGES if (v := _version(p))},
    'devices': {
      'platform': devices[0].platform,
      'kind': devices[0].device_kind,
      'count': len(devices),
      'processes': jax.process_count(),
    },
    'xla_flags': {k: os.environ[k] for k in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS') if k in os.environ},
    'commit': _commit(),
    'data': data_manifest,
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """The commit of the package's source, with a + where files differ from it; None outside a
  repository."""
  if shutil.which('git') is None:
    return None
  home = Path(__file__).parent

  def git(*words: str) -> str | None:
    done = subprocess.run(
      ['git', '-C', str(home), *words], capture_output=True, text=True, check=False, timeout=20
    )
    return done.stdout.strip() if done.returncode == 0 else None

  head = git('rev-parse', 'HEAD')
  return head and head + (
    '+' if git('status', '--porcelain', '--untracked-files=no', '--', str(home.parent)) else ''
  )
