"""Bytes that one device needs for a training step, part by part, from abstract shapes.

Parameters, optimizer state and batch are exact. What the forward pass keeps is traced
(`residuals`), so it holds for any layer and remat policy. The rest is what a compiler does with a
step, estimated:

- the weights are rounded to the compute dtype once, divided as the parameters are;
- gradients come out of the backward pass in the compute dtype, when it needs most; microbatches add
  them up in fp32 beside;
- the backward pass of one period computes again what was not kept, and holds it with as much again
  in cotangents of the two widest arrays: `working` is what the period would keep without remat, the
  largest period counts;
- over `fsdp` the whole weights of one block are there twice (one in use, the next on its way), and
  its whole gradients once before they are scattered: `gathered`;
- cross-entropy holds slices of logits (`ops.loss_vocabulary`: at most 64 MiB in fp32, and as much
  again in backward), and the gradient of its input in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxformer.config import InputError
from jaxformer.layers.layer import Context
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Definition, define
from jaxformer.ops.implementation import implementation
from jaxformer.planning.residuals import Kept, kept_arrays
from jaxformer.sharding import MeshConfig, Rules, assume_platform, rules_of
from jaxformer.task_type import Batch

_BLOCK = re.compile(r'(.*\bgroups\.\d+\.\d+)\.')
_LOGIT_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parameters: fp32.
    optimizer: its state.
    batch: token ids and targets.
    weights: the parameters in the compute dtype.
    gradients: in the compute dtype, and the fp32 sums of microbatches.
    activations: kept by the remat policy for the backward pass.
    working: of one period's backward pass.
    gathered: whole weights and gradients of a block.
    loss: slices of logits and the gradient of the head's input.
  """

  parameters: int
  optimizer: int
  batch: int
  weights: int
  gradients: int
  activations: int
  working: int
  gathered: int
  loss: int

  @property
  def arguments(self) -> int:
    """What is there before the step."""
    return self.parameters + self.optimizer + self.batch

  @property
  def temporaries(self) -> int:
    """What the step needs beside."""
    return self.total - self.arguments

  @property
  def total(self) -> int:
    return sum(getattr(self, f.name) for f in dataclasses.fields(self))


def abstract_batch(model: ModelConfig, batch: int, length: int) -> Batch:
  """`batch` sequences of `length` positions, of what the model reads."""
  ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  task = model.task
  if task.features is not None:
    return Batch(jax.ShapeDtypeStruct((batch, length, task.features), jnp.float32), ids)
  return Batch(ids, ids, source_BS=ids if task.inputs == 'pairs' else None)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
  """The mesh of a config over a number of devices that need not exist. Raises `InputError` where
  its axes do not multiply to it."""
  sizes = config.sizes(devices)
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def bytes_of(arrays: Any) -> int:
  """Of abstract arrays on one device: whole, or the part that their sharding gives it."""

  def one(a: Any) -> int:
    shape = a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)
    size = 8 if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a.dtype.itemsize
    return math.prod(shape) * size

  return sum(map(one, jax.tree.leaves(arrays)))


def local_batch(
  mesh: AbstractMesh, rules: Rules | str, batch_size: int, length: int, accumulate: int = 1
) -> tuple[int, int]:
  """(sequences, positions) that one device has of a microbatch. Raises `InputError` where the mesh
  does not divide them."""
  table = rules_of(rules).activations
  parts, times = (math.prod(mesh.shape[a] for a in table[axis]) for axis in ('batch', 'time'))
  if batch_size % accumulate or batch_size // accumulate % parts:
    near = max(1, round(batch_size / parts / accumulate)) * parts * accumulate
    raise InputError(
      f'training.batch_size = {batch_size}: must be a multiple of {parts * accumulate} '
      f'({" x ".join(table["batch"])} = {parts}'
      f'{f", accumulate = {accumulate}" if accumulate > 1 else ""}); {near} would do'
    )
  if length % times:
    raise InputError(f'sequence length = {length}: must be a multiple of mesh.context = {times}')
  return batch_size // accumulate // parts, length // times


