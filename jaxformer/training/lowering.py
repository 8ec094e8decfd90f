"""A training step from shapes alone: what a run would compile, without its data, its parameters or
its devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxformer.config import InputError
from jaxformer.data import Batch, DataConfig, DatasetConfig, Pairs
from jaxformer.models.params import Definition, define
from jaxformer.sharding import Rules, batch_sharding, batch_shards, use_mesh
from jaxformer.training.checkpoint import abstract_state
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import StepConfig, TrainState, compiled_train_step, state_shardings


def compute_dtype(name: str, mesh: Mesh) -> Any:
  """'auto' is bfloat16 where there is hardware for it."""
  if name == 'auto':
    name = 'float32' if mesh.devices.flat[0].platform == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def step_config(experiment: Experiment, mesh: Mesh) -> StepConfig:
  """What the experiment's training says of a step on a mesh."""
  t = experiment.training
  return StepConfig(
    t.accumulate, compute_dtype(t.dtype, mesh), t.remat, t.z_loss, t.label_smoothing
  )


def abstract_train_state(
  definition: Definition, optimizer: Optimizer, mesh: Mesh, rules: Rules | str
) -> TrainState:
  """Shapes, dtypes and shardings of a training state."""
  shapes: Any = {n: jax.ShapeDtypeStruct(i.shape, i.dtype) for n, i in definition.info.items()}
  key: Any = jax.eval_shape(lambda: jax.random.key(0))
  step: Any = jax.ShapeDtypeStruct((), jnp.int32)
  state = TrainState(step, shapes, jax.eval_shape(optimizer.init, shapes), key)
  return abstract_state(state, state_shardings(definition, optimizer, mesh, rules))


def abstract_batch(data: DatasetConfig, batch_size: int, mesh: Mesh, rules: Rules | str) -> Batch:
  """Shapes, dtypes and shardings of a batch, of pairs one of the longest. Text has no part in them
  and is not opened; of other data one row is made.

  Raises `InputError` where the mesh cannot divide the batch.
  """
  parts = batch_shards(mesh, rules)
  if batch_size % parts:
    raise InputError(
      f'training.batch_size / accumulate = {batch_size}: must be a multiple of the {parts} parts '
      'of the mesh'
    )
  if isinstance(data, DataConfig):
    ids = np.broadcast_to(np.int32(0), (1, data.sequence_length))
    row: Any = Batch(ids, ids, ids if data.packing.segmented else None)
  elif isinstance(data, Pairs):
    source, target = (
      np.broadcast_to(np.int32(0), (1, n[-1])) for n in (data.source_lengths, data.target_lengths)
    )
    row = Batch(target, target, source_BS=source)
  else:
    row = data.open().train_batch(0, 1, 0)
  where = batch_sharding(mesh, rules)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype, sharding=where), row
  )


def lowered_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
  """The step of an experiment for the devices of a mesh, which may be those of a described machine
  (`planning.topology_mesh`).

  Raises `InputError` for what does not fit together: data and model, or an axis of the mesh and a
  dimension."""
  e, rules = experiment, experiment.mesh.rules
  check_fit(e.model, e.data)
  definition = define(e.model)
  optimizer = Optimizer.of(e.optimizer, e.schedule, e.training.steps, definition)
  state = abstract_train_state(definition, optimizer, mesh, rules)
  abstract_batch(e.data, e.training.batch_size // e.training.accumulate, mesh, rules)
  batch = abstract_batch(e.data, e.training.batch_size, mesh, rules)
  with use_mesh(mesh, rules):
    step = compiled_train_step(definition, optimizer, step_config(e, mesh), mesh, rules)
    return step.trace(state, batch).lower(lowering_platforms=(mesh.devices.flat[0].platform,))
