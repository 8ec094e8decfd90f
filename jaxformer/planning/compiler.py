"""The TPU compiler as a check, on any host with libtpu (the `tpu` extra) and without a TPU: whether
a program fits, and what it computes and sends.

Memory and program are those that a TPU would run; its time is predicted (`step_clock`).
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Generator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxformer import sharding
from jaxformer.config import InputError
from jaxformer.hardware import CHIPS, GIB, Chip
from jaxformer.planning.collectives import Traffic, list_collectives, traffic_by_axis
from jaxformer.planning.hlo import text_of
from jaxformer.planning.hlo_flops import CompiledFlops, compiled_flops
from jaxformer.planning.step_clock import time_program
from jaxformer.planning.step_profile import StepProfile, profile_of

# Without these, libtpu queries a cloud metadata server, and a second process that loads it
# (pytest-xdist) fails on its lock file.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
}

# Relative differences between compiler and formulas that the formulas claim to keep within.
MEMORY_WITHIN, FLOPS_WITHIN = 0.15, 0.05


def topology_mesh(name: str, config: sharding.MeshConfig, slices: int = 1) -> Mesh:
  """The mesh of a config over the devices of a topology such as 'v5e:2x4', or of several such
  slices: for compilation, not for execution.

  The smallest v5e topology has four chips; a config of fewer devices takes the first of them.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise InputError("compiling for a TPU needs its compiler, libtpu: pip install 'jaxformer[tpu]'")
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {} if slices == 1 else {'num_slices': slices}
  # Without being told, the compiler takes a slice for open in all dimensions.
  options['wrap'] = _closed(name)
  if name.startswith('v4:'):
    options['chip_config_name'] = 'megacore'  # one JAX device per chip, as on Google Cloud
  try:
    with quiet():
      devices = topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
  except Exception as e:
    raise InputError(
      f'no TPU topology {name!r} (try v5e:2x4, v5p:2x2x2, v6e:4x4): {str(e).splitlines()[0]}'
    ) from e
  sizes = config.given.values()
  return sharding.make_mesh(config, devices if -1 in sizes else devices[: math.prod(sizes)])


def _closed(topology: str) -> tuple[bool, ...]:
  """Which of three dimensions of a described slice close to rings."""
  kind, _, shape = topology.partition(':')
  chip = CHIPS.get('v7x' if kind == 'tpu7x' else kind)
  sizes = [int(n) for n in shape.split('x') if n.isdecimal()]
  closed = (False,) * len(sizes) if chip is None else chip.closed(sizes)
  return (*closed, False, False, False)[:3]


@contextlib.contextmanager
def quiet() -> Generator[None]:
  """Discard what C++ libraries write to stderr; libtpu reports there that this host has no TPU."""
  with tempfile.TemporaryFile() as sink:
    kept = os.dup(2)
    os.dup2(sink.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)


def _libtpu_version() -> str:
  found = importlib.metadata.distributions(name='libtpu')
  return next((d.version for d in found), 'unknown')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledPlan:
  """What the compiler reports of one program; bytes and FLOPs per device.

  Attributes:
    arguments: bytes of its arguments; None if the program does not fit.
    temporaries: bytes that it allocates.
    outputs: bytes of results that do not reuse the memory of an argument.
    total: sum of the three; if the program does not fit, what it would need by the compiler.
    limit: bytes that a program may use.
    flops: None if the program does not fit.
    collectives: mesh axes ('fsdp', 'fsdp+tensor') -> kind of collective -> traffic.
    compile_seconds: without lowering.
    profile: its predicted time; None if it does not fit, or the chip's clock is not known.
  """

  arguments: int | None = None
  temporaries: int | None = None
  outputs: int | None = None
  total: float
  limit: float
  flops: CompiledFlops | None = None
  collectives: dict[str, dict[str, Traffic]] = dataclasses.field(default_factory=dict)
  compile_seconds: float
  profile: StepProfile | None = None
  jax: str = jax.__version__
  libtpu: str = dataclasses.field(default_factory=_libtpu_version)

  @property
  def fits(self) -> bool:
    return self.flops is not None and self.total <= self.limit

  @property
  def short_by(self) -> float:
    """Bytes that are missing; 0 if it fits."""
    return max(0.0, self.total - self.limit)

  def as_json(self) -> dict[str, Any]:
    """The figures as JSON data, without the profile."""
    data: dict[str, Any] = dataclasses.asdict(dataclasses.replace(self, profile=None)) | {
      'fits': self.fits,
      'short_by': self.short_by,
      'compile_seconds': round(self.compile_seconds, 1),
    }
    del data['profile']
    if self.flops is not None:
      data['flops']['total'] = self.flops.total
    return data


