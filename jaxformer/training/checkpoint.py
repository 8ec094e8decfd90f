"""Checkpoints: saved in the background, verified when loaded. The only file that knows Orbax.

A checkpoint is a folder `<step>/` with three parts: `params` and `optimizer` (arrays by name,
written by all processes) and `meta` (JSON: step, random key, position in the data, digest of the
config, and a digest of every array). Storage formats do not notice a flipped bit in array data, so
every array is hashed before it is saved and after it is loaded; the hash does not depend on how an
array is divided over devices, so a checkpoint may be loaded on any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.utils import is_checkpoint_finalized

from jaxformer.config import InputError, first_lines
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import MeshConfig, Rules, make_mesh, replicated
from jaxformer.training.paths import AnyPath, move, remote_errors, remove, to_path
from jaxformer.training.step import TrainState

VERSION = 1
Log = Callable[[str], None]


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


class Corrupt(Exception):
  """A checkpoint whose parts are missing, unreadable, or not what was saved."""


# ---- digests -----------------------------------------------------------------------------------


def _bits(x: Array) -> Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _mix(h: Array) -> Array:
  """The finaliser of MurmurHash3: a bijection, so no change of one word goes unnoticed."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  return h ^ (h >> 16)


@jax.jit
def _digest(x: Array) -> Array:
  bits = _bits(x)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  return jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def digests(arrays: Mapping[str, Array]) -> dict[str, int]:
  """Of every array, below 2^32: sum over its numbers of mix(bit pattern XOR mix(index)), modulo
  2^32. The same on every mesh.

  A small program for each shape: one for all arrays would take longer to compile, for moments have
    the shapes of parameters. One
  after another: on a CPU with several processes, collectives that wait for each other can fill
    every thread there is."""
  return {name: int(_digest(x)) for name, x in arrays.items()}


def named(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths."""
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
  """The steps that have a checkpoint, ascending. Interrupted saves, which have another name, or in
  a store no mark of being whole, do not count."""
  found = (
    [p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()] if folder.is_dir() else []
  )
  return sorted(int(p.name) for p in found if is_checkpoint_finalized(p))


def _read_meta(path: AnyPath) -> dict[str, Any]:
  try:
    meta = json.loads((path / 'meta' / 'data.json').read_text())
    intact = meta['seal'] == _seal(meta)['seal']
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise Corrupt(f'its metadata cannot be read ({type(e).__name__}: {e})') from None
  if not intact:
    raise Corrupt('its metadata were changed')
  if meta['version'] != VERSION:
    raise InputError(
      f'{path}: a checkpoint of format {meta["version"]}; this version reads {VERSION}'
    )
  return meta


def differing_shapes(
  saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Return a line for every name whose shape differs, or that only one side has."""
  lines = [
    f'{name}: {saved[name]} found, the model has {s}'
    for name, s in wanted.items()
    if saved.get(name, s) != s
  ]
  lines += [f'{name}: not found' for name in wanted if name not in saved]
  return lines + [f'{name}: found, but not in the model' for name in saved if name not in wanted]


def _compare(path: AnyPath, meta: dict[str, Any], part: str, abstract: Mapping[str, Any]) -> None:
  """Raises `InputError` that lists the names and shapes in which a checkpoint and the model
  differ."""
  start = f'{part}/'
  saved = {n[len(start) :]: tuple(s) for n, s in meta['shapes'].items() if n.startswith(start)}
  lines = differing_shapes(saved, {n: tuple(a.shape) for n, a in abstract.items()})
  if lines:
    raise InputError(
      f'{path}: the {part} do not fit this model or optimizer:\n  {first_lines(lines)}'
    )


def _read(
  path: AnyPath, meta: dict[str, Any], abstract: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Array]]:
  """The arrays of the parts asked for, verified. Raises `Corrupt`."""
  try:
    with _quiet():
      loaded = ocp.load_checkpointables(str(path), abstract)
  except Exception as e:  # which type a corrupt file raises cannot be foretold
    raise Corrupt(f'it cannot be read ({type(e).__name__}: {_first_line(e)})') from None
  found = digests(_by_path(loaded))
  wrong = [name for name, d in found.items() if d != meta['digests'].get(name)]
  if wrong:
    names = ', '.join(wrong[:3] + ['...'] * (len(wrong) > 3))
    raise Corrupt(f'{len(wrong)} of {len(found)} arrays are not what was saved: {names}')
  return loaded


