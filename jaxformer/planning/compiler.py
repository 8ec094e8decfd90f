"""The TPU compiler as a check, on any host with libtpu (the `tpu` extra) and no TPU: does a program fit, and what does it send
(`jaxformer.planning.program`).

What it says of memory and of the program is what a TPU would run; it says nothing of speed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.config import InputError
from jaxformer.planning.program import SHAPE, array_bytes, text_of

# libtpu otherwise asks a cloud metadata server, and two processes with it (pytest-xdist) fail on its lock file.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


def topology_mesh(name: str, config: sharding.MeshConfig) -> Mesh:
  """The mesh of a config over the devices of a described machine such as 'v5e:2x4': for compiling, not for running.

  The smallest v5e topology has four chips; a config of fewer devices takes the first of them.
  """
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  except Exception as e:
    if importlib.util.find_spec('libtpu') is None:
      raise InputError("compiling for a TPU needs libtpu: pip install 'jaxformer[tpu]'") from e
    raise InputError(f'no TPU topology {name!r} (try v5e:2x4, v5p:2x2x2, v6e:4x4): {str(e).splitlines()[0]}') from e
  asked = [getattr(config, axis) for axis in sharding.MESH_AXES]
  return sharding.make_mesh(config, devices if -1 in asked else devices[:math.prod(asked)])


def compile_for_tpu(f: Callable[..., Any], *arguments: Any, mesh: Mesh, rules: sharding.Rules | str = 'fsdp_tensor',
                    **jit_options: Any) -> jax.stages.Compiled:
  """`jax.jit(f, **jit_options)` compiled for the devices of `mesh`, under it, so that `sharding.platform()` is 'tpu'.

  Args:
    arguments: `jax.ShapeDtypeStruct`s, with shardings on `mesh`; one without is replicated.
  """
  whole = sharding.replicated(mesh)
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, 'sharding', None) or whole), arguments)
  with sharding.use_mesh(mesh, rules):
    return jax.jit(f, **jit_options).trace(*arguments).lower(lowering_platforms=('tpu',)).compile()


def largest_arrays(compiled: jax.stages.Compiled, n: int = 10) -> list[tuple[int, str]]:
  """(bytes, 'dtype[shape]') of the largest arrays named in a compiled program, on one device."""
  shapes = {(array_bytes(dtype, dims), f'{dtype}[{dims}]') for dtype, dims in SHAPE.findall(text_of(compiled))}
  return sorted(shapes, reverse=True)[:n]


def has_array(compiled: jax.stages.Compiled, *dims: int) -> bool:
  """Whether some array of a compiled program has these dimensions next to each other."""
  return re.search(rf'[\[,]{",".join(map(str, dims))}[\],]', text_of(compiled)) is not None
