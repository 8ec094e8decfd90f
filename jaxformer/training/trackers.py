"""Trackers: where the metrics of a run go besides `metrics.jsonl`."""

import contextlib
import contextvars
import importlib
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

from jaxformer.config import Config, InputError
from jaxformer.files import append

Track = Callable[[dict[str, float], int], Any]
"""Takes the metrics of a step, and the step."""


class TrackerConfig(Config, abstract=True):
  """Base of the trackers. Only process 0 uses them. A run does not depend on its trackers: one that
  raises an error is given up with a warning."""

  def check(self) -> None:
    """Raises `InputError`, before anything is written, if the tracker is not installed."""

  @contextlib.contextmanager
  def open(
    self, folder: Path, id: str, name: str, step: int, config: dict[str, Any]
  ) -> Generator[Track]:
    """Track a run within the block, from its first metrics or after a resume.

    Args:
      folder: local; the run folder, or one whose files are uploaded there.
      id: of the run, the same after a resume; no other run has it.
      name: of the run, which other runs may have too.
      step: from which the run goes on. What was tracked of later steps is undone.
      config: the experiment as JSON data."""
    raise NotImplementedError
    yield


class TensorBoard(TrackerConfig):
  """Event files in the run folder's `tensorboard/`. Each begins with the record by which readers
  drop the later steps of earlier files.

  They are written here, since the thread of tensorboardX's writer ends at a full disk, and whoever
  gives it more waits for ever."""

  @contextlib.contextmanager
  def open(self, folder, id, name, step, config):
    from tensorboardX.summary import text

    # generated modules, whose names are unknown to type checkers
    events, summaries = (
      importlib.import_module(f'tensorboardX.proto.{name}_pb2') for name in ('event', 'summary')
    )

    (folder / 'tensorboard').mkdir(exist_ok=True)
    file = f'events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}'

    def write(**fields: Any) -> None:
      event = events.Event(wall_time=time.time(), **fields)
      append(folder / 'tensorboard' / file, _record(event.SerializeToString()))

    def track(metrics: dict[str, float], step: int) -> None:
      values = [summaries.Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
      write(step=step, summary=summaries.Summary(value=values))

    write(file_version='brain.Event:2')
    write(step=step + 1, session_log=events.SessionLog(status=events.SessionLog.START))
    write(step=step, summary=text('config', f'```json\n{json.dumps(config, indent=2)}\n```'))
    yield track


def _record(data: bytes) -> bytes:
  """Return data as a record of a TFRecord file: its length and itself, each with a checksum."""
  from tensorboardX.record_writer import masked_crc32c

  size = struct.pack('<Q', len(data))
  return b''.join(
    [size, struct.pack('<I', masked_crc32c(size)), data, struct.pack('<I', masked_crc32c(data))]
  )


class Wandb(TrackerConfig):
  """Weights & Biases. With `mode` 'offline' everything stays in the run folder."""

  project: str = 'jaxformer'
  entity: str | None = None
  mode: Literal['online', 'offline', 'disabled'] = 'offline'

  def check(self):
    _extra('wandb')

  @contextlib.contextmanager
  def open(self, folder, id, name, step, config):
    run = _extra('wandb').init(
      name=name,
      id=id,
      resume='allow',
      reinit='create_new',  # beside the runs of other members of a population
      config=config,
      project=self.project,
      entity=self.entity,
      mode=self.mode,
      dir=str(folder),
    )
    try:
      yield run.log
    finally:
      run.finish()


class Trackio(TrackerConfig):
  """Trackio: a local database with a dashboard. It knows a run by its name, which here ends with
  the id."""

  project: str = 'jaxformer'

  def check(self):
    _extra('trackio')

  @contextlib.contextmanager
  def open(self, folder, id, name, step, config):
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be for one JSON value
      # in a context of its own, since it would finish the run that it finds in this one
      run = contextvars.Context().run(
        _extra('trackio').init,
        project=self.project,
        name=f'{name} {id}',
        config=config,
        resume='allow',
      )
    try:
      yield run.log
    finally:
      with contextlib.redirect_stdout(sys.stderr):
        run.finish()


def _extra(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise InputError(
      f'training.trackers: {module} is not installed ({e}); install the extra `track`: pip install '
      '"jaxformer[track]"'
    ) from None