def _together(read: Callable[[], Any]) -> Any:
  """`read()`, or `Corrupt` on all processes where it is on one, so that all fall back together."""
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
  """The checkpoint that a path names: a checkpoint folder, a run folder or its `checkpoints/` (the
  newest there), or one of these with `@step`. Raises `InputError`."""
  base, at, step = str(path).partition('@')
  folder = to_path(base)
  with remote_errors(folder):
    if (folder / 'meta').is_dir() and not at:
      return folder
    home = folder / 'checkpoints' if (folder / 'checkpoints').is_dir() else folder
    steps = steps_in(home)
  if not steps:
    raise InputError(
      f'{path}: no checkpoint there; expected a run folder, or a folder runs/NAME/checkpoints/STEP'
    )
  if at and (not step.isdigit() or int(step) not in steps):
    raise InputError(
      f'{path}: no checkpoint of step {step!r}; there are {", ".join(map(str, steps))}'
    )
  return home / str(int(step) if at else steps[-1])


def load_params(
  path: str | AnyPath,
  definition: Definition,
  mesh: Mesh | None = None,
  rules: Rules | str = 'fsdp_tensor',
) -> tuple[Params, int]:
  """The parameters of a checkpoint, and its step.

  Args:
    path: see `find`.
    definition: of the model; names and shapes must be its own.
    mesh, rules: where the parameters go; None for one device, or under several processes for a copy
      on every device of each.

  Raises `InputError` for a path without a checkpoint, one of another model, and a corrupt one.
  """
  where = find(path)
  abstract = definition.abstract(mesh, rules)
  if mesh is None:
    # the first device of all belongs to one process; the others could not put anything there
    alone = jax.process_count() == 1
    one = (
      jax.sharding.SingleDeviceSharding(jax.devices()[0])
      if alone
      else replicated(make_mesh(MeshConfig()))
    )
    abstract = {
      n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for n, a in abstract.items()
    }

  def read() -> tuple[Params, int]:
    meta = _read_meta(where)
    _compare(where, meta, 'params', abstract)
    return _read(where, meta, {'params': abstract})['params'], meta['step']

  try:
    return _together(read)
  except Corrupt as e:
    others = [s for s in steps_in(where.parent) if str(s) != where.name]
    advice = f'; other steps: {", ".join(map(str, others))} (name one with @STEP)' if others else ''
    raise InputError(f'{where}: corrupt: {e}{advice}') from None


# ---- a run's checkpoints -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restored:
  """A state with what was stored beside it.

  Attributes:
    state: on the mesh asked for.
    data: position in the data.
    corrupt: (step, what is wrong) of newer checkpoints that were passed over.
  """

  state: TrainState
  data: dict[str, Any]
  corrupt: tuple[tuple[int, str], ...] = ()


