"""How to train a model on a target: meshes, batch sizes and remat policies, sorted by the cost
model, the best of them compiled.

1. Candidates are all meshes that multiply to the devices and divide the model, with each batch size
  and remat policy.
2. Those whose memory by the formulas, with a margin, is above a device's are out; so are those that
  do not divide a dimension.
3. The rest are sorted by the bound on tokens a second; of what is about equally fast, less traffic
  and less memory come first.
4. The first few are compiled. Of those that fit, the one with the fastest bound by the compiler's
   FLOPs is recommended; the others say why not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxformer.config import InputError
from jaxformer.models.params import define
from jaxformer.planning.compiler import CompiledPlan
from jaxformer.planning.memory import Memory, abstract_mesh, bytes_of
from jaxformer.planning.plan import Setup
from jaxformer.planning.roofline import StepTime
from jaxformer.sharding import MESH_AXES, MeshConfig

GIB = 2**30
MARGIN = 1.1  # of the formulas' memory, which the compiler's may exceed
CLOSE = 0.02  # bounds so close count as equal
MOST_TENSOR = 16  # wider, a device's part of a matrix is too narrow for its units
LONG = 32768  # positions from which dividing time is tried
ROWS = (1, 2, 4, 8)  # sequences a device
REMAT = ('full', 'names', 'none')
MOST_COMPILED = 6

Compile = Callable[[Setup], CompiledPlan]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to train, by the formulas and, where it was tried, by the compiler."""

  setup: Setup
  memory: Memory
  step: StepTime
  compiled: CompiledPlan | None = None

  @property
  def name(self) -> str:
    """'fsdp 16 x tensor 4, batch 64, remat full'."""
    mesh = ' x '.join(
      f'{a} {getattr(self.setup.mesh, a)}' for a in MESH_AXES if getattr(self.setup.mesh, a) > 1
    )
    return f'{mesh or "one device"}, batch {self.setup.batch_size}, remat {self.setup.remat}'

  @property
  def seconds_per_token(self) -> float:
    """The bound; by the compiler's count of FLOPs where there is one, which knows what remat
    computes again."""
    s, chip = self.step, self.setup.target.chip
    if self.compiled is None or self.compiled.flops is None:
      return s.seconds / s.tokens
    compute = self.compiled.flops.total * chip.devices / chip.peak(self.setup.precision)
    return max(compute, s.memory_seconds, s.interconnect_seconds, s.network_seconds) / s.tokens

  @property
  def overrides(self) -> list[str]:
    """Words for the command line of `train`."""
    s = self.setup
    axes = [
      (f'--mesh.{a}', getattr(s.mesh, a))
      for a in MESH_AXES
      if getattr(s.mesh, a) > 1 or a == 'data'
    ]
    pairs = [*axes, ('--training.batch-size', s.batch_size), ('--training.remat', s.remat)]
    return [word for name, value in pairs for word in (name, str(value))]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search came to.

  Attributes:
    best: the recommendation; None where nothing fits.
    compiled: what was compiled, in the order of the cost model.
    lost: (name, reason) of the others worth a word.
    tried: how many candidates there were.
  """

  best: Candidate | None
  compiled: list[Candidate]
  lost: list[tuple[str, str]]
  tried: int


def search(
  base: Setup,
  compile: Compile,
  *,
  rows: Sequence[int] | None = None,
  remats: Sequence[str] = REMAT,
  best: int = 3,
  note: Note = lambda line: None,
) -> Found:
  """Searches from a setup, whose mesh, batch size and remat policy are replaced.

  Args:
    compile: what lowers and compiles a setup's training step.
    rows: sequences a device to try; None for the base's global batch size alone.
    best: how many are compiled at least, where so many fit.
  """
  setups = list(candidates(base, rows, remats))
  note(f'{len(setups)} candidates')
  scored = [c for s in setups if (c := scored_or_none(s)) is not None]
  limit = base.target.device_memory_bytes
  small = [c for c in scored if c.memory.total * MARGIN <= limit]
  note(f'{len(small)} fit by the formulas')
  compiled: list[Candidate] = []
  for c in sorted_by_bound(small):
    enough = len(compiled) >= best and any(
      done.compiled is not None and done.compiled.fits for done in compiled
    )
    if enough or len(compiled) == MOST_COMPILED:
      break
    note(f'compiling {c.name}')
    compiled.append(dataclasses.replace(c, compiled=compile(c.setup)))
  fitting = [c for c in compiled if c.compiled is not None and c.compiled.fits]
  # Equally fast ones keep the order of the cost model.
  winner = min(
    fitting,
    key=lambda c: round(c.seconds_per_token / fitting[0].seconds_per_token / CLOSE),
    default=None,
  )
  return Found(
    winner, compiled, _lost(winner, compiled, sorted_by_bound(scored), limit), len(setups)
  )


def candidates(base: Setup, rows: Sequence[int] | None, remats: Sequence[str]) -> Iterator[Setup]:
  """All setups that a mesh of the target's devices allows."""
  for mesh in meshes(base):
    parts = mesh.replica * mesh.data * mesh.fsdp * mesh.expert
    batches = [base.batch_size] if rows is None else [r * parts for r in rows]
    for batch, remat in itertools.product(batches, remats):
      if batch % (parts * base.accumulate) == 0:
        yield dataclasses.replace(base, mesh=mesh, batch_size=batch, remat=remat)


