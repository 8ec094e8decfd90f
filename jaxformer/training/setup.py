"""The parts of a run, built from its experiment and checked against each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.data import Dataset
from jaxformer.evaluation import evaluate
from jaxformer.models.params import Definition, Params, define
from jaxformer.sharding import Parallel, make_parallel
from jaxformer.task_type import Batch
from jaxformer.training.batch_placement import BatchPlacement
from jaxformer.training.checkpoint import check_shapes, load_params
from jaxformer.training.device_memory import check_memory
from jaxformer.training.digests import digests
from jaxformer.training.experiment import Experiment, TrainingConfig, check_fit
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.paths import AnyPath, to_path
from jaxformer.training.schedule import ScheduleConfig
from jaxformer.training.step import TrainState, abstract_train_state, step_config


class Initial(NamedTuple):
  """Where the first parameters of a run come from.

  Attributes:
    name: what the run records: an absolute path, with @STEP if one was named, or a digest of
      arrays.
    params: by name; None for those of the checkpoint that `name` stands for, or of a run that is
      resumed and does not need them.
  """

  name: str
  params: Params | None = None

  @classmethod
  def of(cls, source: str | AnyPath | Params | Initial | None) -> Initial | None:
    if source is None or isinstance(source, Initial):
      return source
    if isinstance(source, Mapping):
      digest = hashlib.sha256(json.dumps(digests(source)[0], sort_keys=True).encode()).hexdigest()
      return cls(f'{len(source)} arrays with digest {digest[:16]}', dict(source))
    path, at, step = str(source).partition('@')
    return cls(f'{to_path(path)}{at}{step}')


@dataclasses.dataclass(frozen=True)
class Setup:
  """The parts of a run."""

  experiment: Experiment
  definition: Definition
  dataset: Dataset
  optimizer: Optimizer
  parallel: Parallel
  step_config: TrainingConfig
  placement: BatchPlacement

  @classmethod
  def of(
    cls,
    experiment: Experiment,
    dataset: Dataset,
    devices: Sequence[jax.Device] | None = None,
    schedule: ScheduleConfig | None = None,
  ) -> Setup:
    """Build the parts; `schedule` replaces that of the experiment. Raises `InputError` for parts
    that do not fit."""
    t, model = experiment.training, experiment.model
    definition, parallel = check(experiment, devices)
    check_fit(model, experiment.data, dataset.vocab_size, dataset.source_vocab_size)
    return cls(
      experiment,
      definition,
      dataset,
      Optimizer(experiment.optimizer, schedule or experiment.schedule, t.steps, definition.info),
      parallel,
      step_config(experiment, parallel),
      BatchPlacement(parallel, t.batch_size, experiment.data.positions),
    )

  def abstract_state(self) -> TrainState:
    """Return the shapes, dtypes and shardings of the state."""
    return abstract_train_state(self.definition, self.optimizer, self.parallel)

  def evaluate(
    self, params: Params, until: Callable[[Iterable[Batch]], Iterator[Batch]] = iter
  ) -> dict[str, Any]:
    """Return `eval/loss` (nats per target), `eval/source`, and `eval/bits_per_byte` of text or
    `eval/accuracy` over the targets of a task.

    Bits per byte are comparable across tokenizers: they divide by the bytes that the targets stand
    for. With `eval_batches` the held-out rows are a sample, always the same one, and `eval/source`
    says so. `until` yields the batches that it is given, and may raise to stop between two of them.
    """
    t, dataset = self.experiment.training, self.dataset
    rows, limit, data = t.batch_size // t.accumulate, t.eval_batches, dataset.config
    part = BatchPlacement(self.parallel, rows, data.positions)
    complete = limit is None or dataset.validation_rows <= limit * rows
    bytes_V = None if dataset.tokenizer is None else dataset.tokenizer.token_bytes
    r = evaluate(
      self.definition,
      params,
      until(dataset.validation_batches(rows, limit, part.index, part.count)),
      token_bytes_V=bytes_V,
      parallel=self.parallel,
      dtype=jnp.dtype(self.step_config.dtype),
    )
    score = (
      {'eval/accuracy': r.accuracy} if bytes_V is None else {'eval/bits_per_byte': r.bits_per_byte}
    )
    source = data.validation_name + ('' if complete else f', {limit} batches of {rows}')
    return {'eval/loss': r.loss, **score, 'eval/source': source}

  def initial_params(self, source: Initial) -> Params:
    """Return the parameters of a checkpoint, or copies of those given by name, on the mesh. Raises
    `InputError` unless names and shapes are those of the model."""
    d = self.definition
    if source.params is None:
      return load_params(source.name, d, self.parallel).params
    params = source.params
    found, wanted = ({n: a.shape for n, a in arrays.items()} for arrays in (params, d.info))
    check_shapes(found, wanted, 'init_from: the given parameters')
    where = d.shardings(self.parallel)
    # Copies, since the step donates its arguments.
    return {n: jnp.array(jax.device_put(params[n], where[n]), i.dtype) for n, i in d.info.items()}


def check(
  experiment: Experiment, devices: Sequence[jax.Device] | None = None
) -> tuple[Definition, Parallel]:
  """Return the model, and the mesh with its rules, of an experiment, checked against each other as
  far as possible without reading the data.

  Raises `InputError` for parts that do not fit.
  """
  t = experiment.training
  check_fit(experiment.model, experiment.data)
  definition, parallel = define(experiment.model), make_parallel(experiment.mesh, devices)
  # each microbatch is sharded over the mesh
  BatchPlacement(parallel, t.batch_size // t.accumulate, experiment.data.positions)
  definition.shardings(parallel)
  check_memory(experiment, definition, parallel)
  step_config(experiment, parallel)  # the compiler's options
  return definition, parallel
