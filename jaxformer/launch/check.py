"""Whether an experiment can run on a target, before the target is paid for."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxformer.config import InputError
from jaxformer.models.params import define
from jaxformer.planning.target import Target
from jaxformer.sharding import batch_shards
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.training.optimizer import Optimizer


def check_on(experiment: Experiment, target: Target) -> int:
  """Bytes that one device needs at least, for parameters, gradients and the optimizer's state; `jaxformer plan` estimates the rest.

  Raises `InputError` where the model does not fit the data, the mesh, batch or parameters the number of devices, or these bytes
  the memory.
  """
  check_fit(experiment.model, experiment.data)
  there = target.device_memory_bytes
  try:
    least = _least_bytes(experiment, _mesh(experiment, target))
    if least > there:
      raise InputError(
        f'parameters, gradients and optimizer take {least / 1e9:,.1f} GB a device, {(least - there) / 1e9:,.1f} GB more than there '
        'is; divide them over more devices (--mesh.fsdp, --mesh.tensor), or take a larger target')
  except InputError as e:
    raise InputError(f'--target {target.name} ({target.devices} devices of {there / 1e9:.3g} GB): {e}') from None
  return least


def _mesh(experiment: Experiment, target: Target) -> Mesh:
  """The mesh, which the batch must fit. Only its shape counts here, which one without devices has as well."""
  sizes = experiment.mesh.sizes(target.devices)
  mesh = cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)))
  t, length = experiment.training, experiment.data.positions
  rows, parts = t.batch_size // t.accumulate, batch_shards(mesh, experiment.mesh.rules)
  if rows % parts:
    raise InputError(f'training.batch_size / accumulate = {rows}: must be a multiple of the {parts} parts of the mesh')
  if length % sizes['context']:
    raise InputError(f'the length {length} of a sequence must be a multiple of mesh.context = {sizes["context"]}')
  return mesh


def _least_bytes(experiment: Experiment, mesh: Mesh) -> int:
  definition, t = define(experiment.model), experiment.training
  optimizer = Optimizer.of(experiment.optimizer, experiment.schedule, t.steps, definition)
  where: Any = definition.shardings(mesh, experiment.mesh.rules)
  params: Any = definition.abstract()
  state = jax.eval_shape(optimizer.init, params)
  return 2 * _bytes(params, where) + _bytes(state, optimizer.shardings(mesh, where))


def _bytes(arrays: Any, where: Any) -> int:
  """Of abstract arrays, on one device."""
  leaves = zip(jax.tree.leaves(arrays), jax.tree.leaves(where), strict=True)
  return sum(math.prod(sharding.shard_shape(a.shape)) * a.dtype.itemsize for a, sharding in leaves)
