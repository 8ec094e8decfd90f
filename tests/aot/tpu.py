"""Compiling for a TPU in tests, and looking into the program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.planning.collectives import Traffic, list_collectives, traffic_by_kind
from jaxformer.planning.hlo import text_of


def compile_for_tpu(
  f: Callable[..., Any], *arguments: Any, mesh: Mesh, **jit_options: Any
) -> jax.stages.Compiled:
  """`jax.jit(f, **jit_options)` compiled for the devices of `mesh`, under it, so that
  `sharding.platform()` is 'tpu'.

  Args:
    arguments: `jax.ShapeDtypeStruct`s, with shardings on `mesh`; one without is replicated.
  """
  whole = sharding.Parallel(mesh).replicated
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=getattr(a, 'sharding', None) or whole
    ),
    arguments,
  )
  with sharding.use_mesh(sharding.Parallel(mesh)):
    return jax.jit(f, **jit_options).trace(*arguments).lower(lowering_platforms=('tpu',)).compile()


def has_array(compiled: jax.stages.Compiled, *dims: int) -> bool:
  """Whether some array of a compiled program has these dimensions next to each other."""
  return re.search(rf'[\[,]{",".join(map(str, dims))}[\],]', text_of(compiled)) is not None


def collectives(compiled: jax.stages.Compiled) -> dict[str, Traffic]:
  """Kind of collective -> what one run of a compiled program sends with it."""
  return traffic_by_kind(list_collectives(compiled))