class Checkpoints:
  """The checkpoints of a run: saved in the background one at a time; the newest and the best are
  kept. A context manager."""

  def __init__(self, folder: AnyPath, keep_latest: int, keep_best: int, log: Log):
    self.folder, self.log = to_path(folder), log
    self._keep = (keep_latest, keep_best)
    self._pending: tuple[int, Any] | None = None
    self._failed: str | None = None
    self._set_aside_metrics()
    self._manager = self._open()

  def _set_aside_metrics(self) -> None:
    """Orbax reads the metrics of all checkpoints when it opens the folder and fails on one that is
    cut; they only rank the best."""
    if jax.process_index() == 0:
      for step in steps_in(self.folder):
        file = self.folder / str(step) / 'metrics' / 'metrics'
        try:
          json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError):
          self.log(f'warning: {file} is corrupt; checkpoint {step} no longer counts among the best')
          file.rename(file.with_name('corrupt'))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('metrics of checkpoints read')

  def _open(self) -> ocp.training.Checkpointer:
    # Orbax's own types do not agree with each other
    saving: Any = ocp.training.save_decision_policies
    policies: Any = ocp.training.preservation_policies
    latest, best = self._keep
    by_loss = policies.BestN(
      get_metric_fn=lambda m: -m['eval/loss'], n=best, keep_checkpoints_without_metrics=False
    )
    registry = ocp.handlers.local_registry()  # else a dictionary of numbers is taken for arrays
    registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')
    context = ocp.Context()
    context.checkpointables.registry = registry
    with _quiet():
      return ocp.training.Checkpointer(
        str(self.folder),
        context=context,
        save_decision_policy=saving.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(latest), by_loss]),
        cleanup_tmp_directories=True,
      )

  def save(
    self,
    state: TrainState,
    data: dict[str, Any],
    config_digest: str,
    eval_loss: float | None = None,
  ) -> None:
    """Starts to write the state; returns as soon as it may be donated. An earlier save is finished
    first.

    A save that fails is reported and tried again at the next; the second failure in a row raises
    `SaveError`."""
    self.wait()
    step, arrays = int(state.step), _arrays(state)
    by_path = _by_path(arrays)
    meta = _seal(
      {
        'version': VERSION,
        'step': step,
        'data': data,
        'config': config_digest,
        'shapes': {name: list(x.shape) for name, x in by_path.items()},
        'digests': digests(by_path),
        'key': np.asarray(jax.random.key_data(state.key)).tolist(),
      }
    )
    metrics: Any = (
      {'eval/loss': eval_loss} if eval_loss is not None and math.isfinite(eval_loss) else None
    )
    try:
      with _quiet():
        response = self._manager.save_checkpointables_async(
          step,
          {**arrays, 'meta': meta},
          force=True,
          overwrite=step in steps_in(self.folder),
          metrics=metrics,
        )
    except Exception as e:
      self._failure(step, e)
    else:
      self._pending = (step, response)

  def wait(self, final: bool = False) -> None:
    """Until nothing is being written. Raises `SaveError` for a failure that is the second in a row,
    or `final`."""
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

  def _failure(self, step: int, error: Exception) -> None:
    text = str(error)
    full = (
      getattr(error, 'errno', None) == errno.ENOSPC
      or 'No space left' in text
      or 'RESOURCE_EXHAUSTED' in text
    )
    what = 'the disk is full' if full else f'{type(error).__name__}: {_first_line(error)}'
    message = f'checkpoint {step} in {self.folder}: {what}'
    with contextlib.suppress(Exception):  # it reports the same failure once more
      self._manager.close()
    if jax.process_index() == 0:
      # what was written of it, which on a full disk is in the way
      for part in self.folder.glob(f'{step}.*'):
        remove(part)
    if self._failed:
      raise SaveError(f'{message} (the one before failed too)') from None
    self._failed = message
    self.log(f'warning: {message}; training goes on, and the next checkpoint is tried')
    self._manager = self._open()

  def restore(self, abstract: TrainState) -> Restored | None:
    """The newest checkpoint that is whole, on the shardings of `abstract`; None where there is none
    at all.

    Corrupt ones that are newer are moved to `corrupt/` beside the folder. Raises `InputError` where
    all are corrupt, and for one that is of another model or optimizer."""
    corrupt: list[tuple[int, str]] = []
    for step in reversed(steps_in(self.folder)):
      path = self.folder / str(step)
      try:
        state, data = _together(lambda path=path: self._load(path, abstract))
      except Corrupt as e:
        corrupt.append((step, str(e)))
        self.log(f'warning: checkpoint {step} is corrupt: {e}')
        continue
      self._put_aside([s for s, _ in corrupt])
      return Restored(state, data, tuple(corrupt))
    if corrupt:
      raise InputError(
        f'{self.folder}: no valid checkpoint: {"; ".join(f"{s}: {e}" for s, e in corrupt)}; '
        'move the run folder away, or train under another --run.name'
      )
    return None

  def _load(self, path: AnyPath, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    meta, wanted = _read_meta(path), _arrays(abstract)
    for part, tree in wanted.items():
      _compare(path, meta, part, tree)
    loaded = _read(path, meta, wanted)
    leaves = [loaded['optimizer'][name] for name in wanted['optimizer']]
    opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)

    @functools.partial(jax.jit, out_shardings=(abstract.step.sharding, abstract.key.sharding))
    # unlike device_put, also where other processes have devices
    def place(step: Array, data: Array) -> tuple[Array, Array]:
      return step, jax.random.wrap_key_data(data)

    step, key = place(np.int32(meta['step']), np.array(meta['key'], np.uint32))
    return TrainState(
      step, {name: loaded['params'][name] for name in abstract.params}, opt_state, key
    ), meta['data']

  def _put_aside(self, steps: list[int]) -> None:
    if not steps:
      return
    self._manager.close()
    if jax.process_index() == 0:
      aside = self.folder.parent / 'corrupt'
      aside.mkdir(exist_ok=True)
      for step in steps:
        remove(aside / str(step))
        move(self.folder / str(step), aside / str(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('corrupt checkpoints put aside')
    self._manager = self._open()

  def close(self) -> None:
    with _quiet():
      self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self.wait(final=True)
      self.close()
    else:
      with contextlib.suppress(Exception):  # the error on its way out says more
        self.wait()
        self.close()


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [''])[0][:200]


@contextlib.contextmanager
def _quiet():
  """Orbax reports every step of its work, and errors that are reported here, on the root logger's
  level."""
  from absl import logging as absl_logging

  old = absl_logging.get_verbosity()
  logger = logging.getLogger('absl')
  level = logger.level
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    yield
  finally:
    absl_logging.set_verbosity(old)
    logger.setLevel(level)
