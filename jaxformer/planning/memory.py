"""Bytes per device of a training step or of inference, part by part, from abstract shapes.

Parameters, optimizer state, batch and decoding state are exact. The activations that the forward
pass keeps are traced (`residuals`), so they hold for any layer and remat policy. The other parts
estimate what a compiler does with a training step:

- the weights are cast to the compute dtype once, with the sharding of the parameters;
- gradients leave the backward pass in the compute dtype; microbatches are summed in fp32 besides;
- the backward pass of one period recomputes what was not kept, and needs as much again for the
  cotangents of the two widest arrays: `working` is what the largest period would keep without
  remat;
- over `fsdp` the unsharded weights of one block are there twice (one in use, the next being
  all-gathered), and its unsharded gradients once before they are reduce-scattered: `gathered`;
- cross-entropy holds slices of logits of at most `LOGIT_BYTES` in fp32, as many again in the
  backward pass, and the gradient of its input in fp32.

The state of inference is held once, since loops update it in place; what reading a prompt needs
besides is traced (`liveness`), and decoding needs next to nothing.

On the training steps of `experiments/plan_table.md` the sum is within 15 % of what the TPU compiler
reports, except where that table says otherwise.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.layers.layer import Context
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Definition, define
from jaxformer.ops.implementation import implementation
from jaxformer.planning.decoding_state import (
  TRACES,
  prefill_bytes_per_device,
  state_bytes_per_device,
)
from jaxformer.planning.residuals import TracedArray, residuals, traced
from jaxformer.planning.setup import PlanSetup, Shapes, shapes_in_use, shards_in_use
from jaxformer.sharding import assume_platform
from jaxformer.task_type import Batch

LOGIT_BYTES = 2**26  # the size of a slice in `ops.loss_vocabulary`
_BLOCK = re.compile(r'(.*\bgroups\.\d+\.\d+)\.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
  """Bytes per device; a part that a phase does not have is 0.

  Attributes:
    parameters: fp32; training.
    optimizer: its state.
    batch: token ids and targets.
    weights: the parameters in the compute dtype.
    gradients: in the compute dtype, and the fp32 sums of microbatches.
    activations: kept for the backward pass under the remat policy.
    working: of the backward pass of one period; of prefill, the arrays that are in memory at once.
    gathered: unsharded weights and gradients of a block.
    loss: slices of logits, and the gradient of the head's input.
    state: keys and values, or recurrent state, of inference.
    padding: of the state in the tiles of a TPU.
  """

  parameters: int = 0
  optimizer: int = 0
  batch: int = 0
  weights: float = 0
  gradients: int = 0
  activations: int = 0
  working: int = 0
  gathered: int = 0
  loss: int = 0
  state: float = 0
  padding: int = 0

  @property
  def arguments(self) -> int:
    """Bytes that a training step is given."""
    return self.parameters + self.optimizer + self.batch

  @property
  def temporaries(self) -> float:
    """Bytes that it allocates besides."""
    return self.total - self.arguments

  @property
  def total(self) -> float:
    return sum(getattr(self, f.name) for f in dataclasses.fields(self))


def abstract_batch(model: ModelConfig, batch: int, length: int) -> Batch:
  """`batch` sequences of `length` positions, of the kind that the model reads."""
  ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  task = model.task
  if task.features is not None:
    return Batch(jax.ShapeDtypeStruct((batch, length, task.features), jnp.float32), ids)
  return Batch(ids, ids, source_BS=ids if task.inputs == 'pairs' else None)


def bytes_of(arrays: Any) -> int:
  """Bytes per device of abstract arrays: of their shards, or of the whole array if replicated."""

  def one(a: Any) -> int:
    shape = a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)
    return math.prod(shape) * a.dtype.itemsize

  return sum(map(one, jax.tree.leaves(arrays)))


def memory(setup: PlanSetup) -> DeviceMemory:
  """Memory of a setup on each of its devices."""
  *_, found = _sums(setup)
  return found


def fits(setup: PlanSetup) -> bool:
  """Whether `memory(setup).total` is at most the memory of a device. Traces only what decides."""
  return all(m.total <= setup.target.device_memory_bytes for m in _sums(setup))


def _sums(setup: PlanSetup) -> Iterable[DeviceMemory]:
  """The memory with more and more of its parts, the last with all."""
  return _training_memory(setup) if setup.phase == 'train' else [_inference_memory(setup)]


def _inference_memory(setup: PlanSetup) -> DeviceMemory:
  definition = define(setup.model)
  # decoding all-gathers no weights: it costs less to send the activations of one token
  gathered = 2 * _largest_block(definition, setup) if setup.phase == 'prefill' else 0
  state, padding = state_bytes_per_device(setup)
  return DeviceMemory(
    weights=bytes_of(definition.abstract(setup.parallel, jnp.dtype(setup.dtype))),
    working=prefill_bytes_per_device(setup) if setup.phase == 'prefill' else 0,
    gathered=gathered,
    state=state,
    padding=padding,
  )


def _training_memory(setup: PlanSetup) -> Iterator[DeviceMemory]:
  """The memory without what is traced, then with activations, then all of it."""
  model, parallel = setup.model, setup.parallel
  definition = define(model)
  params = definition.abstract(parallel)
  parameters = bytes_of(params)
  optimizer = None if setup.optimizer is None else setup.optimizer(model, parallel)
  B, T = setup.local_batch
  shards = shards_in_use(model, parallel)
  size = setup.bytes_per_value
  cast = [] if size == 4 else [n for n, i in definition.info.items() if not i.full_precision]
  narrow = sum(bytes_of(params[n]) // 4 * size for n in cast)
  logits = min(LOGIT_BYTES, 4 * B * T * (model.task.vocab_size or 0))
  found = DeviceMemory(
    parameters=parameters,
    optimizer=2 * parameters if optimizer is None else bytes_of(optimizer),
    batch=8 * setup.accumulate * B * T,
    weights=narrow,
    gradients=(narrow or parameters) + (parameters if setup.accumulate > 1 else 0),
    gathered=3 * _largest_block(definition, setup),
    loss=2 * logits + 4 * B * T * model.width,
  )
  yield found
  activations = sum(r.bytes for r in _activations(setup, shards, setup.remat))
  found = dataclasses.replace(found, activations=activations)
  yield found
  if setup.remat != 'none':
    working = _largest_period(_activations(setup, shards, 'none'))
    yield dataclasses.replace(found, working=working)


# ---- activations -------------------------------------------------------------------------------


def _activations(setup: PlanSetup, shards: Shapes, remat: str) -> list[TracedArray]:
  """The arrays that a forward pass keeps and that depend on the batch."""
  return _residuals(
    setup.model,
    *setup.local_batch,
    remat,
    setup.dtype,
    setup.target.platform,
    tuple(shards.items()),
  )


@functools.lru_cache(maxsize=256)
def _residuals(
  model: ModelConfig,
  B: int,
  T: int,
  remat: str,
  dtype: str,
  platform: str,
  shards: tuple[tuple[str, tuple[int, ...]], ...],
) -> list[TracedArray]:
  closed = _backward(model, B, T, remat, dtype, platform)
  split = dict(shards)
  # `make_jaxpr` flattens a dictionary by sorted keys; the batch's arrays follow.
  inputs = [
    traced(v.aval, split[n]) for v, n in zip(closed.jaxpr.invars, sorted(split), strict=False)
  ]
  inputs += [traced(v.aval, activation=True) for v in closed.jaxpr.invars[len(inputs) :]]
  return [r for r in residuals(closed.jaxpr, inputs) if r.activation]


# One program serves all meshes, of which only the shards differ.
@functools.lru_cache(maxsize=TRACES)
def _backward(model: ModelConfig, B: int, T: int, remat: str, dtype: str, platform: str) -> Any:
  """The traced program that returns the backward function of the loss."""
  definition = define(model)

  def backward(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
      module: Any = definition.merge(definition.cast(params, jnp.dtype(dtype)))
      return module.loss(batch, Context(remat=remat, unroll=False))[0].loss

    return jax.vjp(loss, params)[1]

  # On several devices the loss is computed in slices of the vocabulary whatever its size; here no
  # mesh is active, so it is selected by name.
  with assume_platform(platform), implementation(cross_entropy='vocabulary'):
    return jax.make_jaxpr(backward)(definition.abstract(), abstract_batch(model, B, T))


def _largest_period(kept: list[TracedArray]) -> int:
  """Bytes of the activations of one iteration of the loop whose iterations keep most; of what no
  loop keeps, all."""
  loops: dict[int, int] = {}
  for r in kept:
    loops[r.iterations] = loops.get(r.iterations, 0) + r.bytes // r.iterations
  return max(loops.values(), default=0)


def _largest_block(definition: Definition, setup: PlanSetup) -> int:
  """Bytes of the unsharded weights of the largest block; 0 if nothing is all-gathered."""
  where, in_use = definition.shardings(setup.parallel), shapes_in_use(setup.model, setup.parallel)
  blocks: dict[str, int] = {}
  for name, info in definition.info.items():
    found, used = _BLOCK.match(name), math.prod(in_use[name])
    if found is None or math.prod(where[name].shard_shape(info.shape)) >= used:
      continue
    each = used // (info.shape[0] if info.axes[0] == 'layers' else 1)
    blocks[found.group(1)] = blocks.get(found.group(1), 0) + each * setup.bytes_per_value
  return max(blocks.values(), default=0)
