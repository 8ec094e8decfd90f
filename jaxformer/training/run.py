"""The folder of a run. Only process 0 writes. It may be in a bucket (see `paths`).

runs/<name>/config.json         the experiment with its latest settings, the `format` of the folder,
                                and the history of the run (`stages.History`)
            environment.json    versions, devices, commit, command, data and code; an entry per
                                start with what differs from the one before (see `environment`)
            metrics.jsonl       one object per line: `step` and numbers
            events.jsonl        one object per line: what happened when
            checkpoints/<step>/
            tokenizer/          as read by `jaxformer.data.load_tokenizer`
            tensorboard/  samples.txt
            undone/<n>/         checkpoints and metrics after a step that the run went back to
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxformer import config
from jaxformer.code_record import Record, changed_files, code_records, without_paths
from jaxformer.config import InputError
from jaxformer.data import Tokenizer
from jaxformer.data.local_paths import located
from jaxformer.exit_codes import Failure
from jaxformer.files import (
  append,
  end_line,
  is_of_storage,
  regular_file,
  user_path,
  write_atomically,
  write_error,
  writing,
)
from jaxformer.json_data import parse_json
from jaxformer.training import lock
from jaxformer.training.checkpoint import canonical, steps_in
from jaxformer.training.environment import (
  compilation,
  environment,
  read_entries,
  software,
  with_start,
)
from jaxformer.training.experiment import Experiment, RunConfig, TrainingConfig, step_ranges
from jaxformer.training.lock import FolderLock, LostLock
from jaxformer.training.paths import AnyPath, RunFiles, check_bucket, move, remote_errors, to_path
from jaxformer.training.processes import broadcast_from_process_0, check_equal
from jaxformer.training.registry import import_configs
from jaxformer.training.rows import read_metrics, started_from
from jaxformer.training.schedule import ScheduleConfig
from jaxformer.training.stages import (
  Changes,
  Differing,
  History,
  as_option,
  compare,
  in_words,
  skipped,
  split_history,
  undone,
)
from jaxformer.user_code import load_recorded, named_code

FORMAT = 2

# What a start writes before `config.json`, or beside it: a folder with nothing else is free.
OWN = {'events.jsonl', 'checkpoints', 'tokenizer', 'environment.json', lock.FILE}
FILES = ('config.json', 'environment.json', 'metrics.jsonl', 'events.jsonl', 'samples.txt')
FOLDERS = ('checkpoints', 'tokenizer', 'undone')


def run_folder(experiment: Experiment) -> AnyPath:
  """Return `run.dir`/`run.name`. Raises `InputError` for a store that cannot be used."""
  t = experiment.training.replace(resume_with=(), skip_steps=())  # they say how to go on in it
  name = experiment.run.name or f'run-{config.digest(experiment.replace(training=t))[:8]}'
  folder = to_path(experiment.run.dir, 'run.dir') / name
  return user_path(folder, 'run.name') if isinstance(folder, Path) else folder


def config_text(experiment: Experiment, history: History) -> str:
  """Return the content of `config.json`."""
  plain = experiment.replace(training=experiment.training.replace(resume_with=()))
  return config.json_text({'format': FORMAT} | config.to_json(plain) | history.json())


def is_of(folder: AnyPath, experiment: Experiment) -> bool:
  """Return whether a folder has a run of an experiment that was trained with its settings from the
  beginning."""
  try:
    data, history = _read(folder)
  except InputError:
    return False
  same = without_paths(data) == without_paths(config.to_json(experiment))
  return same and not (history and history.stages)


def _read(folder: str | AnyPath) -> tuple[dict[str, Any], History | None]:
  """Return the experiment of a run folder as JSON data, with the settings of its latest stage, and
  its history. Raises `InputError` if there is none."""
  where, file = to_path(folder), f'{folder}/config.json'
  try:
    with remote_errors(where):
      data = parse_json(regular_file(where / 'config.json').read_text())
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
  return split_history(data, file)


def load_experiment(
  folder: str | AnyPath, code: Sequence[str | os.PathLike[str]] = ()
) -> Experiment:
  """Return the experiment of a run folder.

  Types from a user's own files are loaded from where the files were when the run was made. `code`
  names files to load instead: where they have moved or changed, or where they came with the run of
  somebody else, whose code never runs unless it is named.

  Paths of its data are absolute where they name something, as relative to the folder in which the
  run was started; `run` says where the run folder is now, so that training the experiment resumes
  it.

  Raises `InputError` if there is no run, or code would have to be named.
  """
  data, history = _read(folder)
  where = to_path(folder)
  if history is not None:
    data['data'] = located(data['data'], history.working_folder)
  import_configs()
  for remark in load_recorded(data, code, where if isinstance(where, Path) else None):
    logging.getLogger('jaxformer').warning(remark)
  experiment: Experiment = config.from_json(data, f'{folder}/config.json', Experiment)
  if run_folder(experiment) != where:  # moved, or given relative to another working folder
    experiment = experiment.replace(run=RunConfig(dir=str(where.parent), name=where.name))
  return experiment


class Run:
  """A run folder that is being written. A context manager that completes it.

  It is used in this order: `lock`, then `resume_at` with what was restored, then `start`. Nothing
  in the folder of an earlier run changes before `start`.

  Attributes:
    experiment: with the changes of its `training.resume_with`, and the steps that the run skips.
    folder: its path.
    home: the local folder in which its files are written: `folder` itself if that is local.
    fresh: whether the run is new.
    changed: settings that differ from those with which it last ran, in words.
    back_to: the step of the checkpoint to go back to; None for the latest.
  """

  def __init__(
    self, experiment: Experiment, resume_from: int | None = None, init_from: str | None = None
  ):
    """Check the folder, without writing.

    Args:
      experiment: what is to be trained there.
      resume_from: the step of the checkpoint to go back to.
      init_from: the name of the parameters that the run starts from (`setup.Initial`).

    Raises `InputError`, naming the fields, if the run there is of a different experiment, has no
    checkpoint of the step `resume_from`, or was started from other parameters; and if other
    processes of this one's group would train something else.
    """
    self.experiment, self.folder = experiment.resumed, run_folder(experiment)
    self._init_from = init_from
    settings = without_paths(config.to_json(experiment))
    del settings['run'], settings['data']  # compared by what they stand for
    check_equal(
      {
        'run folder': str(self.folder),
        **settings,
        'resume_from': resume_from,
        'init_from': init_from,
        **software(),
        **compilation(),
      }
    )
    self.writes = jax.process_index() == 0
    self._files = RunFiles(self.folder)
    self._lock: FolderLock | None = None
    self._found: os.stat_result | None = None  # the folder before it was locked
    self._started = False
    self._made: list[Path] = []  # what `lock` created, innermost first
    self._request: dict[str, Any] = {
      'step': resume_from,
      'resume_with': sorted(experiment.training.resume_with),
      'skip_steps': sorted(experiment.training.skip_steps),
    }
    found = broadcast_from_process_0(self._look)
    self.fresh, self.back_to = found['fresh'], found['back_to']
    self._stage: Changes = found['stage']
    self.changed = found['free'] + in_words(self._stage)
    _, history = split_history(found['history'], f'{self.folder}/config.json')
    assert history is not None
    self.history, self._skipped = history, found['skipped']

  def _look(self) -> dict[str, Any]:
    """Return what the folder says about how to go on, as JSON data."""
    t, step = self.experiment.training, self._request['step']
    for tracker in t.trackers:
      tracker.check()
    self._check_parts()
    if self._is_fresh():
      for name, value in (('training.resume_with', t.resume_with), ('--resume-from', step)):
        if value:
          problem = f'{self.folder} is a new run, which has nothing to go on from'
          raise InputError(name, value, problem=problem)
      warmup_steps = self.experiment.schedule.warmup_steps(t.steps)
      history = History(warmup_steps, working_folder=_working_folder())
      found = {'fresh': True, 'back_to': None, 'free': [], 'stage': {}, 'skipped': []}
      return found | {'history': history.json()}
    self._check_initialization()
    saved, history = self._saved()
    skipped, back = saved['training']['skip_steps'], step is not None
    if back and history.resumed_from == self._request:
      back = False  # the same command again, after a preemption
    if back:
      steps = steps_in(self.folder / 'checkpoints')
      if step not in steps:
        kept = ', '.join(map(str, steps)) or 'there is none'
        raise InputError('--resume-from', step, f'the step of a checkpoint: {kept}')
      saved = undone(saved, history, step)
      skipped = [
        f'{r.start}:{min(r.stop, step + 1)}' for r in step_ranges(skipped) if r.start <= step
      ]
      history = History(history.warmup_steps, history.before(step), self._request)  # a new id
    here = _working_folder()
    d = compare(saved, history, self.experiment, here, str(self.folder))
    self._check(d, history)
    history = dataclasses.replace(history, working_folder=here)
    found = {
      'fresh': False,
      'back_to': step if back else None,
      'free': d.free,
      'stage': d.stage | d.code,
    }
    return found | {'skipped': skipped, 'history': history.json()}

  def _check_parts(self) -> None:
    """Raises `InputError` for a part of a run that is no folder, or no file, as it should be."""
    if not isinstance(self.folder, Path):
      return
    files = [self.folder / name for name in (*FILES, lock.FILE)]
    folders = [self.folder, *(self.folder / name for name in FOLDERS)]
    if folders[1].is_dir():
      folders += [p for p in folders[1].iterdir() if config.whole(p.name) is not None]
    for paths, fits, kind in ((folders, os.path.isdir, 'folder'), (files, os.path.isfile, 'file')):
      for path in paths:
        if os.path.lexists(path) and not fits(path):
          raise InputError(
            f'{path}: must be a {kind}, as in every run; move it away, or give another --run.name'
          )
        needed = os.R_OK | os.W_OK | (os.X_OK if kind == 'folder' else 0)
        if os.path.lexists(path) and not os.access(path, needed):
          raise InputError(f'{path}: permission denied; must be a {kind} to read and to write')

  def _is_fresh(self) -> bool:
    with remote_errors(self.folder):
      fresh = not (self.folder / 'config.json').exists()
    if fresh:
      check_bucket(self.folder)
      # names with a dot: files that were being replaced when a process was killed
      found = self.folder.iterdir() if self.folder.exists() else ()
      if {p.name for p in found if not p.name.startswith('.')} - OWN:
        raise InputError(
          f'{self.folder} is not empty and not a run folder (it has no config.json); give another '
          '--run.name'
        )
    return fresh

  def _check_initialization(self) -> None:
    """Raises `InputError` if the run was started from other parameters than it is given now, which
    would have no effect."""
    given, began = self._init_from, started_from(self.folder, self._init_from)
    if given is not None and (began is None or canonical(given) != canonical(began)):
      problem = (
        f'{self.folder} was started from {began or "random weights"} and would be resumed; leave '
        'the option out, or give another --run.name'
      )
      raise InputError('--init-from', given, problem=problem)

  def _saved(self) -> tuple[dict[str, Any], History]:
    """Return the settings of the run, complete, and its history."""
    saved, history = _read(self.folder)
    import_configs()
    try:  # fields that are newer than the run have their defaults
      saved = config.filled(saved, config.to_json(config.from_json(saved, str(self.folder))))
    except InputError:
      if not code_records(saved):
        raise
      # else code has changed, which the records show
      defaults = config.to_json(TrainingConfig())
      saved['training'] = defaults | saved['training']
    if history is None:  # a run of an earlier version
      schedule = self.experiment.schedule.replace(warmup=saved['schedule'].get('warmup'))
      history = History(schedule.warmup_steps(saved['training']['steps']))
    return saved, history

  def _check(self, d: Differing, history: History) -> None:
    """Raises `InputError` for settings that differ and may not, or not without a word."""
    named = named_code()
    code = {path: pair for path, pair in d.code.items() if not _is_named(*pair, named)}
    fixed = [*in_words(code), *d.fixed]
    if not fixed and not d.unnamed:
      return
    lines = '\n  '.join([*in_words(d.unnamed), *fixed])
    settings = [
      kind for kind, differ in (('settings', d.unnamed or d.fixed), ('code', code)) if differ
    ]
    ways = [
      'give this one another --run.name',
      f'resume with the original {" and ".join(settings)}',
    ]
    since = [s for s in history.stages if set(s.changed) & set(d.unnamed)]
    if since:
      ways[1] = (
        f'resume with {as_option({p: [b, a] for p, (a, b) in d.unnamed.items()})}, as since step '
        f'{since[-1].step}'
      )
    elif d.unnamed and not fixed:
      steps = steps_in(self.folder / 'checkpoints')
      ways.append(
        f'resume with {as_option(d.unnamed)} to go on with the new ones from step '
        f'{self._request["step"] or (steps[-1] if steps else 0)}'
      )
    if code and not d.fixed:
      ways.append('name changed code with --code FILE, to go on with it and record the change')
    raise InputError(
      f'{self.folder} was created by a different experiment:\n  {lines}\n'
      f'{", ".join(ways[:-1])}, or {ways[-1]}'
    )

  @property
  def schedule(self) -> ScheduleConfig:
    """The schedule, with the warm-up that the run began with if it names none."""
    schedule = self.experiment.schedule
    if schedule.warmup is not None:
      return schedule
    return schedule.replace(warmup=self.history.warmup_steps)

  @property
  def skips(self) -> list[range]:
    """The steps that are not taken, counted from 1."""
    return step_ranges(self.experiment.training.skip_steps)

  @property
  def name(self) -> str:
    """The name of the run, with the folders that it names."""
    return self.experiment.run.name or self.folder.name

  @property
  def home(self) -> Path:
    return self._files.home

  def lock(self, log: Callable[[str], None] = lambda line: None) -> None:
    """Create or download the folder, and lock it until the end of the block. Raises `InputError` if
    that is impossible, or another process trains in it."""
    broadcast_from_process_0(lambda: self._open(log))

  def _open(self, log: Callable[[str], None]) -> None:
    if isinstance(self.folder, Path):
      made = [self.home / 'events.jsonl', self.home, *self.home.parents]
      self._made = [p for p in made if not os.path.lexists(p)]
    try:
      if isinstance(self.folder, Path) and self.folder.exists():
        self._found = self.folder.stat()
      self._files.open()
    except OSError as e:
      if is_of_storage(e):
        raise write_error(self.folder, e) from None
      raise self._unusable(f'cannot be made ({e.strerror})') from None
    if not os.access(self.home, os.W_OK):
      raise self._unusable('cannot be written')
    held = FolderLock(self.folder, log)
    held.acquire()
    self._lock = held

  def _unusable(self, problem: str) -> InputError:
    directory = self.experiment.run.dir
    return InputError('run.dir', directory, problem=f'the folder {self.folder} {problem}')

  def resume_at(self, step: int) -> None:
    """Take note of the step from which the run goes on: its stages, and the steps that it skips.
    Raises `InputError` for fewer steps in all, or a step to skip that was taken; writes
    nothing."""
    t = self.experiment.training
    if step > t.steps:
      raise InputError(
        'training.steps',
        t.steps,
        problem=f'the run resumes after step {step}; must be at least that, or --resume-from an '
        'earlier checkpoint',
      )
    found = [f'{r.start}:{r.stop}' for r in skipped(self._skipped, t.skip_steps, step)]
    self.experiment = self.experiment.replace(training=t.replace(skip_steps=tuple(found)))
    self._step, self._before = step, self.history.stages
    self.history = self.history.at(step, self._stage)

  def start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Write what is known at the start, and move aside what a return to an earlier step undoes;
    `tokenizer` is that of text."""
    broadcast_from_process_0(lambda: self._write_start(data_manifest, tokenizer))
    self._started = True

  def _write_start(self, data_manifest: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    with writing(self.home):
      for name in ('events.jsonl', 'samples.txt'):
        end_line(self.home / name)
    if self.back_to is not None:
      self._go_back(self.back_to)
    code = code_records(config.to_json(self.experiment))
    start = {'step': self._step} | environment(data_manifest) | ({'code': code} if code else {})
    with writing(self.home):
      (self.home / 'checkpoints').mkdir(exist_ok=True)
      if tokenizer is not None:
        (self.home / 'tokenizer').mkdir(exist_ok=True)
        tokenizer.save(self.home / 'tokenizer')
      file = self.home / 'environment.json'
      write_atomically(file, json.dumps(with_start(read_entries(file), start), indent=2) + '\n')
      # last, since it makes the folder a run
      write_atomically(self.home / 'config.json', config_text(self.experiment, self.history))
    for stage in self.history.stages:
      if stage not in self._before:
        self.event('stage', **dataclasses.asdict(stage))
    self._files.upload()

  def _go_back(self, step: int) -> None:
    """Move the checkpoints and the metrics of later steps to `undone/N`."""
    with remote_errors(self.folder), writing(self.home):
      others = self.folder / 'undone'
      names = [p.name for p in (others.iterdir() if others.exists() else ())]
      n = 1 + max((n for name in names if (n := config.whole(name)) is not None), default=0)
      later = [s for s in steps_in(self.folder / 'checkpoints') if s > step]
      rows = [r for r in read_metrics(self.home) if r['step'] > step]
      aside = self.home / 'undone' / str(n)
      (aside / 'checkpoints').mkdir(parents=True)
      write_atomically(aside / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in rows))
      write_atomically(aside / 'config.json', (self.home / 'config.json').read_bytes())
      for s in later:
        move(self.folder / 'checkpoints' / str(s), others / str(n) / 'checkpoints' / str(s))
    self.event('resume_from', step=step, undone=f'undone/{n}', checkpoints=later, rows=len(rows))

  def rewind(self, step: int) -> None:
    """Drop the metrics of later steps, which will be repeated, so that the file reads like that of
    a run that was never interrupted."""
    file = self.home / 'metrics.jsonl'
    if self.writes and file.exists():
      kept = [json.dumps(row) + '\n' for row in read_metrics(self.home) if row['step'] <= step]
      with writing(file):
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
    if self._lock is not None and self._lock.lost:
      self._lock.check()
    if self.writes:
      with writing(self.home):
        append(self.home / name, line + '\n')

  def sync(self) -> None:
    """Make the lines outlast this process, before a checkpoint that relies on them."""
    if self._lock is not None:
      self._lock.check()
    if self.writes:
      self._files.sync(('metrics.jsonl', 'events.jsonl'))

  def __enter__(self) -> Run:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    lost = kind is not None and issubclass(kind, LostLock)
    try:
      # an error that is being raised says more
      with contextlib.suppress(*(() if kind is None else (InputError, Failure))):
        self._files.close(upload=self._started and not lost)
    finally:
      made = [] if self._started else self._made
      # the file under the lock, since another process locks it
      for path in (p for p in made if self._lock is not None and p.is_file()):
        with contextlib.suppress(OSError):
          if not path.stat().st_size:
            path.unlink()
      if self._lock is not None:
        self._lock.release()
      for path in made:
        with contextlib.suppress(OSError):  # it is not empty
          path.rmdir()
      if self._found is not None and not self._started:  # the lock came and went
        with contextlib.suppress(OSError):
          os.utime(self.folder, ns=(self._found.st_atime_ns, self._found.st_mtime_ns))


def _working_folder() -> str | None:
  try:
    return os.getcwd()
  except OSError:  # it was removed
    return None


def _is_named(old: Record | None, new: Record | None, named: set[str]) -> bool:
  """Whether all files in which two records of code differ are among the named ones, by hash; a file
  that has no part in the code any more, where the file of the type is."""
  own = (new or {}).get('sha256')
  return all((c.new or own) in named for c in changed_files(old, new))
