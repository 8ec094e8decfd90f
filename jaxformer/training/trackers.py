"""Where the metrics of a run go besides `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from jaxformer.config import Config, InputError


class Tracker(Protocol):
  """Takes metrics as they come. Only process 0 has trackers."""

  def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
    """Before the first metrics, also of a run that is resumed. `folder` is local: the run's, or one
    whose files go there. `config` is the experiment as JSON data."""

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """The metrics of a step, of which only numbers are kept."""

  def finish(self) -> None:
    """After the last."""


class TrackerConfig(Config, abstract=True):
  """Base of the trackers' configs."""

  def build(self) -> Tracker:
    raise NotImplementedError


class TensorBoard(TrackerConfig):
  """Event files in the run folder's `tensorboard/`."""

  def build(self):
    return _TensorBoard()


class Wandb(TrackerConfig):
  """Weights & Biases. `mode` 'offline' keeps everything in the run folder."""

  project: str = 'jaxformer'
  entity: str | None = None
  mode: str = 'offline'

  def validate(self):
    self.require(
      self.mode in ('online', 'offline', 'disabled'), 'mode', 'online, offline or disabled'
    )

  def build(self):
    return _Wandb(self, _extra('wandb'))


class Trackio(TrackerConfig):
  """Trackio: a local database with a dashboard."""

  project: str = 'jaxformer'

  def build(self):
    return _Trackio(self, _extra('trackio'))


def _extra(module: str) -> Any:
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as e:
    raise InputError(
      f'training.trackers: {module} is not installed ({e}); install the extra `track`: pip install '
      '"jaxformer[track]"'
    ) from None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
  return {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != 'step'}


class _TensorBoard:
  def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
    import json

    from tensorboardX import SummaryWriter

    self.writer = SummaryWriter(str(folder / 'tensorboard'), flush_secs=10)
    self.writer.add_text('config', f'```json\n{json.dumps(config, indent=2)}\n```')

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    for name, value in _numbers(metrics).items():
      self.writer.add_scalar(name, value, step)

  def finish(self) -> None:
    self.writer.close()


class _Wandb:
  def __init__(self, config: Wandb, module: Any):
    self.config, self.module = config, module

  def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
    c = self.config
    where = {'project': c.project, 'entity': c.entity, 'mode': c.mode, 'dir': str(folder)}
    self.run = self.module.init(
      name=name, id=name.replace('/', '-'), resume='allow', config=config, **where
    )

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    self.run.log(_numbers(metrics), step=step)

  def finish(self) -> None:
    self.run.finish()


class _Trackio:
  def __init__(self, config: Trackio, module: Any):
    self.config, self.module = config, module

  def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
    self.module.init(project=self.config.project, name=name, config=config, resume='allow')

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    self.module.log(_numbers(metrics), step=step)

  def finish(self) -> None:
    self.module.finish()
