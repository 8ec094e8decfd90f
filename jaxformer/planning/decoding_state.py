"""Decoding state of a model on a mesh: the arrays that reading a prompt leaves on each device, and
what reading it needs besides, by tracing, without a formula for any layer.

The program that reads a prompt is traced under the mesh; the constraints of the layers on their
activations, and the shards of the weights, are propagated to the state (`residuals.propagate`). A
dimension that a mesh axis does not divide, such as few key/value heads on a wide `tensor` axis, is
replicated in the program, and so it is here.

A TPU holds arrays in tiles: of the last dimension in memory 128 numbers, of the one before it 8, or
as many as the next power of two has where that dimension is smaller. The compiler orders the
dimensions of a state so that the padded array is the smallest (`tiled_bytes`): matrices of 64 x 64
take twice their bytes, keys of 64 channels only theirs."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.layers.layer import Context
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.liveness import peak_bytes
from jaxformer.planning.residuals import TracedArray, propagate, traced
from jaxformer.planning.setup import PlanSetup, shards_in_use
from jaxformer.sharding import Parallel, assume_platform, use_mesh

_PROMPT = 16  # tokens of the prompt that is traced; a state is of the same size after any
_LANES, _SUBLANES = 128, 8
TRACES = 32  # programs that are kept, some MB each


def state_bytes_per_device(setup: PlanSetup) -> tuple[int, int]:
  """Bytes per device of the state of `setup.batch_size` sequences of up to `setup.length` tokens,
  and those that a TPU adds by its tiles; of an encoder-decoder, sources have `length` tokens
  too."""
  state = _state(setup.model, setup.parallel, setup.batch_size, setup.length, setup.dtype)
  size = sum(a.bytes for a in state)
  if setup.target.platform != 'tpu':
    return size, 0
  return size, sum(tiled_bytes(a.local, a.dtype.itemsize) for a in state) - size


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
  """Bytes of an array in the tiles of a TPU, in the order of dimensions that needs the fewest."""
  if len(shape) < 2:
    return math.prod(shape) * itemsize

  def padded(row: int, lane: int) -> int:
    tile = min(_SUBLANES, 1 << (row - 1).bit_length())
    return -(-row // tile) * tile * -(-lane // _LANES) * _LANES

  pairs = itertools.permutations(shape, 2)
  return itemsize * min(math.prod(shape) // (r * n) * padded(r, n) for r, n in pairs)


@functools.lru_cache(maxsize=256)
def _state(
  model: ModelConfig, parallel: Parallel, batch: int, length: int, dtype: str
) -> list[TracedArray]:
  # The kernels of a platform change no state.
  with use_mesh(parallel), assume_platform('cpu'):
    closed, params = _reading(model, batch, min(_PROMPT, length), length, dtype)
  in_use = shards_in_use(model, parallel)
  rows = parallel.batch_shards if batch % parallel.batch_shards == 0 else 1
  given = [traced(params[name], in_use[name]) for name in sorted(params)]
  given += [traced(v.aval, (rows, 1), activation=True) for v in closed.jaxpr.invars[len(given) :]]
  return propagate(closed.jaxpr, given)[1:]


def prefill_bytes_per_device(setup: PlanSetup) -> int:
  """Bytes per device of the arrays that reading prompts of `setup.length` tokens has in memory at
  once, besides weights and state (`liveness`), for the part of the batch that a device has."""
  shards = shards_in_use(setup.model, setup.parallel)
  given = setup.model, *setup.shared_batch, setup.dtype, setup.target.platform
  return _peak(*given, tuple(shards.items()))


@functools.lru_cache(maxsize=256)
def _peak(
  model: ModelConfig,
  B: int,
  T: int,
  dtype: str,
  platform: str,
  shards: tuple[tuple[str, tuple[int, ...]], ...],
) -> int:
  closed, params = _prefill(model, B, T, dtype, platform)
  given = [traced(params[name], dict(shards)[name]) for name in sorted(params)]
  given += [traced(v.aval, activation=True) for v in closed.jaxpr.invars[len(given) :]]
  return peak_bytes(closed.jaxpr, given, outputs=False)


# One program serves all meshes, of which only the shards differ.
@functools.lru_cache(maxsize=TRACES)
def _prefill(
  model: ModelConfig, B: int, T: int, dtype: str, platform: str
) -> tuple[Any, dict[str, Any]]:
  with assume_platform(platform):
    return _reading(model, B, T, T, dtype)


def _reading(
  model: ModelConfig, batch: int, prompt: int, length: int, dtype: str
) -> tuple[Any, dict[str, Any]]:
  """The traced program that reads prompts and returns the logits of their last positions and the
  state, and its parameters."""
  definition = define(model)
  params = definition.abstract(dtype=jnp.dtype(dtype))
  inputs = [jax.ShapeDtypeStruct((batch, prompt), jnp.int32)]
  if model.task.inputs == 'pairs':
    inputs.append(jax.ShapeDtypeStruct((batch, length), jnp.int32))

  def read(params: Any, ids: Any, *source: Any) -> Any:
    module, ctx = definition.merge(params), Context(unroll=False)
    if source:
      memory = module.encode(*source, ctx)
      out = module.hidden(ids, memory, ctx, module.init_state(memory, length))
    else:
      out = module.hidden(ids, ctx.replace(fresh=True), module.init_state(batch, length))
    return module.logits(out.y[:, -1]), out.state

  return jax.make_jaxpr(read)(params, *inputs), params
