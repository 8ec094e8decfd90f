"""Checks of an experiment against a target before anything is rented."""

import functools
from typing import Any

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.memory import DeviceMemory, memory
from jaxformer.planning.setup import PlanSetup
from jaxformer.planning.target import Target
from jaxformer.sharding import MeshConfig, Parallel
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.training.optimizer import Optimizer, OptimizerConfig
from jaxformer.training.schedule import ScheduleConfig


def setup_of(experiment: Experiment, target: Target, mesh: MeshConfig | None = None) -> PlanSetup:
  """The training step of an experiment as planning sees it; `mesh` replaces the experiment's."""
  e, t = experiment, experiment.training

  def optimizer_state(model: ModelConfig, parallel: Parallel) -> Any:
    return _optimizer_state(e.optimizer, e.schedule, t.steps, model, parallel)

  return PlanSetup(
    model=e.model,
    target=target,
    mesh=e.mesh if mesh is None else mesh,
    batch_size=t.batch_size,
    length=e.data.positions,
    remat=t.remat,
    accumulate=t.accumulate,
    precision='fp32' if t.dtype == 'float32' else 'bf16',
    optimizer=optimizer_state,
  )


@functools.lru_cache(maxsize=64)
def _optimizer_state(
  config: OptimizerConfig,
  schedule: ScheduleConfig,
  steps: int,
  model: ModelConfig,
  parallel: Parallel,
) -> Any:
  definition = define(model)
  optimizer = Optimizer(config, schedule, steps, definition.info)
  return optimizer.abstract_state(definition, parallel)


def check_on(experiment: Experiment, target: Target) -> DeviceMemory:
  """Estimate the memory of a training step on each device of a target.

  Raises `InputError` if the model does not fit the data, if the mesh does not divide the devices,
  the batch or the parameters, or if parameters, gradients and optimizer state alone exceed the
  memory. Activations are an estimate and refuse nothing."""
  check_fit(experiment.model, experiment.data)
  limit = target.device_memory_bytes
  try:
    found = memory(setup_of(experiment, target))
    least = 2 * found.parameters + found.optimizer
    if least > limit:
      raise InputError(
        f'parameters, gradients and optimizer need {least / 1e9:,.1f} GB per device, '
        f'{(least - limit) / 1e9:,.1f} GB more than available; shard them over more devices '
        '(--mesh.fsdp, --mesh.tensor), or choose a larger target'
      )
  except InputError as e:
    raise InputError(
      f'--target {target.name} ({target.devices} devices of {limit / 1e9:.3g} GB): {e}'
    ) from None
  return found