def meshes(base: Setup) -> Iterator[MeshConfig]:
  """Meshes of the target that divide the model's parameters and sequences; slices along
  `replica`."""
  experts = [layer.expert_count for layer, _ in base.model.layers() if layer.expert_count]
  n = base.target.devices_per_slice
  for tensor, expert, context in itertools.product(_divisors(n), _divisors(n), _divisors(n)):
    rest, over = divmod(n, tensor * expert * context)
    if over or tensor > MOST_TENSOR or any(e % expert for e in experts or [1]):
      continue
    if base.length % context or (context > 1 and base.length < LONG):
      continue
    for fsdp in _divisors(rest):
      mesh = MeshConfig(
        replica=base.target.slices,
        data=rest // fsdp,
        fsdp=fsdp,
        expert=expert,
        context=context,
        tensor=tensor,
      )
      try:
        define(base.model).abstract(abstract_mesh(mesh, base.target.devices), mesh.rules)
      except InputError:
        continue  # an axis does not divide a dimension
      yield mesh


def scored_or_none(setup: Setup) -> Candidate | None:
  """A candidate by the formulas; None where parameters and optimizer alone are too large, or
  something divides unevenly."""
  mesh = abstract_mesh(setup.mesh, setup.target.devices)
  params = define(setup.model).abstract(mesh, setup.mesh.rules)
  # fp32 with two moments, and their rounded copies
  if 3.5 * bytes_of(params) > setup.target.device_memory_bytes:
    return None
  try:
    memory = setup.memory()
    return Candidate(setup, memory, setup.step(memory))
  except InputError:
    return None


def sorted_by_bound(scored: Sequence[Candidate]) -> list[Candidate]:
  """The fastest bound first; in the steps of 2 % in which bounds count as equal, that with the
  least time in all, then memory."""
  if not scored:
    return []
  fastest = max(c.step.tokens_per_second for c in scored)

  def key(c: Candidate) -> tuple[Any, ...]:
    s = c.step
    every = s.compute_seconds + s.memory_seconds + s.interconnect_seconds + s.network_seconds
    return round((1 - s.tokens_per_second / fastest) / CLOSE), every / s.tokens, c.memory.total

  return sorted(scored, key=key)


def _lost(
  winner: Candidate | None, compiled: Sequence[Candidate], ranked: Sequence[Candidate], limit: float
) -> list[tuple[str, str]]:
  """Why the others lost: what was compiled, then the best of each mesh, batch size and remat policy
  next to the winner."""
  shown = [c for c in compiled if c is not winner]
  if winner is not None:
    near = [
      c
      for c in ranked
      if sum(a != b for a, b in zip(_choice(c), _choice(winner), strict=True)) == 1
    ]
    named = {c.name for c in (winner, *shown)}
    shown += [c for c in near if c.name not in named][:6]
  else:
    named = {c.name for c in shown}
    shown += [c for c in sorted(ranked, key=lambda c: c.memory.total) if c.name not in named][:3]
  return [(c.name, _reason(c, winner, limit)) for c in shown]


def _choice(c: Candidate) -> tuple[Any, ...]:
  return c.setup.mesh, c.setup.batch_size, c.setup.remat


def _reason(c: Candidate, winner: Candidate | None, limit: float) -> str:
  if c.compiled is not None and not c.compiled.fits:
    return f'does not fit, by {c.compiled.short_by / GIB:.2f} GiB (compiler)'
  if c.compiled is None and c.memory.total * MARGIN > limit:
    over = c.memory.total - limit
    return (
      f'does not fit, by {over / GIB:.2f} GiB (formulas)'
      if over > 0
      else f'{c.memory.total / GIB:.2f} GiB by the formulas is too close to the limit of '
      f'{limit / GIB:.2f}'
    )
  if winner is None:
    return 'was not compiled'
  bounds = (
    (c.seconds_per_token, winner.seconds_per_token)
    if c.compiled
    else tuple(x.step.seconds / x.step.tokens for x in (c, winner))
  )
  slower = bounds[0] / bounds[1] - 1
  if slower > CLOSE:
    return f'{100 * slower:.0f}% slower, bound by {c.step.bound}'
  total = [
    sum((s.compute_seconds, s.memory_seconds, s.interconnect_seconds, s.network_seconds)) / s.tokens
    for s in (c.step, winner.step)
  ]
  more = 100 * (total[0] / total[1] - 1)
  return (
    f'about as fast, with {more:.0f}% more time in products, memory and links together'
    if more >= 1
    else f'about as fast, with {c.memory.total / GIB:.2f} GiB a device'
  )


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
