"""Lowered prefill and decode programs from shapes alone: what serving a model compiles.

Parameters are in bfloat16 and sharded by the rules of the mesh; the state is sharded as the prefill
program leaves it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxformer.config import InputError
from jaxformer.inference.decoding import advance, begin, bucket
from jaxformer.inference.sampling import GREEDY
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition
from jaxformer.sharding import Rules, replicated, use_mesh


def lowered_prefill(
  definition: Definition[LanguageModel],
  mesh: Mesh,
  rules: Rules | str,
  batch: int,
  context_length: int,
  prompt: int | None = None,
) -> jax.stages.Lowered:
  """Lower the program that reads `batch` prompts and samples one token for each.

  Args:
    context_length: maximum number of positions in the model's state.
    prompt: tokens of each prompt; None for `context_length`.
  """
  T, longest = context_length if prompt is None else prompt, definition.config.max_len
  if batch < 1 or T < 1:
    raise InputError(f'batch = {batch} and context_length = {T}: must be positive')
  if longest is not None and context_length > longest:
    raise InputError(
      'context_length', context_length, f'at most {longest}, the learned positions of the model'
    )
  ids = _array((batch, T), jnp.int32, mesh)
  numbers = _array((), jnp.uint32, mesh), _array((), jnp.int32, mesh)
  with use_mesh(mesh, rules):
    return begin.trace(
      definition,
      _params(definition, mesh, rules),
      ids,
      ids,
      *numbers,
      sampling=GREEDY,
      max_len=context_length,
      max_new_tokens=1,
      where=(mesh, rules),
    ).lower(lowering_platforms=(mesh.devices.flat[0].platform,))


def lowered_decode(
  definition: Definition[LanguageModel],
  mesh: Mesh,
  rules: Rules | str,
  batch: int,
  context_length: int,
) -> jax.stages.Lowered:
  """Lower the decode loop: one token per step for each of `batch` sequences, with a state of
  `context_length` positions.

  The sharding of the state is what prefill leaves, so that program is compiled first, for a short
  prompt."""
  reading = lowered_prefill(
    definition, mesh, rules, batch, context_length, min(bucket(1), context_length)
  )
  read: Any = reading.compile()
  decoding = jax.tree.map(
    lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
    reading.out_info,
    read.output_shardings,
  )
  number = _array((), jnp.int32, mesh)
  with use_mesh(mesh, rules):
    return advance.trace(
      definition,
      _params(definition, mesh, rules),
      decoding,
      number,
      number,
      sampling=GREEDY,
      where=(mesh, rules),
    ).lower(lowering_platforms=(mesh.devices.flat[0].platform,))


def _array(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _params(definition: Definition, mesh: Mesh, rules: Rules | str) -> Any:
  """In bfloat16, except those marked `full_precision`."""
  return {
    name: jax.ShapeDtypeStruct(
      a.shape,
      a.dtype if definition.info[name].full_precision else jnp.bfloat16,
      sharding=a.sharding,
    )
    for name, a in definition.abstract(mesh, rules).items()
  }
