"""Does a training step fit the memory of the devices at all? Asked before anything is written."""

import math
import os
from pathlib import Path
from typing import Any

import jax

from jaxformer.config import InputError
from jaxformer.models.params import Definition
from jaxformer.sharding import Parallel
from jaxformer.training.experiment import Experiment
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import abstract_train_state

_CGROUPS = 'memory.max', 'memory/memory.limit_in_bytes'  # of version 2 and of version 1


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
      problem=f'a step needs at least {_gigabytes((state + batch) * copies)} '
      f'({_gigabytes(state * copies)} for {definition.size:,} parameters and the optimizer, '
      f'{_gigabytes(batch * copies)} for {t.batch_size:,} x {positions:,} tokens), and '
      f'{"this machine" if shared else device.device_kind} has {_gigabytes(limit)}; must be a '
      'smaller batch, sequence length or model, or a mesh that shards them',
    )


def memory_of(device: jax.Device) -> tuple[int | None, bool]:
  """Return the bytes of memory that programs on a device can have, None if unknown, and whether the
  devices of this process share them."""
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit'), False
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limits = (_number(Path('/sys/fs/cgroup', name)) for name in _CGROUPS)
  return min(n for n in (total, *limits) if n) + _swap(), True


def _bytes(array: Any) -> int:
  shape = array.sharding.shard_shape(array.shape)
  key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
  return math.prod(shape) * (8 if key else array.dtype.itemsize)


def _number(file: Path) -> int | None:
  try:
    return int(file.read_text())
  except (OSError, ValueError):  # no such limit, or `max`
    return None


def _swap() -> int:
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
  except OSError:
    return 0
  return sum(1024 * int(line.split()[1]) for line in lines if line.startswith('SwapTotal:'))


def _gigabytes(count: float) -> str:
  return f'{count / 1e9:,.1f} GB'
