"""Checkpoints: saved in the background, verified when loaded. The only module that uses Orbax.

A checkpoint is a folder `<step>/` with three parts: `params` and `optimizer` (arrays by name,
written by all processes) and `meta` (JSON: step, random key, position in the data, digest of the
config, and a digest of every array). Storage formats do not detect a flipped bit in array data, so
every array is hashed before it is saved and after it is loaded. The hash does not depend on the
sharding, so a checkpoint may be loaded on any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.utils import is_checkpoint_finalized

from jaxformer.config import InputError, first_lines, whole
from jaxformer.exit_codes import Failure
from jaxformer.files import os_error, regular_file, writing
from jaxformer.json_data import parse_json
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import MeshConfig, Parallel, make_parallel
from jaxformer.training.digests import digests, first_names
from jaxformer.training.paths import AnyPath, discard, move, remote_errors, remove, to_path
from jaxformer.training.step import TrainState

VERSION = 2  # 1 is that of jaxformer 0.1
Log = Callable[[str], None]


class SaveError(Failure):
  """A checkpoint could not be written."""


class NotFinite(Exception):
  """A state with numbers that are not finite, which is not saved."""


class Corrupt(Exception):
  """A checkpoint whose parts are missing, unreadable, or not what was saved."""


def named(tree: Any) -> dict[str, Any]:
  """Return the leaves of a tree by their paths."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def _by_path(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  return {f'{part}/{name}': x for part, tree in parts.items() for name, x in tree.items()}


def _arrays(state: TrainState) -> dict[str, dict[str, Any]]:
  return {'params': dict(state.params), 'optimizer': named(state.opt_state)}


def _seal(meta: dict[str, Any]) -> dict[str, Any]:
  body = {k: v for k, v in meta.items() if k != 'seal'}
  return body | {'seal': hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


# ---- loading -----------------------------------------------------------------------------------


def steps_in(folder: AnyPath) -> list[int]:
  """Return the steps that have a complete checkpoint, ascending. Interrupted saves have another
  name, or in a store no mark of completion."""
  found = folder.iterdir() if folder.is_dir() else ()
  steps = (
    p for p in found if whole(p.name) is not None and p.is_dir() and is_checkpoint_finalized(p)
  )
  return sorted(int(p.name) for p in steps)


def _read_meta(path: AnyPath) -> dict[str, Any]:
  try:
    meta = parse_json(regular_file(path / 'meta' / 'data.json').read_text())
    intact = meta['seal'] == _seal(meta)['seal']
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise Corrupt(f'its metadata cannot be read ({type(e).__name__}: {e})') from None
  if not intact:
    raise Corrupt('its metadata were changed')
  if meta['version'] != VERSION:
    raise InputError(f'{path}: has format {meta["version"]}; this version reads {VERSION}')
  if path.name.isdigit() and int(path.name) != meta['step']:
    raise Corrupt(f'it is that of step {meta["step"]}')
  return meta


def check_shapes(
  saved: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], what: str
) -> None:
  """Raises `InputError` with a line for every name whose shape differs, or that only one side
  has."""
  lines = [
    f'{name}: {tuple(saved[name])} found, the model has {tuple(shape)}'
    for name, shape in wanted.items()
    if name in saved and tuple(saved[name]) != tuple(shape)
  ]
  lines += [f'{name}: not found' for name in wanted if name not in saved]
  lines += [f'{name}: found, but not in the model' for name in saved if name not in wanted]
  if lines:
    raise InputError(f'{what} do not fit this model or optimizer:\n  {first_lines(lines)}')


