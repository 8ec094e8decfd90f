"""The TPU compiler as a check, on any host with libtpu (the `tpu` extra) and no TPU: does a program
fit, and what does it send (`jaxformer.planning.program`).

What it says of memory and of the program is what a TPU would run; it says nothing of speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.config import InputError
from jaxformer.planning.arithmetic import Arithmetic, arithmetic
from jaxformer.planning.groups import by_axis
from jaxformer.planning.program import SHAPE, Traffic, array_bytes, list_collectives, text_of

# libtpu otherwise asks a cloud metadata server, and two processes with it (pytest-xdist) fail on
# its lock file.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
}


def topology_mesh(name: str, config: sharding.MeshConfig, slices: int = 1) -> Mesh:
  """The mesh of a config over the devices of a described machine such as 'v5e:2x4', or of several
  such slices: for compiling, not for running.

  The smallest v5e topology has four chips; a config of fewer devices takes the first of them.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise InputError("compiling for a TPU needs its compiler, libtpu: pip install 'jaxformer[tpu]'")
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  several = {} if slices == 1 else {'num_slices': slices}
  try:
    with quiet():
      devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **several).devices
  except Exception as e:
    raise InputError(
      f'no TPU topology {name!r} (try v5e:2x4, v5p:2x2x2, v6e:4x4): {str(e).splitlines()[0]}'
    ) from e
  asked = [getattr(config, axis) for axis in sharding.MESH_AXES]
  return sharding.make_mesh(config, devices if -1 in asked else devices[: math.prod(asked)])


def compile_for_tpu(
  f: Callable[..., Any],
  *arguments: Any,
  mesh: Mesh,
  rules: sharding.Rules | str = 'fsdp_tensor',
  **jit_options: Any,
) -> jax.stages.Compiled:
  """`jax.jit(f, **jit_options)` compiled for the devices of `mesh`, under it, so that
  `sharding.platform()` is 'tpu'.

  Args:
    arguments: `jax.ShapeDtypeStruct`s, with shardings on `mesh`; one without is replicated.
  """
  whole = sharding.replicated(mesh)
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=getattr(a, 'sharding', None) or whole
    ),
    arguments,
  )
  with sharding.use_mesh(mesh, rules):
    return jax.jit(f, **jit_options).trace(*arguments).lower(lowering_platforms=('tpu',)).compile()


@contextlib.contextmanager
def quiet() -> Generator[None]:
  """Within, what libraries in C++ write to stderr is dropped: libtpu reports at length that this
  host has no TPU."""
  with tempfile.TemporaryFile() as sink:
    kept = os.dup(2)
    os.dup2(sink.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


# ---- what a compiled program takes -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledPlan:
  """What the compiler says of one program; bytes and FLOPs are those of one device.

  Attributes:
    arguments: bytes that are there before the program; None where it does not fit.
    temporaries: bytes that it needs beside.
    outputs: bytes of results that do not take the place of an argument.
    total: of all of them; where it does not fit, what the compiler says it would use.
    limit: what a program may use.
    flops: None where it does not fit.
    collectives: axes of the mesh ('fsdp', 'fsdp+tensor') -> kind -> how many, and bytes of their
      results.
    compile_seconds: lowering left out.
  """

  arguments: int | None = None
  temporaries: int | None = None
  outputs: int | None = None
  total: float
  limit: float
  flops: Arithmetic | None = None
  collectives: dict[str, dict[str, Traffic]] = dataclasses.field(default_factory=dict)
  compile_seconds: float
  jax: str
  libtpu: str

  @property
  def fits(self) -> bool:
    return self.flops is not None and self.total <= self.limit

  @property
  def short_by(self) -> float:
    """Bytes that are missing; 0 where it fits."""
    return max(0.0, self.total - self.limit)

  def as_json(self) -> dict[str, Any]:
    """Its figures as JSON data."""
    flops = (
      None
      if self.flops is None
      else {
        'total': self.flops.total,
        'products': self.flops.products,
        'kernels': self.flops.kernels,
        'not_counted': dict(self.flops.uncounted),
      }
    )
    sent = {
      axis: {kind: t._asdict() for kind, t in kinds.items()}
      for axis, kinds in self.collectives.items()
    }
    return {
      'arguments': self.arguments,
      'temporaries': self.temporaries,
      'outputs': self.outputs,
      'total': self.total,
      'limit': self.limit,
      'fits': self.fits,
      'short_by': self.short_by,
      'flops': flops,
      'collectives': sent,
      'compile_seconds': round(self.compile_seconds, 1),
      'jax': self.jax,
      'libtpu': self.libtpu,
    }


def compile_plan(lowered: jax.stages.Lowered, mesh: Mesh, limit: float) -> CompiledPlan:
  """Compiles a program for the devices of a mesh. One that does not fit is an answer, not an error.

  Args:
    limit: bytes of a device; where the compiler refuses the program, its own limit stands.
  """
  began = time.perf_counter()
  libtpu = _version('libtpu')
  try:
    with quiet():
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    used = memory_refusal(str(e))
    if used is None:
      raise
    return CompiledPlan(
      total=used[0],
      limit=used[1],
      compile_seconds=time.perf_counter() - began,
      jax=jax.__version__,
      libtpu=libtpu,
    )
  seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), text_of(compiled)
  assert memory is not None  # the TPU's compiler tells
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return CompiledPlan(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=outputs,
    total=memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs,
    limit=limit,
    flops=arithmetic(text),
    collectives=by_axis(list_collectives(text), dict(mesh.shape)),
    compile_seconds=seconds,
    jax=jax.__version__,
    libtpu=libtpu,
  )


