"""PlanSetup: one model, one slice, one mesh and one workload; the input of every estimate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from jax.sharding import AbstractMesh, AxisType

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.target import Target
from jaxformer.sharding import MeshConfig, Parallel

Phase = Literal['train', 'prefill', 'decode']
OptimizerState = Callable[[ModelConfig, Parallel], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSetup:
  """What is estimated: one step of training or of inference, and where it runs.

  Attributes:
    phase: 'train' is one update; 'prefill' reads prompts of `length` tokens; 'decode' adds one
      token to sequences that hold `length` tokens.
    batch_size: sequences on all devices together.
    length: tokens per sequence.
    remat: policy by which activations are recomputed in the backward pass; training only.
    accumulate: microbatches per update; training only.
    precision: 'fp32' or 'bf16', as in `Chip.flops_per_second`.
    optimizer: (model, parallel) -> its state as abstract arrays with shardings; None for AdamW,
      which has two numbers per parameter.
  """

  model: ModelConfig
  target: Target
  mesh: MeshConfig
  batch_size: int
  length: int
  phase: Phase = 'train'
  remat: str = 'full'
  accumulate: int = 1
  precision: str = 'bf16'
  optimizer: OptimizerState | None = None

  @property
  def abstract_mesh(self) -> AbstractMesh:
    """The mesh over the target's devices. Raises `InputError` if its axes do not multiply to their
    number, or if the slices are not along `replica`."""
    mesh = abstract_mesh(self.mesh, self.target.devices)
    if mesh.shape['replica'] % self.target.slices:
      slices = f'a multiple of {self.target.slices}, the number of slices of {self.target.name}'
      raise InputError('mesh.replica', mesh.shape['replica'], slices)
    return mesh

  @property
  def parallel(self) -> Parallel:
    return Parallel(self.abstract_mesh, self.mesh.rules)

  @property
  def bytes_per_value(self) -> int:
    """Size of a weight or activation in the compute precision."""
    return 4 if self.precision == 'fp32' else 2

  @property
  def local_batch(self) -> tuple[int, int]:
    """(sequences, positions) per device of one microbatch. Raises `InputError` if they do not
    divide evenly over the mesh."""
    table, mesh = self.parallel.table.activations, self.abstract_mesh
    rows, times = (math.prod(mesh.shape[a] for a in table[axis]) for axis in ('batch', 'time'))
    shards = rows * self.accumulate
    if self.batch_size % shards:
      near = max(1, round(self.batch_size / shards)) * shards
      also = f', accumulate = {self.accumulate}' if self.accumulate > 1 else ''
      accepted = f'a multiple of {shards} ({" x ".join(table["batch"])} = {rows}{also}), such as'
      raise InputError('training.batch_size', self.batch_size, f'{accepted} {near}')
    if self.length % times:
      raise InputError('sequence length', self.length, f'a multiple of mesh.context = {times}')
    return self.batch_size // shards, self.length // times

  @property
  def shared_batch(self) -> tuple[int, int]:
    """(sequences, positions) per device of a step of inference. As in the program, what the mesh
    does not divide evenly is replicated; decoding reads one position."""
    rows, times = (
      self.parallel.parts(self.parallel.table.activations[a]) for a in ('batch', 'time')
    )
    length = 1 if self.phase == 'decode' else self.length
    local = self.batch_size // rows if self.batch_size % rows == 0 else self.batch_size
    return local, length // times if length % times == 0 else length

  @property
  def dtype(self) -> str:
    """The compute dtype as JAX names it."""
    return 'float32' if self.precision == 'fp32' else 'bfloat16'

  @property
  def name(self) -> str:
    """'fsdp 16 x tensor 4, batch 64, remat full'."""
    mesh = ' x '.join(f'{axis} {size}' for axis, size in self.mesh.given.items() if size > 1)
    parts = f' in {self.accumulate} microbatches' if self.accumulate > 1 else ''
    return f'{mesh or "one device"}, batch {self.batch_size}{parts}, remat {self.remat}'

  @property
  def overrides(self) -> list[str]:
    """Options of `jaxformer train` for this mesh, batch size, microbatches and remat
    policy."""
    sizes = self.mesh.given.items()
    pairs: list[tuple[str, Any]] = [(f'--mesh.{a}', n) for a, n in sizes if n > 1 or a == 'data']
    pairs += [('--training.batch-size', self.batch_size), ('--training.remat', self.remat)]
    pairs += [('--training.accumulate', self.accumulate)] if self.accumulate > 1 else []
    return [word for name, value in pairs for word in (name, str(value))]


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
  """The mesh of a config over a number of devices that need not exist. Raises `InputError` if its
  axes do not multiply to that number."""
  sizes = config.sizes(devices)
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


Shapes = dict[str, tuple[int, ...]]


def shards_in_use(model: ModelConfig, parallel: Parallel) -> Shapes:
  """Into how many shards each dimension of each parameter is split where it is used, after the
  all-gather over the axes that shard the batch."""
  table, mesh = parallel.table.activations, parallel.mesh

  def shards(axis: str | None, size: int) -> int:
    if axis is None:
      return 1
    n = math.prod(mesh.shape[a] for a in table[axis] if a not in table['batch'])
    return n if size % n == 0 else 1

  return {
    n: tuple(shards(a, s) for a, s in zip(i.axes, i.shape, strict=True))
    for n, i in define(model).info.items()
  }


def shapes_in_use(model: ModelConfig, parallel: Parallel) -> Shapes:
  """The shape of each parameter on a device where it is used. Experts stay where they are: tokens
  are sent to them."""
  table, mesh, shards = parallel.table.params, parallel.mesh, shards_in_use(model, parallel)

  def over(axis: str | None, n: int) -> int:
    return math.prod(mesh.shape[a] for a in table[axis]) if axis == 'experts' else n

  return {
    name: tuple(-(-s // over(a, n)) for s, a, n in zip(i.shape, i.axes, shards[name], strict=True))
    for name, i in define(model).info.items()
  }


def default_mesh(
  model: ModelConfig, target: Target, batch_size: int, accumulate: int = 1
) -> MeshConfig:
  """A mesh for training on a target: slices along `replica`; within a slice the largest `fsdp` that
  divides the width and the batch; the rest along `data` if the batch divides over it, else along
  `tensor` if the model does, else along `context`."""
  n, rows = target.devices_per_slice, batch_size // accumulate
  widths = [
    size
    for i in define(model).info.values()
    for size, axis in zip(i.shape, i.axes, strict=True)
    if axis == 'embed'
  ]
  fitting = [
    f for f in divisors(n) if rows % (f * target.slices) == 0 and all(w % f == 0 for w in widths)
  ]
  fsdp = max(fitting, default=1)
  rest = n // fsdp
  data = rest if rows % (fsdp * rest * target.slices) == 0 else 1
  mesh = MeshConfig(replica=target.slices, data=data, fsdp=fsdp, tensor=rest // data)
  try:
    define(model).abstract(Parallel(abstract_mesh(mesh, target.devices), mesh.rules))
  except InputError:
    return mesh.replace(tensor=1, context=mesh.tensor)
  return mesh


def divisors(n: int) -> list[int]:
  """The divisors of a number, smallest first."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*small, *(n // d for d in small)})