def _read(
  path: AnyPath, meta: dict[str, Any], abstract: dict[str, dict[str, Any]], finite: bool = False
) -> dict[str, dict[str, Array]]:
  """Return the arrays of the requested parts, verified. Raises `Corrupt`, if they are to be
  `finite` also for numbers that are not, or `InputError` for those of another model."""
  for part, tree in abstract.items():
    start = f'{part}/'
    saved = {n.removeprefix(start): s for n, s in meta['shapes'].items() if n.startswith(start)}
    check_shapes(saved, {n: a.shape for n, a in tree.items()}, f'{path}: the {part}')
  problem = ''
  with _quiet():
    try:
      loaded = ocp.load_checkpointables(str(path), abstract)
    except Exception as e:  # the type of error is unknown in advance
      problem = f'it cannot be read ({type(e).__name__}: {_first_line(e)})'
    if problem:
      gc.collect()  # its other tasks log their errors when they are collected
      raise Corrupt(problem)
  found, not_finite = digests(_by_path(loaded))
  wrong = [name for name, d in found.items() if d != meta['digests'].get(name)]
  if wrong:
    raise Corrupt(
      f'{len(wrong)} of {len(found)} arrays are not what was saved: {first_names(wrong)}'
    )
  if finite and not_finite:
    raise Corrupt(not_finite)
  return loaded


def _together(read: Callable[[], Any]) -> Any:
  """Return `read()`; raise `Corrupt` on all processes if one of them does, so that all fall back
  together."""
  problem, value = '', None
  try:
    value = read()
  except Corrupt as e:
    problem = str(e)
  if jax.process_count() > 1:
    bad = multihost_utils.process_allgather(np.array(bool(problem)))
    problem = problem or ('another process could not read it' if bad.any() else '')
  if problem:
    raise Corrupt(problem)
  return value


def find(path: str | AnyPath) -> AnyPath:
  """Return the checkpoint that a path names: a checkpoint folder, the latest of a run folder or its
  `checkpoints/`, or that of a step with `@STEP`. Raises `InputError`."""
  base, at, step = str(path).partition('@')
  folder = to_path(base)
  with remote_errors(folder):
    if (folder / 'meta').is_dir() and not at:
      return folder
    home = folder / 'checkpoints' if (folder / 'checkpoints').is_dir() else folder
    steps = steps_in(home)
  if not steps:
    raise InputError(
      f'{path}: no checkpoint there; must be a run folder, or runs/NAME/checkpoints/STEP'
    )
  if at and (whole(step) not in steps):
    raise InputError(
      f'{path}: no checkpoint of step {step!r}; there are {", ".join(map(str, steps))}'
    )
  return home / str(whole(step) if at else steps[-1])


def canonical(name: str) -> str:
  """Return one spelling of a path that `find` accepts: links are followed, and a folder of a
  checkpoint is RUN@STEP."""
  base, at, step = name.partition('@')
  folder = to_path(base)
  if isinstance(folder, Path):
    folder = folder.resolve()
  if not at and folder.parent.name == 'checkpoints' and whole(folder.name) is not None:
    folder, at, step = folder.parent.parent, '@', folder.name
  return f'{folder}{at}{step if whole(step) is None else whole(step)}'


class Loaded(NamedTuple):
  """The parameters of a checkpoint.

  Attributes:
    step: of the checkpoint.
    data: what it stores about its data (`Dataset.state`).
  """

  params: Params
  step: int
  data: dict[str, Any]


def load_params(
  path: str | AnyPath, definition: Definition, parallel: Parallel | None = None
) -> Loaded:
  """Return the parameters of a checkpoint, with its step and position in the data.

  Args:
    path: see `find`.
    definition: the model, whose names and shapes must match.
    parallel: mesh and rules for the parameters; None for one device, or under several processes
      for all devices, replicated.

  Raises `InputError` for a path without a checkpoint, that of another model, or a corrupt one.
  """
  where = find(path)
  if parallel is None:  # the first device belongs to one process only
    parallel = make_parallel(MeshConfig(), None if jax.process_count() > 1 else jax.devices()[:1])
  abstract = definition.abstract(parallel)

  def read() -> Loaded:
    meta = _read_meta(where)
    params = _read(where, meta, {'params': abstract})['params']
    return Loaded(params, meta['step'], meta['data'])

  try:
    return _together(read)
  except Corrupt as e:
    others = [s for s in steps_in(where.parent) if str(s) != where.name]
    advice = f'; other steps: {", ".join(map(str, others))} (name one with @STEP)' if others else ''
    raise InputError(f'{where}: corrupt: {e}{advice}') from None


