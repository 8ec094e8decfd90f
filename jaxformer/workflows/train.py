"""Training of an experiment with samples and baselines, as one value."""

import dataclasses
from typing import Any, Unpack

from jaxformer.data import open_data
from jaxformer.models.params import Params
from jaxformer.training import Experiment, TrainResult, check
from jaxformer.training import train as run_training
from jaxformer.training.experiment import check_complete
from jaxformer.training.run import Run
from jaxformer.training.setup import Initial
from jaxformer.workflows.benchmark import predicted_seconds, utilization
from jaxformer.workflows.load import Code, initial_params, name_code
from jaxformer.workflows.names import experiment
from jaxformer.workflows.overrides import Overrides
from jaxformer.workflows.progress import Log, log_progress
from jaxformer.workflows.samples import sampler
from jaxformer.workflows.sizes import Size


@dataclasses.dataclass(frozen=True)
class TrainingReport(TrainResult):
  """Result of a training run, for people.

  Attributes:
    baselines: bits per byte of the held-out text under models of single bytes, by name; empty for
      other data.
    sample: the last text generated while training; '' if there is none.
  """

  baselines: dict[str, float]
  sample: str

  def json(self) -> dict[str, Any]:
    values = {'exit_code': self.exit_code, 'metrics': self.metrics}
    return {'run': str(self.folder), 'step': self.step, **values, **self.baselines}

  def lines(self) -> list[str]:
    m, source = self.metrics, self.metrics.get('eval/source')
    after = f'after {self.step} steps'
    if self.baselines:
      own = m.get('eval/bits_per_byte')
      scores = [(v, f'{n.partition("_")[0]} model of bytes') for n, v in self.baselines.items()]
      scores += [] if own is None else [(own, f'this model {after}')]
      lines = [
        '',
        self.sample,
        '',
        f'bits per byte on held-out text ({source}):',
        *(['  this model was not evaluated'] if own is None else []),
        *(f'  {bits:.3f}  {what}' for bits, what in sorted(scores)),
      ]
    elif m.get('eval/loss') is None:
      lines = [f'not evaluated {after}']
    elif m.get('eval/accuracy') is None:
      lines = [f'{source}: {m["eval/loss"]:.4f} nats per target {after}']
    else:
      lines = [f'{source}: {m["eval/accuracy"]:.2%} correct {after}']
    return [*lines, f'run folder: {self.folder}']


def train(
  target: Experiment | str,
  *,
  overrides: Overrides = (),
  init_from: str | Params | None = None,
  resume_from: int | None = None,
  code: Code = (),
  log: Log = log_progress,
  **size: Unpack[Size],
) -> TrainingReport:
  """Train in the experiment's run folder; the same run name resumes.

  Args:
    target, overrides, size: see `experiment`.
    init_from: start a new run from these weights: what `load` accepts except presets, or parameters
      by name, which are copied.
    resume_from: resume from the checkpoint of this step, and move what came later to `undone/` in
      the run folder; the same call again resumes from the latest. Settings change on purpose by
      `training.resume_with`, and steps are passed over by `training.skip_steps`.
    code: files that define the types of the run to resume, or of `init_from`; see `load`.
    log: receives a line per event; the logger 'jaxformer' by default.

  Raises `InputError`, before anything is written, for what cannot be trained, and for a run folder
  that holds another experiment.
  """
  name_code(code)
  e = experiment(target, overrides=overrides, **size).resumed
  check_complete(e)
  check(e)  # before the text is read, which may take long
  source = initial_params(init_from, e) if isinstance(init_from, str) else Initial.of(init_from)
  Run(e, resume_from, source and source.name)  # and is the folder usable?
  dataset = open_data(e.data, log=log)
  result = run_training(
    e,
    init_from=source,
    resume_from=resume_from,
    dataset=dataset,
    utilization=utilization(e.model, e.data.positions),
    predict=predicted_seconds,
    sample=sampler(e, dataset),
    log=log,
  )
  file = result.folder / 'samples.txt'
  text = file.read_bytes().decode(errors='replace') if file.exists() else ''
  sample = text.rpartition('==== step ')[2].partition('\n')[2]
  return TrainingReport(**vars(result), baselines=dataset.baselines(), sample=sample.rstrip())
