"""Does a training step fit the memory of the devices at all? Asked before anything is written."""

import math
from typing import Any

import jax

from jaxformer.config import InputError
from jaxformer.memory import gigabytes, memory_of
from jaxformer.models.params import Definition
from jaxformer.sharding import Parallel
from jaxformer.training.experiment import Experiment
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import abstract_train_state


def check_memory(experiment: Experiment, definition: Definition, parallel: Parallel) -> None:
  """Raise `InputError` for a training step that needs more memory than a device has.

  What it needs is a lower bound, so that nothing which fits is refused: parameters and optimizer
  state exactly, the token ids of a batch, and the output of the last layer with its gradient, at 2
  bytes per number. `jaxformer plan` estimates the rest.
  """
  t, positions = experiment.training, experiment.data.positions
  optimizer = Optimizer(experiment.optimizer, experiment.schedule, t.steps, definition.info)
  state = sum(map(_bytes, jax.tree.leaves(abstract_train_state(definition, optimizer, parallel))))
  parts = parallel.parts(parallel.batch.spec[0]) * parallel.parts(parallel.batch.spec[1])
  tokens = t.batch_size * positions // parts
  batch = 8 * tokens + 4 * tokens // t.accumulate * experiment.model.width
  device = parallel.mesh.local_devices[0]
  limit, shared = memory_of(device)
  copies = len(parallel.mesh.local_devices) if shared else 1
  if limit is not None and (state + batch) * copies > limit:
    raise InputError(
      'training.batch_size',
      t.batch_size,
      problem=f'a step needs at least {gigabytes((state + batch) * copies)} '
      f'({gigabytes(state * copies)} for {definition.size:,} parameters and the optimizer, '
      f'{gigabytes(batch * copies)} for {t.batch_size:,} x {positions:,} tokens), and '
      f'{"this machine" if shared else device.device_kind} has {gigabytes(limit)}; must be a '
      'smaller batch, sequence length or model, or a mesh that shards them',
    )


def _bytes(array: Any) -> int:
  shape = array.sharding.shard_shape(array.shape)
  key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
  return math.prod(shape) * (8 if key else array.dtype.itemsize)
