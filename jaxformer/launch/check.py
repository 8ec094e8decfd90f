"""Whether an experiment can run on a target, before the target is paid for."""

from __future__ import annotations

from typing import Any

from jaxformer.config import InputError
from jaxformer.models.params import define
from jaxformer.planning.memory import Memory, abstract_mesh, local_batch, training_memory
from jaxformer.planning.target import Target
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.training.optimizer import Optimizer


def check_on(experiment: Experiment, target: Target) -> Memory:
  """What a training step takes of one device's memory.

  Raises `InputError` where the model does not fit the data, the mesh, batch or parameters the
  number of devices, or the memory does not even hold parameters, gradients and the optimizer's
  state. The rest of it is an estimate, which refuses nothing."""
  check_fit(experiment.model, experiment.data)
  there, t, length, rules = (
    target.device_memory_bytes,
    experiment.training,
    experiment.data.positions,
    experiment.mesh.rules,
  )
  try:
    mesh = abstract_mesh(experiment.mesh, target.devices)
    local_batch(mesh, rules, t.batch_size, length, t.accumulate)
    # A GPU's kernels cannot be traced where cuDNN is not; those of a TPU keep as little.
    definition = define(experiment.model)
    optimizer = Optimizer.of(experiment.optimizer, experiment.schedule, t.steps, definition)
    on: Any = mesh  # a mesh without devices is enough for shardings
    memory = training_memory(
      experiment.model,
      mesh,
      rules,
      t.batch_size,
      length,
      remat=t.remat,
      accumulate=t.accumulate,
      dtype='bfloat16' if t.dtype == 'auto' else t.dtype,
      optimizer=optimizer.abstract_state(definition, on, rules),
      platform='tpu',
    )
    least = 2 * memory.parameters + memory.optimizer
    if least > there:
      raise InputError(
        f'parameters, gradients and optimizer take {least / 1e9:,.1f} GB a device, '
        f'{(least - there) / 1e9:,.1f} GB more than there '
        'is; divide them over more devices (--mesh.fsdp, --mesh.tensor), or take a larger target'
      )
  except InputError as e:
    raise InputError(
      f'--target {target.name} ({target.devices} devices of {there / 1e9:.3g} GB): {e}'
    ) from None
  return memory