def memory_refusal(message: str) -> tuple[float, float] | None:
  """(bytes that would be used, bytes that there are) of the compiler's RESOURCE_EXHAUSTED; None for
  another error. Where temporaries alone are too large, the compiler stops there, and what would be
  used is at least that."""
  found = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm', message) or re.search(
    r'memory required for .*? \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
    message,
  )
  if 'RESOURCE_EXHAUSTED' not in message or found is None:
    return None
  unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  used, used_unit, limit, limit_unit = found.groups()
  return float(used) * unit[used_unit], float(limit) * unit[limit_unit]


def disagreements(
  plan: CompiledPlan,
  memory: float,
  flops: tuple[float, float],
  memory_within: float = 0.15,
  flops_within: float = 0.05,
) -> list[str]:
  """Where the compiler and the formulas are further apart than they should be, one line each.

  Args:
    memory: predicted bytes a device.
    flops: predicted FLOPs a device: without what remat computes again, and with all of it.
  """
  lines, ratio = [], plan.total / memory
  if abs(ratio - 1) > memory_within:
    lines.append(
      f'memory: the compiler says {plan.total / 2**30:.2f} GiB a device, the formulas '
      f'{memory / 2**30:.2f} '
      f'({ratio:.2f} times)'
    )
  if plan.flops is not None:
    low, high = flops
    if plan.flops.total > high * (1 + flops_within):
      lines.append(
        f'FLOPs: the compiler computes {plan.flops.total:.4g} a device, the formulas with remat at '
        f'most {high:.4g}'
      )
    elif plan.flops.total < low * (1 - flops_within):
      why = ', '.join(plan.flops.uncounted)
      lines.append(
        f'FLOPs: counted {plan.flops.total:.4g} a device, by the formulas {low:.4g}'
        + (f'; not counted: {why}' if why else '')
      )
  return lines


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


# ---- what is in it -----------------------------------------------------------------------------


def largest_arrays(compiled: jax.stages.Compiled, n: int = 10) -> list[tuple[int, str]]:
  """(bytes, 'dtype[shape]') of the largest arrays named in a compiled program, on one device."""
  shapes = {
    (array_bytes(dtype, dims), f'{dtype}[{dims}]')
    for dtype, dims in SHAPE.findall(text_of(compiled))
  }
  return sorted(shapes, reverse=True)[:n]


def has_array(compiled: jax.stages.Compiled, *dims: int) -> bool:
  """Whether some array of a compiled program has these dimensions next to each other."""
  return re.search(rf'[\[,]{",".join(map(str, dims))}[\],]', text_of(compiled)) is not None
