"""Placement of batches: from the host's memory onto a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxformer.config import InputError
from jaxformer.data import Batch, DatasetConfig
from jaxformer.sharding import Parallel


def rows_of_process(sharding: NamedSharding, batch_size: int, length: int) -> tuple[int, int]:
  """Return (index, count): this process's devices hold part `index` of `count` equal parts of a
  global batch.

  Processes that shard heads or time between them, rather than rows, hold the same part.
  """
  places = sharding.devices_indices_map((batch_size, length))
  slices = [places[device][0].indices(batch_size)[:2] for device in sharding.addressable_devices]
  low, high = min(s[0] for s in slices), max(s[1] for s in slices)
  size = high - low
  if batch_size % size or low % size:
    raise InputError(
      f'mesh: the devices of one process hold rows {low} to {high} of a batch of {batch_size}: no '
      'equal part of it'
    )
  return low // size, batch_size // size


class BatchPlacement:
  """Copies the rows that this process loads to its devices. Batches may differ in rows and
  positions, and so may the arrays of one batch (sources and targets).

  Attributes:
    index, count: for the data pipeline: this process loads part `index` of `count` of each batch.
  """

  def __init__(self, parallel: Parallel, batch_size: int, length: int):
    self._sharding = parallel.batch
    self._parts = _shards(batch_size, parallel)
    self._times = times = parallel.parts(self._sharding.spec[1])
    if length % times:
      raise InputError(
        f'data.sequence_length = {length}: must be a multiple of mesh.context = {times}'
      )
    self.index, self.count = rows_of_process(self._sharding, batch_size, length)

  def __call__(self, batch: Batch) -> Batch:
    """Return the batch on the devices, without waiting for the copy."""
    return jax.tree.map(self._put, batch)

  def _put(self, local: np.ndarray) -> Any:
    rows = self.count * len(local)
    if rows % self._parts or local.shape[1] % self._times:
      raise InputError(
        f'data: a batch of {rows} rows of {local.shape[1]} positions cannot be sharded over the '
        f'{self._parts} by {self._times} parts of the mesh'
      )
    return jax.make_array_from_process_local_data(self._sharding, local, (rows, *local.shape[1:]))


def abstract_batch(data: DatasetConfig, batch_size: int, parallel: Parallel) -> Batch:
  """Return the shapes, dtypes and shardings of a batch, for pairs the longest one. Text is not
  opened for it; for other data one row is generated.

  Raises `InputError` if the batch cannot be sharded over the mesh.
  """
  _shards(batch_size, parallel)
  where = parallel.batch
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype, sharding=where),
    data.example(),
  )


def _shards(batch_size: int, parallel: Parallel) -> int:
  """Return over how many parts of the mesh the rows are sharded. Raises `InputError`."""
  parts = parallel.batch_shards
  if batch_size % parts:
    raise InputError(
      'training.batch_size / accumulate', batch_size, f'a multiple of the {parts} parts of the mesh'
    )
  return parts
