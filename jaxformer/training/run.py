"""The folder of a run. Only process 0 writes. It may be in a bucket (see `paths`).

runs/<name>/config.json         the experiment, and the `format` of the folder
            environment.json    versions, devices, commit, command, data and code; an entry per
                                start
            metrics.jsonl       one object per line: `step` and numbers
            events.jsonl        one object per line: what happened when
            checkpoints/<step>/
            tokenizer/          as read by `jaxformer.data.load_tokenizer`
            tensorboard/  samples.txt
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxformer import config
from jaxformer.code_record import code_records, without_paths
from jaxformer.config import InputError
from jaxformer.data import Tokenizer
from jaxformer.files import locked, write_atomically
from jaxformer.training.environment import environment
from jaxformer.training.experiment import Experiment, RunConfig
from jaxformer.training.paths import AnyPath, RunFiles, check_bucket, remote_errors, to_path
from jaxformer.training.processes import broadcast_from_process_0
from jaxformer.training.registry import import_configs
from jaxformer.user_code import load_recorded, named_code

FORMAT = 2

# Fields that may differ from the saved config when a run is resumed: how long, how often, where it
# runs and what it keeps. A different number of steps stretches or shrinks a schedule that depends
# on it, from the current step on.
FREE = (
  'training.steps',
  'training.eval_every',
  'training.checkpoint_every',
  'training.log_every',
  'training.keep_latest',
  'training.keep_best',
  'training.keep_every',
  'training.trackers',
  'training.profile',
  'training.remat',
  'mesh',
  'run',
)

# What a start writes before `config.json`, or beside it: a folder with nothing else is free.
OWN = {'events.jsonl', 'checkpoints', 'tokenizer', 'environment.json'}


def run_folder(experiment: Experiment) -> AnyPath:
  """Return `run.dir`/`run.name`. Raises `InputError` for a store that cannot be used."""
  name = experiment.run.name or f'run-{config.digest(experiment)[:8]}'
  return to_path(experiment.run.dir, 'run.dir') / name


def config_text(experiment: Experiment) -> str:
  """Return the content of `config.json`."""
  return config.json_text({'format': FORMAT} | config.to_json(experiment))


def read_config(folder: str | AnyPath) -> dict[str, Any]:
  """Return the experiment of a run folder as JSON data. Raises `InputError` if there is none."""
  where, file = to_path(folder), f'{folder}/config.json'
  try:
    with remote_errors(where):
      data = json.loads((where / 'config.json').read_text())
  except FileNotFoundError:
    check_bucket(where)
    raise InputError(f'{folder}: not a run folder: there is no config.json') from None
  except OSError as e:
    raise InputError(f'{file}: cannot be read ({e.strerror})') from None
  except ValueError as e:
    raise InputError(f'{file}: not valid JSON ({e})') from None
  if not isinstance(data, dict) or data.get('type') != Experiment.tag:
    raise InputError(f'{file}: holds no experiment')
  if 'format' not in data:
    raise InputError(
      f'{folder} was written by jaxformer 0.1, whose runs this version cannot read; train anew, or '
      'install jaxformer 0.1'
    )
  if (written := data.pop('format')) != FORMAT:
    raise InputError(f'{file}: has format {written}; this version reads {FORMAT}')
  return data


def load_experiment(
  folder: str | AnyPath, code: Sequence[str | os.PathLike[str]] = ()
) -> Experiment:
  """Return the experiment of a run folder.

  Types from a user's own files are loaded from where the files were when the run was made. `code`
  names files to load instead: where they have moved or changed, or where they came with the run of
  somebody else, whose code never runs unless it is named.

  `run` says where the folder is now, so that training the experiment resumes it.

  Raises `InputError` if there is no run, or code would have to be named.
  """
  data = read_config(folder)
  where = to_path(folder)
  import_configs()
  for remark in load_recorded(data, code, where if isinstance(where, Path) else None):
    logging.getLogger('jaxformer').warning(remark)
  experiment: Experiment = config.from_json(data, f'{folder}/config.json', Experiment)
  if run_folder(experiment) != where:  # moved, or given relative to another working folder
    experiment = experiment.replace(run=RunConfig(dir=str(where.parent), name=where.name))
  return experiment


class Run:
  """A run folder that is being written. A context manager that completes it.

  Attributes:
    folder: its path.
    home: the local folder in which its files are written: `folder` itself if that is local.
    fresh: whether the run is new.
    changed: settings that differ from those with which it was started.
  """

  def __init__(self, experiment: Experiment):
    """Check the folder, without writing. Raises `InputError`, naming the fields, if the run there
    is of a different experiment."""
    self.experiment, self.folder = experiment, run_folder(experiment)
    self.writes = jax.process_index() == 0
    self._files = RunFiles(self.folder)
    self._lock = contextlib.ExitStack()
    self._started = False
    self.changed: list[str] = []
    self.fresh = broadcast_from_process_0(self._is_fresh)

  def _is_fresh(self) -> bool:
    with remote_errors(self.folder):
      fresh = not (self.folder / 'config.json').exists()
    if fresh:
      check_bucket(self.folder)
      if self.folder.exists() and {p.name for p in self.folder.iterdir()} - OWN:
        raise InputError(
          f'{self.folder} is not empty and not a run folder (it has no config.json); give another '
          '--run.name'
        )
      return True
    saved, new = read_config(self.folder), config.to_json(self.experiment)
    import_configs()
    try:  # fields that are newer than the run have their defaults
      saved = config.filled(saved, config.to_json(config.from_json(saved, str(self.folder))))
    except InputError:
      if not code_records(saved):
        raise
      # else code has changed, which the records show
    self.changed = config.differences(without_paths(saved), without_paths(new))
    shas = [{r.get('sha256') for r in code_records(data)} for data in (saved, new)]
    named = shas[1] - shas[0] <= named_code()
    fixed = [d for d in self.changed if not _free(d) and not (named and _of_code(d))]
    if fixed:
      lines = '\n  '.join(fixed)
      code = (
        ' (name changed code with --code FILE to accept it)' if any(map(_of_code, fixed)) else ''
      )
      raise InputError(
        f'{self.folder} was created by a different experiment:\n  {lines}\n'
        f'give this one another --run.name, or resume with the original settings{code}'
      )
    return False

  @property
  def home(self) -> Path:
    return self._files.home

  def check_initialization(self) -> None:
    """Raises `InputError` if the run was started from random weights: to give it others now would
    have no effect."""

    def from_random() -> bool:
      starts = [row for row in read_events(self.folder) if row.get('event') == 'start']
      return bool(starts) and starts[-1].get('init_from') is None

    if broadcast_from_process_0(from_random):
      raise InputError(
        f'--init-from: {self.folder} was started from random weights and would be resumed; '
        '--init-from has no effect: leave it out, or give another --run.name'
      )

  def start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Lock the folder and write what is known at the start; `tokenizer` is that of text. Raises
    `InputError` if the folder cannot be created, or another process trains in it."""
    broadcast_from_process_0(lambda: self._write_start(data_manifest, tokenizer))
    self._started = True

  def _write_start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> bool:
    def unusable(problem: str) -> InputError:
      directory = self.experiment.run.dir
      return InputError('run.dir', directory, problem=f'the folder {self.folder} {problem}')

    try:
      self._files.open()
      (self.home / 'checkpoints').mkdir(exist_ok=True)
      if tokenizer is not None:
        (self.home / 'tokenizer').mkdir(exist_ok=True)
    except OSError as e:
      raise unusable(f'cannot be made ({e.strerror})') from None
    if not os.access(self.home, os.W_OK):
      raise unusable('cannot be written')
    local = self.home == self.folder  # a store has no locks
    if local and not self._lock.enter_context(locked(self.home / 'events.jsonl')):
      raise InputError(f'{self.folder}: another process trains in this folder; wait until it ends')
    if tokenizer is not None:
      tokenizer.save(self.home / 'tokenizer')
    code = code_records(config.to_json(self.experiment))
    entry = environment(data_manifest) | ({'code': code} if code else {})
    file = self.home / 'environment.json'
    write_atomically(file, json.dumps([*_entries(file), entry], indent=2, default=str) + '\n')
    # last, since it makes the folder a run
    write_atomically(self.home / 'config.json', config_text(self.experiment))
    self._files.upload()
    return True

  def rewind(self, step: int) -> None:
    """Drop the metrics of later steps, which will be repeated, so that the file reads like that of
    a run that was never interrupted."""
    file = self.home / 'metrics.jsonl'
    if self.writes and file.exists():
      kept = [json.dumps(row) + '\n' for row in _rows(file) if row['step'] <= step]
      write_atomically(file, ''.join(kept))

  def metrics(self, row: dict[str, Any]) -> None:
    """Append a line to `metrics.jsonl`."""
    self._append('metrics.jsonl', json.dumps(row, default=str))

  def event(self, name: str, **facts: Any) -> None:
    """Append a line to `events.jsonl`."""
    row = {'time': round(time.time(), 3), 'event': name} | facts
    self._append('events.jsonl', json.dumps(row, default=str))

  def samples(self, step: int, text: str) -> None:
    """Append generated text to `samples.txt`."""
    self._append('samples.txt', f'==== step {step} ====\n{text}')

  def has_sample(self, step: int) -> bool:
    """Return whether `samples.txt` has the text of a step."""
    file = self.home / 'samples.txt'
    return file.exists() and f'==== step {step} ====' in file.read_text(errors='replace')

  def _append(self, name: str, line: str) -> None:
    if self.writes:
      with (self.home / name).open('a') as f:
        f.write(line + '\n')

  def sync(self) -> None:
    """Make the lines outlast this process, before a checkpoint that relies on them."""
    if self.writes:
      self._files.sync(('metrics.jsonl', 'events.jsonl'))

  def __enter__(self) -> Run:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # an error that is being raised says more
    with self._lock, contextlib.suppress(*(() if kind is None else (InputError,))):
      self._files.close(upload=self._started)


def _free(difference: str) -> bool:
  return difference.startswith(tuple(f'{path}{end}' for path in FREE for end in ('.', ':')))


def _of_code(difference: str) -> bool:
  return difference.partition(':')[0].endswith('.code')


def read_metrics(folder: str | AnyPath) -> list[dict[str, Any]]:
  """Return the rows of `metrics.jsonl`, without a last line that a crash cut short."""
  return _rows(to_path(folder) / 'metrics.jsonl')


def read_events(folder: str | AnyPath) -> list[dict[str, Any]]:
  """Return the rows of `events.jsonl`, like `read_metrics`."""
  return _rows(to_path(folder) / 'events.jsonl')


def _rows(file: AnyPath) -> list[dict[str, Any]]:
  rows = []
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def _entries(file: Path) -> list[Any]:
  """Return a JSON list, empty if the file is missing or corrupt: no reason to stop a run."""
  try:
    value = json.loads(file.read_text())
  except (OSError, ValueError):
    return []
  return value if isinstance(value, list) else []
