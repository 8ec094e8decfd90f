"""Stages of a run: which settings it was trained with from which step on, and how it goes on with
others on purpose.

`training.resume_with` names settings that a resumed run changes. What it changes is a stage, stored
in the run's `config.json` beside the experiment, which holds the settings of the latest stage. The
same command again changes nothing, so a run that is started anew after a preemption has one stage
per change.

The data go on where they were: a checkpoint holds how many steps were trained with which batch
size (`Dataset.state`)."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from jaxformer import config
from jaxformer.code_record import changed_files, without_paths
from jaxformer.config import InputError
from jaxformer.data.local_paths import located
from jaxformer.json_data import at, set_at
from jaxformer.training.experiment import Experiment, step_ranges

# Fields that may differ from the saved config whenever a run is resumed: how long, how often, where
# it runs and what it keeps. A different number of steps stretches or shrinks a schedule that
# depends on it, from the current step on; its warm-up stays that with which the run began.
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
  'training.compiler_options',
  'mesh',
  'run',
)
# They say how to go on, and are dealt with here.
_RESUMING = ('training.resume_with', 'training.skip_steps')

Changes = dict[str, list[Any]]
"""Path of a setting -> its old and its new value, as JSON data, in the order of the changes."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """Settings that changed after `step` completed updates."""

  step: int
  changed: Changes


@dataclasses.dataclass(frozen=True)
class History:
  """What `config.json` holds beside the experiment.

  Attributes:
    warmup_steps: of the schedule, as the run began with it; it stays that when the number of steps
      changes.
    stages: ascending in their steps.
    resumed_from: the latest request to go back to an earlier checkpoint; None if there was none.
    id: of the run, by which trackers know it: random, since names of runs are not unique. A new one
      is made when the run goes back to an earlier checkpoint, because services cannot take back the
      later steps.
    working_folder: to which relative paths of the experiment are relative; None if unknown.
  """

  warmup_steps: int
  stages: tuple[Stage, ...] = ()
  resumed_from: dict[str, Any] | None = None
  id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
  working_folder: str | None = None

  def json(self) -> dict[str, Any]:
    own = {
      'id': self.id,
      'warmup_steps': self.warmup_steps,
      'working_folder': self.working_folder,
      'stages': [dataclasses.asdict(s) for s in self.stages],
      'resumed_from': self.resumed_from,
    }
    return {name: value for name, value in own.items() if value is not None}

  def before(self, step: int) -> tuple[Stage, ...]:
    """Return the stages that began before a step."""
    return tuple(s for s in self.stages if s.step < step)

  def at(self, step: int, changed: Changes) -> History:
    """Return the history of a run that goes on from a step with some changes. Stages that began
    there or later become one: they were undone, because their checkpoints were corrupt."""
    merged: Changes = {}
    for stage in (*self.stages[len(self.before(step)) :], Stage(step, changed)):
      for path, (old, new) in stage.changed.items():
        merged[path] = [merged.pop(path, [old])[0], new]
    merged = {path: ends for path, ends in merged.items() if ends[0] != ends[1]}
    new = (Stage(step, merged),) if merged else ()
    return dataclasses.replace(self, stages=self.before(step) + new)


def split_history(data: dict[str, Any], where: str) -> tuple[dict[str, Any], History | None]:
  """Return the experiment and the history of a `config.json`; None as history of a run that has
  none. Raises `InputError`."""
  names = [f.name for f in dataclasses.fields(History)]
  own = {name: data[name] for name in names if name in data}
  experiment = {name: value for name, value in data.items() if name not in own}
  if 'warmup_steps' not in own:
    return experiment, None
  try:
    stages = tuple(Stage(int(s['step']), dict(s['changed'])) for s in own.get('stages', ()))
    optional = ('resumed_from', 'id', 'working_folder')  # folders of earlier versions lack some
    more = {name: own[name] for name in optional if name in own}
    return experiment, History(int(own['warmup_steps']), stages, **more)
  except (TypeError, ValueError, KeyError) as e:
    raise InputError(f'{where}: its stages cannot be read ({type(e).__name__}: {e})') from None


def undone(saved: dict[str, Any], history: History, step: int) -> dict[str, Any]:
  """Return the settings of a run as JSON data before those of its stages that began at a step or
  later."""
  found = json.loads(json.dumps(saved))
  for stage in reversed(history.stages[len(history.before(step)) :]):
    for path, (old, _) in reversed(stage.changed.items()):
      set_at(found, path, old)
  return found


# ---- what differs from the saved settings ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Differing:
  """How an experiment differs from the settings of a run.

  Attributes:
    free: settings that may always differ, in words.
    stage: settings that the experiment changes on purpose.
    code: records of the user's code whose content differs.
    fixed: settings that may not differ, in words with the reason.
    unnamed: settings that `training.resume_with` could name, but does not.
  """

  free: list[str]
  stage: Changes
  code: Changes
  fixed: list[str]
  unnamed: Changes


def compare(
  saved: dict[str, Any], history: History, experiment: Experiment, folder: str | None, where: str
) -> Differing:
  """Compare an experiment, whose `training.resume_with` is applied, with the settings of a run.

  Args:
    folder: to which relative paths of the experiment are relative.
    where: names the run in errors.

  Raises `InputError` for a `resume_with` that does not apply to the settings.
  """
  named: Changes = {}
  if given := experiment.training.resume_with:
    old: Experiment = config.from_json(saved, where, Experiment)
    wanted = config.to_json(old.with_changes(given))
    named = {path: [a, b] for path, a, b in config.changes(saved, wanted)}
  new = config.to_json(experiment)
  was, now = located(saved['data'], history.working_folder), located(new['data'], folder)
  elsewhere = {path for path, _, _ in config.changes(was, now, 'data')}
  free, stage, code, fixed, unnamed = [], Changes(), Changes(), [], Changes()
  for path in named:
    if _under(path, FREE):
      raise InputError(
        'training.resume_with', path, problem=f'may always differ: give --{path} itself'
      )
  for path, a, b in config.changes(without_paths(saved), without_paths(new)):
    words = config.difference(path, a, b)
    if _under(path, _RESUMING) or (_under(path, ('data',)) and path not in elsewhere):
      continue
    if _under(path, FREE):
      free.append(words)
    elif path.endswith('.code'):
      code[path] = [at(saved, path), at(new, path)]
    elif (reason := _reason(path)) is not None:
      fixed.append(f'{words} ({reason})')
    elif path in named and without_paths(named[path][1]) == b:
      stage[path] = named[path]
    else:
      unnamed[path] = [a, b]
  return Differing(free, stage, code, fixed, unnamed)


def _under(path: str, fields: Sequence[str]) -> bool:
  return any(path == f or path.startswith(f'{f}.') for f in fields)


def _reason(path: str) -> str | None:
  """Return why a setting must stay what it was, or None."""
  if _under(path, ('model',)) and not path.endswith('dropout'):
    return 'the parameters belong to the model; --init-from starts a new run from them'
  if path == 'training.seed':
    return 'the order of the data depends on it: rows would be repeated or left out'
  if path == 'optimizer':
    return 'its state belongs to its type; --init-from starts a new run from the parameters'
  return None


def in_words(changes: Mapping[str, list[Any]]) -> list[str]:
  """Return a line per changed setting, and per changed file of code."""
  lines = (
    [f'code: {c.line}' for c in changed_files(old, new)]
    if path.endswith('.code')
    else [config.difference(path, old, new)]
    for path, (old, new) in changes.items()
  )
  return list(dict.fromkeys(line for own in lines for line in own))


def as_option(changes: Changes) -> str:
  """Return the option that makes these changes on purpose."""
  words = [w for path, (_, new) in changes.items() for w in _assignments(path, new)]
  text = json.dumps(words) if any(',' in w for w in words) else ','.join(words)
  quoted = f"'{text}'" if any(c in text for c in ' "[') else text
  return f'--training.resume-with {quoted}'


def _assignments(path: str, value: Any) -> list[str]:
  """Return `path=text` of a setting; of a config its type, and the fields that are no default."""
  name = path.replace('_', '-')
  if not isinstance(value, dict):
    plain = {None: 'none', True: 'true', False: 'false'}
    text = plain[value] if value is None or isinstance(value, bool) else value
    return [f'{name}={text if isinstance(text, str) else json.dumps(text)}']
  cls = config.find_type(value['type'], config.Config)
  fields = {n: v for n, v in value.items() if n not in ('type', 'code')}
  changed = {n: v for n, v in fields.items() if cls is None or v != _default(cls, n)}
  more = [w for n, v in changed.items() for w in _assignments(f'{path}.{n}', v)]
  return [f'{name}={value["type"]}', *more]


def _default(cls: type[config.Config], name: str) -> Any:
  return config.to_json(config.field_default(cls, name))


# ---- skipped steps -----------------------------------------------------------------------------


def skipped(saved: Sequence[str], wanted: Sequence[str], step: int) -> list[range]:
  """Return the steps to skip in a run that goes on after `step` completed steps: those that it has
  skipped or was to skip, and those that are wanted. Raises `InputError` for steps that were
  taken."""
  recorded = step_ranges(saved)
  for r in step_ranges(wanted):
    taken = [s for s in r if s <= step and not any(s in old for old in recorded)]
    if taken:
      raise InputError(
        'training.skip_steps',
        f'{r.start}:{r.stop}',
        problem=f'the run resumes after step {step}, and has taken step {taken[-1]}; must start at '
        f'{step + 1} or later, or --resume-from an earlier checkpoint',
      )
  joined: list[range] = []
  for r in sorted([*recorded, *step_ranges(wanted)], key=lambda r: r.start):
    if joined and r.start <= joined[-1].stop:
      joined[-1] = range(joined[-1].start, max(joined[-1].stop, r.stop))
    else:
      joined.append(r)
  return joined
