"""Whether an experiment can run on a target, before the target is paid for."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh

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
    memory = training_memory(
      experiment.model,
      mesh,
      rules,
      t.batch_size,
      length,
      remat=t.remat,
      accumulate=t.accumulate,
      dtype='bfloat16' if t.dtype == 'auto' else t.dtype,
      optimizer=_optimizer_state(experiment, mesh),
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


def _optimizer_state(experiment: Experiment, mesh: AbstractMesh) -> Any:
  """Abstract, with shardings."""
  definition = define(experiment.model)
  optimizer = Optimizer.of(
    experiment.optimizer, experiment.schedule, experiment.training.steps, definition
  )
  on: Any = mesh  # one without devices is enough for shardings
  shapes: Any = definition.abstract()
  state, where = (
    jax.eval_shape(optimizer.init, shapes),
    optimizer.shardings(on, definition.shardings(on, experiment.mesh.rules)),
  )
  return jax.tree.map(
    lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state, where
  )
