"""Trackers: where the metrics of a run go besides `metrics.jsonl`."""

import contextlib
import importlib
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal

from jaxformer.config import Config, InputError

Track = Callable[[dict[str, float], int], Any]
"""Takes the metrics of a step, and the step."""


class TrackerConfig(Config, abstract=True):
  """Base of the trackers. Only process 0 uses them."""

  @contextlib.contextmanager
  def open(self, folder: Path, name: str, config: dict[str, Any]) -> Generator[Track]:
    """Track a run within the block, from its first metrics or after a resume.

    Args:
      folder: local; the run folder, or one whose files are uploaded there.
      name: of the run.
      config: the experiment as JSON data.

    Raises `InputError` if the tracker is not installed."""
    raise NotImplementedError
    yield


class TensorBoard(TrackerConfig):
  """Event files in the run folder's `tensorboard/`."""

  @contextlib.contextmanager
  def open(self, folder, name, config):
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

  @contextlib.contextmanager
  def open(self, folder, name, config):
    run = _extra('wandb').init(
      name=name,
      id=name.replace('/', '-'),
      resume='allow',
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
  """Trackio: a local database with a dashboard."""

  project: str = 'jaxformer'

  @contextlib.contextmanager
  def open(self, folder, name, config):
    trackio = _extra('trackio')
    trackio.init(project=self.project, name=name, config=config, resume='allow')
    try:
      yield trackio.log
    finally:
      trackio.finish()


def _extra(module: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise InputError(
      f'training.trackers: {module} is not installed ({e}); install the extra `track`: pip install '
      '"jaxformer[track]"'
    ) from None
