"""Batches from the host's memory onto a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxformer.config import InputError
from jaxformer.sharding import Rules, batch_sharding, batch_shards
from jaxformer.task_type import Batch


def rows_of_process(sharding: NamedSharding, batch_size: int, length: int) -> tuple[int, int]:
  """(index, count): of `count` equal parts of a global batch, this process's devices hold part
  `index`.

  Processes that divide heads or time between them, rather than rows, have the same part.
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


class Feed:
  """Puts the rows that this process loads where its devices want them. Batches may differ in their
  number of rows and of positions, and so may the arrays of one batch in theirs (sources and
  targets).

  Attributes:
    index, count: for the data pipeline: this process loads part `index` of `count` of each batch.
  """

  def __init__(self, mesh: Mesh, rules: Rules | str, batch_size: int, length: int):
    self._sharding = batch_sharding(mesh, rules)
    self._parts = parts = batch_shards(mesh, rules)
    if batch_size % parts:
      raise InputError(
        f'training.batch_size / accumulate = {batch_size}: must be a multiple of the {parts} parts '
        'of the mesh'
      )
    pieces = self._sharding.spec[1] if len(self._sharding.spec) > 1 else None
    self._times = times = math.prod(
      mesh.shape[a] for a in ((pieces,) if isinstance(pieces, str) else pieces or ())
    )
    if length % times:
      raise InputError(
        f'data.sequence_length = {length}: must be a multiple of mesh.context = {times}'
      )
    self.index, self.count = rows_of_process(self._sharding, batch_size, length)

  def __call__(self, batch: Batch) -> Batch:
    """The batch on the devices. Returns at once."""
    return jax.tree.map(self._put, batch)

  def _put(self, local: np.ndarray) -> Any:
    rows = self.count * len(local)
    if rows % self._parts or local.shape[1] % self._times:
      raise InputError(
        f'data: a batch of {rows} rows of {local.shape[1]} positions cannot be divided into the '
        f'{self._parts} by '
        f'{self._times} parts of the mesh'
      )
    if self.count == 1:
      return jax.device_put(local, self._sharding)
    first = self.index * len(local)

    def part(place: Any) -> np.ndarray:
      low, high, _ = place[0].indices(rows)
      return local[low - first : high - first, *place[1:]]

    return jax.make_array_from_callback((rows, *local.shape[1:]), self._sharding, part)