def training_memory(
  model: ModelConfig,
  mesh: AbstractMesh,
  rules: Rules | str,
  batch_size: int,
  length: int,
  *,
  remat: str = 'none',
  accumulate: int = 1,
  dtype: Any = jnp.bfloat16,
  optimizer: Any = None,
  platform: str = 'tpu',
) -> Memory:
  """Memory of a training step on each device of a mesh.

  Args:
    optimizer: its state, as abstract arrays with shardings on the mesh; None for AdamW's, two
      numbers a parameter.
    platform: 'tpu', 'gpu' or 'cpu': whose kernels are traced.
  """
  definition = define(model)
  params = definition.abstract(mesh, rules)
  parameters = bytes_of(params)
  B, T = local_batch(mesh, rules, batch_size, length, accumulate)
  tensor = _parts_in_use(definition, mesh, rules)
  activations = [k for k in _kept(model, B, T, remat, dtype, platform, tensor) if k.activation]
  every = (
    activations
    if remat == 'none'
    else [k for k in _kept(model, B, T, 'none', dtype, platform, tensor) if k.activation]
  )
  size = jnp.dtype(dtype).itemsize
  narrow = (
    0
    if size == 4
    else sum(
      bytes_of(p) // 4 * size for n, p in params.items() if not definition.info[n].full_precision
    )
  )
  logits = min(_LOGIT_BYTES, 4 * B * T * (model.task.vocab_size or 0))
  return Memory(
    parameters=parameters,
    optimizer=2 * parameters if optimizer is None else bytes_of(optimizer),
    batch=8 * accumulate * B * T,
    weights=narrow,
    gradients=(narrow or parameters) + (parameters if accumulate > 1 else 0),
    activations=sum(k.bytes for k in activations),
    working=0 if remat == 'none' else _largest_period(every),
    gathered=_gathered(definition, mesh, tensor, rules, size),
    loss=2 * logits + 4 * B * T * model.width,
  )


@functools.lru_cache(maxsize=256)
def _kept_cached(
  model: ModelConfig,
  B: int,
  T: int,
  remat: str,
  dtype: Any,
  platform: str,
  tensor: tuple[tuple[int, ...], ...],
) -> list[Kept]:
  definition = define(model)

  def backward(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
      module: Any = definition.merge(definition.cast(params, dtype))
      return module.loss(batch, Context(remat=remat, unroll=False))[0].loss

    return jax.vjp(loss, params)[1]

  parts = dict(zip(definition.info, tensor, strict=True))
  # A mesh of several devices takes the loss in slices of the vocabulary whatever its size; none is
  # active here.
  with assume_platform(platform), implementation(cross_entropy='vocabulary'):
    return kept_arrays(backward, definition.abstract(), parts, abstract_batch(model, B, T))


def _kept(
  model: ModelConfig,
  B: int,
  T: int,
  remat: str,
  dtype: Any,
  platform: str,
  tensor: Mapping[str, tuple[int, ...]],
) -> list[Kept]:
  return _kept_cached(model, B, T, remat, jnp.dtype(dtype), platform, tuple(tensor.values()))


def _parts_in_use(
  definition: Definition, mesh: AbstractMesh, rules: Rules | str
) -> dict[str, tuple[int, ...]]:
  """In how many parts each dimension of each parameter is divided where it is used; axes that
  divide the batch are gathered."""
  table = rules_of(rules).activations

  def parts(axis: str | None, size: int) -> int:
    n = (
      1
      if axis is None
      else math.prod(mesh.shape[a] for a in table[axis] if a not in table['batch'])
    )
    return n if size % n == 0 else 1

  return {
    n: tuple(parts(a, s) for a, s in zip(i.axes, i.shape, strict=True))
    for n, i in definition.info.items()
  }


def _largest_period(kept: list[Kept]) -> int:
  """Bytes of the activations of one round, of the loop whose rounds keep most; of what no loop
  keeps, all."""
  loops: dict[int, int] = {}
  for k in kept:
    loops[k.rounds] = loops.get(k.rounds, 0) + k.bytes // k.rounds
  return max(loops.values(), default=0)


def _gathered(
  definition: Definition,
  mesh: Any,
  tensor: Mapping[str, tuple[int, ...]],
  rules: Rules | str,
  size: int,
) -> int:
  """Whole weights of the largest block, two of them, and its gradients; 0 where nothing is
  gathered. Experts stay where they are: tokens travel to them."""
  where, table = definition.shardings(mesh, rules), rules_of(rules).params
  blocks: dict[str, int] = {}
  for name, info in definition.info.items():
    if (found := _BLOCK.match(name)) is None:
      continue
    axes = zip(info.shape, info.axes, tensor[name], strict=True)
    shape = [
      -(-n // (math.prod(mesh.shape[m] for m in table[a]) if a == 'experts' else p))
      for n, a, p in axes
    ]
    if math.prod(where[name].shard_shape(info.shape)) < math.prod(shape):
      each = math.prod(shape) // (info.shape[0] if info.axes[0] == 'layers' else 1)
      blocks[found.group(1)] = blocks.get(found.group(1), 0) + each * size
  return 3 * max(blocks.values(), default=0)