def compile_plan(
  lower: Callable[[], jax.stages.Lowered],
  mesh: Mesh,
  limit: float,
  chip: Chip | None = None,
  layers: Collection[str] = (),
) -> CompiledPlan:
  """Compile a program for the devices of a mesh. A program that does not fit is a result, not an
  error. Raises `InputError` for one that the compiler refuses otherwise, such as kernels on a chip
  that they do not support.

  Args:
    lower: makes the program, for which it may compile another, as decoding does the prefill that
      leaves its state.
    limit: bytes per device; if the compiler refuses the program, its own limit is reported.
    chip: whose clock predicts the time of the program; None for no prediction.
    layers: names of the classes of the model's layers, for the profile.
  """
  began = time.perf_counter()
  try:
    with quiet():
      lowered = lower()
      began = time.perf_counter()
      compiled = lowered.compile()
  except Exception as e:
    # an error of a kernel is raised by Pallas, caused by the compiler's
    if not any(isinstance(x, jax.errors.JaxRuntimeError) for x in (e, e.__cause__)):
      raise
    if (refusal := memory_refusal(str(e))) is None:
      raise InputError(
        f'compile: libtpu {_libtpu_version()} refuses the program: {str(e).splitlines()[0]}; '
        'without compile the plan comes from formulas'
      ) from e
    seconds = time.perf_counter() - began
    return CompiledPlan(total=refusal[0], limit=refusal[1], compile_seconds=seconds)
  seconds, memory, text = time.perf_counter() - began, compiled.memory_analysis(), text_of(compiled)
  assert memory is not None  # the TPU compiler always reports it
  sizes = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  return CompiledPlan(
    **sizes,
    total=sum(sizes.values()),
    limit=limit,
    flops=compiled_flops(text),
    collectives=traffic_by_axis(list_collectives(text), dict(mesh.shape)),
    compile_seconds=seconds,
    profile=_profile(text, mesh, chip, layers),
  )


def _profile(
  text: str, mesh: Mesh, chip: Chip | None, layers: Collection[str]
) -> StepProfile | None:
  if chip is None or chip.clock_hz is None:
    return None
  return profile_of(time_program(text, mesh, chip), layers)


def memory_refusal(message: str) -> tuple[float, float] | None:
  """(bytes needed, bytes available) of the compiler's RESOURCE_EXHAUSTED; None for another error.
  If the temporaries alone are too large, the compiler stops there: the first is a lower bound."""
  found = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm', message) or re.search(
    r'memory required for .*? \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
    message,
  )
  if 'RESOURCE_EXHAUSTED' not in message or found is None:
    return None
  unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  used, used_unit, limit, limit_unit = found.groups()
  return float(used) * unit[used_unit], float(limit) * unit[limit_unit]


def disagreements(plan: CompiledPlan, memory: float, flops: tuple[float, float]) -> list[str]:
  """Where compiler and formulas differ by more than the formulas claim, one line each.

  Args:
    memory: predicted bytes per device.
    flops: predicted FLOPs per device, without recomputation under remat and with all of it.
  """
  lines, ratio = [], plan.total / memory
  if abs(ratio - 1) > MEMORY_WITHIN:
    lines.append(
      f'memory: {plan.total / GIB:.2f} GiB per device by the compiler, {memory / GIB:.2f} by the '
      f'formulas (ratio {ratio:.2f})'
    )
  if plan.flops is None:
    return lines
  counted, (low, high) = f'FLOPs: {plan.flops.total:.4g} per device by the compiler', flops
  if plan.flops.total > high * (1 + FLOPS_WITHIN):
    lines.append(f'{counted}, at most {high:.4g} by the formulas with remat')
  elif plan.flops.total < low * (1 - FLOPS_WITHIN):
    why = ', '.join(plan.flops.not_counted)
    lines.append(f'{counted}, {low:.4g} by the formulas' + (f'; not counted: {why}' if why else ''))
  return lines
