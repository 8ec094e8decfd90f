"""Decoding state of a model on a mesh: the arrays that reading a prompt leaves on each device, by
tracing, without a formula for any layer.

The program that reads a prompt is traced under the mesh; the constraints of the layers on their
activations, and the shards of the weights, are propagated to the state (`residuals.propagate`). A
dimension that a mesh axis does not divide, such as few key/value heads on a wide `tensor` axis, is
replicated in the program, and so it is here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.layers.layer import Context
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.residuals import propagate, traced
from jaxformer.planning.setup import shards_in_use
from jaxformer.sharding import Parallel, assume_platform, use_mesh

_PROMPT = 16  # tokens of the prompt that is traced; a state is of the same size after any


@functools.lru_cache(maxsize=256)
def state_bytes_per_device(
  model: ModelConfig, parallel: Parallel, batch: int, length: int, dtype: str
) -> int:
  """Bytes per device of the state of `batch` sequences of up to `length` tokens, in a program that
  computes in `dtype`; of an encoder-decoder, sources have `length` tokens too."""
  definition = define(model)
  params = definition.abstract(dtype=jnp.dtype(dtype))
  in_use = shards_in_use(model, parallel)
  rows = parallel.batch_shards if batch % parallel.batch_shards == 0 else 1
  ids = jax.ShapeDtypeStruct((batch, min(_PROMPT, length)), jnp.int32)
  inputs = [ids]
  if model.task.inputs == 'pairs':
    inputs.append(jax.ShapeDtypeStruct((batch, length), jnp.int32))

  def state(params: Any, ids: Any, *source: Any) -> Any:
    module, ctx = definition.merge(params), Context(unroll=False)
    if source:
      memory = module.encode(*source, ctx)
      return module.hidden(ids, memory, ctx, module.init_state(memory, length)).state
    return module.hidden(ids, ctx.replace(fresh=True), module.init_state(batch, length)).state

  # The kernels of a platform change no state.
  with use_mesh(parallel), assume_platform('cpu'):
    closed = jax.make_jaxpr(state)(params, *inputs)
  given = [traced(params[name], in_use[name]) for name in sorted(params)]
  given += [traced(x, (rows, 1), activation=True) for x in inputs]
  return sum(array.bytes for array in propagate(closed.jaxpr, given))