# ---- a run's checkpoints -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that was read.

  Attributes:
    state: on the requested mesh.
    data: the position in the data (`Dataset.state`).
    tokens: target tokens seen, padding included; None in a checkpoint that does not say.
    corrupt: (step, problem) of each later checkpoint, which was passed over.
  """

  state: TrainState
  data: dict[str, Any]
  tokens: int | None
  corrupt: list[tuple[int, str]]


class Checkpoints:
  """The checkpoints of a run, saved in the background one at a time. A context manager.

  Those to keep are chosen when the next one is saved, and at the end: by then the latest has been
  evaluated, which takes place after its save has begun.

  Attributes:
    losses: `eval/loss` by step, by which the best are chosen; the user of the object fills it.
  """

  def __init__(
    self, folder: AnyPath, keep_latest: int, keep_best: int, keep_every: int | None, log: Log
  ):
    self.folder, self.log = to_path(folder), log
    self.losses: dict[int, float] = {}
    self._latest, self._best, self._every = keep_latest, keep_best, keep_every
    self._pending: tuple[int, Any] | None = None
    self._failed: str | None = None
    self._context = ocp.Context()
    registry = ocp.handlers.local_registry()  # by default a dictionary of numbers is read as arrays
    registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')
    self._context.checkpointables.registry = registry

  def _clean(self, pattern: str) -> None:
    """Remove what an incomplete save or removal has left."""
    if jax.process_index() == 0:
      with writing(self.folder):
        for part in self.folder.glob(pattern):
          remove(part)

  def _prune(self) -> None:
    """Remove all checkpoints but the latest, the best, and those at multiples of `keep_every`."""
    steps = steps_in(self.folder)
    scored = sorted((s for s in steps if s in self.losses), key=lambda s: (self.losses[s], -s))
    kept = {*steps[-self._latest :], *scored[: self._best]}
    if self._every is not None:
      kept |= {s for s in steps if s % self._every == 0}
    self._remove([s for s in steps if s not in kept])

  def _remove(self, steps: Sequence[int]) -> None:
    if jax.process_index() == 0:
      with writing(self.folder):
        for step in steps:
          discard(self.folder / str(step))

  def discard(self, step: int) -> None:
    """Remove the checkpoint of a step, if there is one."""
    self.wait()
    self._remove([s for s in steps_in(self.folder) if s == step])
    _barrier('checkpoint removed')

  def save(self, state: TrainState, record: dict[str, Any]) -> None:
    """Finish the previous save, then start to write the state and a record, JSON data with `data`,
    `tokens` (see `Restored`) and the digest of the `config`; return as soon as the state may be
    donated.

    A failure is reported, and the next save is tried; the second failure in a row raises
    `SaveError`. Raises `NotFinite`, and writes nothing, for a state that is not finite."""
    self.wait()
    step, arrays = int(state.step), _arrays(state)
    by_path = _by_path(arrays)
    found, not_finite = digests(by_path)
    if not_finite:
      raise NotFinite(not_finite)
    if self._failed:  # what its threads have written since
      self._clean('*.orbax-checkpoint-tmp*')
    self._prune()
    meta = _seal(
      {
        'version': VERSION,
        'step': step,
        'shapes': {name: list(x.shape) for name, x in by_path.items()},
        'digests': found,
        'key': np.asarray(jax.random.key_data(state.key)).tolist(),
        **record,
      }
    )
    _silence_threads()
    try:
      with _quiet(), self._context:
        response = ocp.save_checkpointables_async(
          str(self.folder / str(step)),
          {**arrays, 'meta': meta},
          overwrite=step in steps_in(self.folder),
        )
    except Exception as e:
      self._failure(step, e)
    else:
      self._pending = (step, response)

  def wait(self, final: bool = False) -> None:
    """Wait until nothing is being written. Raises `SaveError` for the second failure in a row, or
    for any failure if `final`."""
    if self._pending is not None:
      step, response = self._pending
      self._pending = None
      try:
        with _quiet():
          response.result()
      except Exception as e:
        self._failure(step, e)
      else:
        self._failed = None
    if final and self._failed:
      raise SaveError(self._failed)
    if final:
      self._prune()

  def _failure(self, step: int, error: Exception) -> None:
    message = f'checkpoint {step} in {self.folder}: cannot be written ({_reason(error)})'
    self._clean(f'{step}.*')  # free the space
    if self._failed:
      raise SaveError(f'{message} (the previous one failed too)') from None
    self._failed = message
    self.log(f'warning: {message}; training continues, and the next checkpoint will be tried')

  def restore(self, abstract: TrainState, only: int | None = None) -> Restored | None:
    """Read the latest valid checkpoint, or that of the step `only`, with the shardings of
    `abstract`; None if there are no checkpoints.

    Raises `InputError` if all are corrupt, or one is of another model or optimizer. Writes
    nothing."""
    corrupt: list[tuple[int, str]] = []
    for step in reversed(steps_in(self.folder) if only is None else [only]):
      path = self.folder / str(step)
      try:
        state, meta = _together(lambda path=path: self._load(path, abstract))
      except Corrupt as e:
        corrupt.append((step, str(e)))
        self.log(f'warning: checkpoint {step} is corrupt: {e}')
        continue
      return Restored(state, meta['data'], meta.get('tokens'), corrupt)
    if corrupt:
      raise InputError(
        f'{self.folder}: no valid checkpoint: {"; ".join(f"{s}: {e}" for s, e in corrupt)}; '
        'move the run folder away, or train under another --run.name'
      )
    return None

  def _load(self, path: AnyPath, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    meta, wanted = _read_meta(path), _arrays(abstract)
    loaded = _read(path, meta, wanted, finite=True)
    leaves = [loaded['optimizer'][name] for name in wanted['optimizer']]
    opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)

    @functools.partial(jax.jit, out_shardings=(abstract.step.sharding, abstract.key.sharding))
    # unlike device_put, also with devices of other processes
    def put(step: Array, data: Array) -> tuple[Array, Array]:
      return step, jax.random.wrap_key_data(data)

    step, key = put(np.int32(meta['step']), np.array(meta['key'], np.uint32))
    return TrainState(
      step, {name: loaded['params'][name] for name in abstract.params}, opt_state, key
    ), meta

  def set_aside(self, steps: Sequence[int]) -> None:
    """Move corrupt checkpoints to `corrupt/` beside the folder, and remove what incomplete saves
    have left."""
    self._clean('*.orbax-checkpoint-tmp*')
    if steps and jax.process_index() == 0:
      aside = self.folder.parent / 'corrupt'
      with writing(aside):
        aside.mkdir(exist_ok=True)
        for step in steps:
          remove(aside / str(step))
          move(self.folder / str(step), aside / str(step))
    _barrier('checkpoints cleaned up')

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # an error that is being raised says more
    with contextlib.suppress(*(() if kind is None else (Exception,))), _quiet():
      self.wait(final=kind is None)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [''])[0][:200]


def _reason(error: Exception) -> str:
  """Return why a save failed: what the operating system says, if it does."""
  cause = os_error(error)
  return f'{type(error).__name__}: {_first_line(error)}' if cause is None else str(cause.strerror)


@functools.cache
def _silence_threads() -> None:
  """Silence what the threads of a save log, with a traceback each, about an error that `wait`
  reports."""
  logging.getLogger('absl').addFilter(lambda record: '_SignalingThread' not in record.getMessage())


@contextlib.contextmanager
def _quiet():
  """Silence Orbax, which logs every step of its work, and errors that are reported here."""
  from absl import logging as absl_logging

  old = absl_logging.get_verbosity()
  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
  levels = [logger.level for logger in loggers]
  absl_logging.set_verbosity(absl_logging.FATAL)
  loggers[1].setLevel(logging.CRITICAL)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _except_late_reads
  try:
    yield
  finally:
    absl_logging.set_verbosity(old)
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _except_late_reads(found: Any) -> None:
  """Print an error of a callback as Python does, except that of a read, or a write, that ends after
  another one has failed: Orbax has closed the loop that waited for all. It may come at any later
  time."""
  if not (found.exc_type is RuntimeError and str(found.exc_value) == 'Event loop is closed'):
    sys.__unraisablehook__(found)
