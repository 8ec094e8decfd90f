"""Search for the fastest way to train a model on a target: meshes, batch sizes and remat policies,
ranked by the formulas, the best of them compiled.

1. Candidates are all meshes that multiply to the devices and divide the model, with each batch size
   and remat policy.
2. Those whose memory by the formulas, with a margin, exceeds a device's are rejected.
3. The others are ranked by the bound on tokens per second; among equally fast ones, less traffic
   and less memory come first.
4. The first few are compiled. Of those that fit, the one with the fastest bound by the compiler's
   FLOPs is recommended; the others are returned with the reason for their rejection.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxformer.config import InputError
from jaxformer.hardware import GIB
from jaxformer.models.params import define
from jaxformer.planning.compiler import CompiledPlan
from jaxformer.planning.estimate import StepEstimate, estimate
from jaxformer.planning.memory import bytes_of
from jaxformer.planning.setup import PlanSetup, abstract_mesh, divisors
from jaxformer.sharding import MeshConfig, Parallel

# The TPU compiler's memory was at most 1.09 times that of the formulas in 12 of the 15 rows of
# experiments/plan_table.md (1.11 in one; 1.39 and 1.66 where kernels hold arrays of their own).
MARGIN = 1.1
# Bounds this close count as equal. Chosen, not measured: they ignore overlap and the efficiency of
# kernels, which differ by more.
CLOSE = 0.02
# Beyond this, the shard of a matrix with 4,096 columns is narrower than the MXU of v6e, 256 x 256.
MOST_TENSOR = 16
# Sequence parallelism is tried from this length on. Chosen: below it one sequence fits per device,
# and sharding time only adds traffic.
LONG = 32768
# Bytes needed per byte of fp32 parameters with AdamW: the parameter (1), two moments (2) and the
# bf16 copy (1/2). Setups beyond it are not traced.
LEAST_BYTES = 3.5
ROWS = (1, 2, 4, 8)  # sequences per device
REMAT = ('full', 'names', 'none')
MOST_COMPILED = 6  # one to three minutes each on an idle CPU core

Compile = Callable[[PlanSetup], CompiledPlan]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """Result of a search.

  Attributes:
    best: the recommendation; None if nothing fits.
    compiled: the estimates that were compiled, in the order of the ranking.
    rejected: (name, reason) of notable runners-up.
    tried: the number of candidates.
  """

  best: StepEstimate | None
  compiled: list[StepEstimate]
  rejected: list[tuple[str, str]]
  tried: int


def search(
  base: PlanSetup,
  compile: Compile,
  *,
  rows: Sequence[int] | None = None,
  keep_batch: bool = False,
  remats: Sequence[str] = REMAT,
  best: int = 3,
  note: Note = lambda line: None,
) -> SearchResult:
  """Search from a setup, whose mesh, batch size and remat policy are replaced.

  Args:
    compile: lowers and compiles the training step of a setup.
    rows: sequences per device to try; None for the base's global batch size alone.
    keep_batch: whether `rows` are those of a microbatch of the base's batch, rather than a batch.
    best: the least number of candidates to compile, if so many fit.
  """
  setups = list(candidates(base, rows, remats, keep_batch))
  note(f'{len(setups)} candidates')
  ranked = sorted_by_bound([e for s in setups if (e := estimate_if_possible(s)) is not None])
  limit = base.target.device_memory_bytes
  small = [e for e in ranked if e.memory.total * MARGIN <= limit]
  note(f'{len(small)} fit by the formulas')
  compiled: list[StepEstimate] = []
  for e in sorted_by_bound(small):
    if len(compiled) == MOST_COMPILED or (len(compiled) >= best and any(map(_fits, compiled))):
      break
    note(f'compiling {e.setup.name}')
    compiled.append(dataclasses.replace(e, compiled=compile(e.setup)))
  fitting = list(filter(_fits, compiled))
  # Equally fast ones keep the order of the ranking.
  winner = min(
    fitting,
    key=lambda e: round(e.seconds_per_token / fitting[0].seconds_per_token / CLOSE),
    default=None,
  )
  return SearchResult(winner, compiled, _rejected(winner, compiled, ranked), len(setups))


def _fits(e: StepEstimate) -> bool:
  return e.compiled is not None and e.compiled.fits


def candidates(
  base: PlanSetup, rows: Sequence[int] | None, remats: Sequence[str], keep_batch: bool = False
) -> Iterator[PlanSetup]:
  """All setups on the meshes of the target's devices."""
  for mesh in meshes(base):
    shards = mesh.replica * mesh.data * mesh.fsdp * mesh.expert
    sizes = [(base.batch_size, base.accumulate)]
    if rows is not None and keep_batch:
      sizes = [(base.batch_size, max(1, base.batch_size // (r * shards))) for r in rows]
    elif rows is not None:
      sizes = [(r * shards, base.accumulate) for r in rows]
    for (batch, accumulate), remat in itertools.product(dict.fromkeys(sizes), remats):
      if batch % (shards * accumulate) == 0:
        yield dataclasses.replace(
          base, mesh=mesh, batch_size=batch, accumulate=accumulate, remat=remat
        )


def meshes(base: PlanSetup) -> Iterator[MeshConfig]:
  """Meshes of the target that divide the model's parameters and sequences; slices along
  `replica`."""
  experts = [layer.expert_count for layer, _ in base.model.layers() if layer.expert_count]
  n = base.target.devices_per_slice
  for tensor, expert, context in itertools.product(divisors(n), repeat=3):
    rest, over = divmod(n, tensor * expert * context)
    if over or tensor > MOST_TENSOR or any(e % expert for e in experts or [1]):
      continue
    if base.length % context or (context > 1 and base.length < LONG):
      continue
    for fsdp in divisors(rest):
      mesh = MeshConfig(
        replica=base.target.slices,
        data=rest // fsdp,
        fsdp=fsdp,
        expert=expert,
        context=context,
        tensor=tensor,
      )
      try:
        define(base.model).abstract(Parallel(abstract_mesh(mesh, base.target.devices), mesh.rules))
      except InputError:
        continue  # an axis does not divide a dimension
      yield mesh


def estimate_if_possible(setup: PlanSetup) -> StepEstimate | None:
  """The estimate of a candidate; None if parameters and optimizer alone are too large, or if
  something does not divide evenly."""
  params = define(setup.model).abstract(setup.parallel)
  if LEAST_BYTES * bytes_of(params) > setup.target.device_memory_bytes:
    return None
  try:
    return estimate(setup)
  except InputError:
    return None


def sorted_by_bound(estimates: Sequence[StepEstimate]) -> list[StepEstimate]:
  """Sort by the bound on speed, fastest first; among bounds that count as equal, by the sum of all
  times, then by memory."""
  fastest = max((e.step.tokens_per_second for e in estimates), default=1.0)

  def key(e: StepEstimate) -> tuple[Any, ...]:
    slower = round((1 - e.step.tokens_per_second / fastest) / CLOSE)
    return slower, e.step.total_seconds / e.step.tokens, e.memory.total

  return sorted(estimates, key=key)


def _rejected(
  winner: StepEstimate | None, compiled: Sequence[StepEstimate], ranked: Sequence[StepEstimate]
) -> list[tuple[str, str]]:
  """Why the others were rejected: the compiled ones, then the best of those that differ from the
  winner in the mesh, the batch size or the remat policy alone."""
  shown = [e for e in compiled if e is not winner]
  if winner is not None:
    near = [
      e
      for e in ranked
      if sum(a != b for a, b in zip(_choice(e), _choice(winner), strict=True)) == 1
    ]
    count = 6
  else:
    near, count = sorted(ranked, key=lambda e: e.memory.total), 3
  named = {e.setup.name for e in (*shown, *([winner] if winner else []))}
  shown += [e for e in near if e.setup.name not in named][:count]
  return [(e.setup.name, _reason(e, winner)) for e in shown]


def _choice(e: StepEstimate) -> tuple[Any, ...]:
  return e.setup.mesh, (e.setup.batch_size, e.setup.accumulate), e.setup.remat


def _reason(e: StepEstimate, winner: StepEstimate | None) -> str:
  if e.compiled is not None and not e.compiled.fits:
    return f'does not fit, by {e.compiled.short_by / GIB:.2f} GiB (compiler)'
  limit = e.setup.target.device_memory_bytes
  if e.compiled is None and e.short_by:
    return f'does not fit, by {e.short_by / GIB:.2f} GiB (formulas)'
  if e.compiled is None and e.memory.total * MARGIN > limit:
    return (
      f'{e.memory.total / GIB:.2f} GiB by the formulas is too close to the limit of '
      f'{limit / GIB:.2f}'
    )
  if winner is None:
    return 'was not compiled'
  theirs = winner if e.compiled else dataclasses.replace(winner, compiled=None)
  slower = e.seconds_per_token / theirs.seconds_per_token - 1
  if slower > CLOSE:
    return f'{100 * slower:.0f}% slower, bound by {e.step.bound}'
  total = [x.step.total_seconds / x.step.tokens for x in (e, winner)]
  more = 100 * (total[0] / total[1] - 1)
  if more >= 1:
    return f'about as fast, but {more:.0f}% more time in products, memory and links together'
  return f'about as fast, with {e.memory.total / GIB:.2f} GiB per device'
