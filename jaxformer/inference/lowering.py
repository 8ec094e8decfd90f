"""Reading prompts, and drawing one more token, from shapes alone: what serving a model would
compile.

Parameters are in bfloat16 and divided over the mesh by its rules; what the model remembers is
divided as the programs leave it."""

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
  """Reads `batch` prompts and draws a token after each.

  Args:
    context_length: positions that the model's state has room for.
    prompt: tokens of each prompt; None for as many as there is room for.
  """
  T, longest = context_length if prompt is None else prompt, definition.config.max_len
  if batch < 1 or T < 1:
    raise InputError(f'batch = {batch} and context_length = {T}: must be positive')
  if longest is not None and context_length > longest:
    raise InputError(
      f'context_length = {context_length}: must be at most the {longest} positions that the model has learned'
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
  """Draws tokens with a state that has room for `context` of them, one for each of `batch`
  sequences in each round of its loop.

  Where the state lives is what reading a short prompt leaves, so that program is compiled first.
  """
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
  """In bfloat16, but for those that stay in fp32."""
  return {
    name: jax.ShapeDtypeStruct(
      a.shape,
      a.dtype if definition.info[name].full_precision else jnp.bfloat16,
      sharding=a.sharding,
    )
    for name, a in definition.abstract(mesh, rules).items()
  }
