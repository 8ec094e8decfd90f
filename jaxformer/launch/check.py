"""Whether an experiment can run on a target, before the target is paid for."""

from __future__ import annotations

from typing import cast

from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxformer.config import InputError
from jaxformer.models.params import define
from jaxformer.planning.target import Target
from jaxformer.sharding import batch_shards
from jaxformer.training.experiment import Experiment, check_fit


def check_on(experiment: Experiment, target: Target) -> None:
  """Raises `InputError` where the model does not fit the data, or the mesh, batch or parameters the number of chips."""
  check_fit(experiment.model, experiment.data)
  try:
    sizes = experiment.mesh.sizes(target.devices)
    # Only the shape of a mesh counts here, which one without devices has as well.
    mesh = cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)))
    t, rules = experiment.training, experiment.mesh.rules
    rows, parts = t.batch_size // t.accumulate, batch_shards(mesh, rules)
    if rows % parts:
      raise InputError(f'training.batch_size / accumulate = {rows}: must be a multiple of the {parts} parts of the mesh')
    if experiment.data.positions % mesh.shape['context']:
      raise InputError(f'the length {experiment.data.positions} of a sequence must be a multiple of mesh.context = '
                       f'{mesh.shape["context"]}')
    define(experiment.model).shardings(mesh, rules)
  except InputError as e:
    raise InputError(f'--target {target.name} ({target.devices} devices): {e}') from None
