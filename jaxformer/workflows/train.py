"""Training of an experiment with samples and baselines, as one value."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxformer.data import open_data
from jaxformer.models.params import Params
from jaxformer.planning.cost import flops_per_token
from jaxformer.planning.hardware import chip
from jaxformer.training import Experiment, TrainResult, check, train
from jaxformer.training.run import Run
from jaxformer.workflows.names import initial_params
from jaxformer.workflows.progress import Log
from jaxformer.workflows.samples import sampler


@dataclasses.dataclass(frozen=True)
class TrainingReport:
  """Result of a training run, for people.

  Attributes:
    result: of the run: `.folder`, `.step`, `.metrics`, `.exit_code`.
    baselines: bits per byte of the held-out text under models of single bytes, by name; empty for
      other data.
    sample: the last text generated while training; '' if there is none.
  """

  result: TrainResult
  baselines: dict[str, float]
  sample: str

  @property
  def folder(self) -> Any:
    return self.result.folder

  @property
  def step(self) -> int:
    return self.result.step

  @property
  def metrics(self) -> dict[str, Any]:
    return self.result.metrics

  @property
  def exit_code(self) -> int:
    return self.result.exit_code

  def json(self) -> dict[str, Any]:
    return {'run': str(self.folder), 'step': self.step, 'metrics': self.metrics, **self.baselines}

  def lines(self) -> list[str]:
    m, source = self.metrics, self.metrics.get('eval/source')
    after = f'after {self.step} steps'
    if self.baselines:
      own = m.get('eval/bits_per_byte')
      lines = [
        '',
        self.sample,
        '',
        f'bits per byte on held-out text ({source}):',
        '  not evaluated' if own is None else f'  {own:.3f}  this model {after}',
        *(f'  {v:.3f}  {n.partition("_")[0]} model of bytes' for n, v in self.baselines.items()),
      ]
    elif m.get('eval/loss') is None:
      lines = [f'not evaluated {after}']
    elif m.get('eval/accuracy') is None:
      lines = [f'{source}: {m["eval/loss"]:.4f} nats per target {after}']
    else:
      lines = [f'{source}: {m["eval/accuracy"]:.2%} correct {after}']
    return [*lines, f'run folder: {self.folder}']


def train_experiment(e: Experiment, init_from: str | Params | None, log: Log) -> TrainingReport:
  """Train an experiment; see `jaxformer.train`."""
  check(e)  # before the text is read, which may take long
  Run(e)  # and is the folder usable?
  if isinstance(init_from, str):
    init_from = initial_params(init_from, e)
  dataset = open_data(e.data, log=log)
  known = chip(jax.devices()[0].device_kind)
  result = train(
    e,
    init_from=init_from,
    dataset=dataset,
    flops_per_token=flops_per_token,
    peak_flops_per_second=None if known is None else known.peak() / known.devices,
    sample=sampler(e, dataset),
    log=log,
  )
  return TrainingReport(result, dataset.baselines(), _last_sample(result))


def _last_sample(result: TrainResult) -> str:
  file = result.folder / 'samples.txt'
  if not file.exists():
    return ''
  return file.read_text().rpartition('==== step ')[2].partition('\n')[2].rstrip()
