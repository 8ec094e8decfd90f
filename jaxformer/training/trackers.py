"""Trackers: where the metrics of a run go besides `metrics.jsonl`."""

import contextlib
import contextvars
import importlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

from jaxformer.config import Config, InputError

Track = Callable[[dict[str, float], int], Any]
"""Takes the metrics of a step, and the step."""


class TrackerConfig(Config, abstract=True):
  """Base of the trackers. Only process 0 uses them. A run does not depend on its trackers: one that
  raises an error is given up with a warning."""

  def check(self) -> None:
    """Raises `InputError`, before anything is written, if the tracker is not installed."""

  @contextlib.contextmanager
  def open(self, folder: Path, id: str, name: str, config: dict[str, Any]) -> Generator[Track]:
    """Track a run within the block, from its first metrics or after a resume.

    Args:
      folder: local; the run folder, or one whose files are uploaded there.
      id: of the run, the same after a resume; no other run has it.
      name: of the run, which other runs may have too.
      config: the experiment as JSON data."""
    raise NotImplementedError
    yield


class TensorBoard(TrackerConfig):
  """Event files in the run folder's `tensorboard/`."""

  @contextlib.contextmanager
  def open(self, folder, id, name, config):
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / 'tensorboard'), flush_secs=10) as writer:
      writer.add_text('config', f'```json\n{json.dumps(config, indent=2)}\n```')

      def track(metrics: dict[str, float], step: int) -> None:
        for metric, value in metrics.items():
          writer.add_scalar(metric, value, step)

      yield track


class Wandb(TrackerConfig):
  """Weights & Biases. With `mode` 'offline' everything stays in the run folder."""

  project: str = 'jaxformer'
  entity: str | None = None
  mode: Literal['online', 'offline', 'disabled'] = 'offline'

  def check(self):
    _extra('wandb')

  @contextlib.contextmanager
  def open(self, folder, id, name, config):
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
  def open(self, folder, id, name, config):
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
