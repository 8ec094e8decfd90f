"""StepEstimate: memory, time and cost of training or inference on a given slice, by formulas."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from jaxformer.config import InputError
from jaxformer.hardware import GIB
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.compiler import CompiledPlan
from jaxformer.planning.cost import cost
from jaxformer.planning.memory import DeviceMemory, fits, memory
from jaxformer.planning.roofline import StepTime, step_time
from jaxformer.planning.setup import PlanSetup, abstract_mesh, divisors
from jaxformer.planning.target import SHAPES, Target, parse_target
from jaxformer.sharding import MeshConfig, Parallel

_MOST = 1e30  # of an amount; beyond it products with it, such as FLOPs, would overflow
# Share of the peak that a well-tuned training reaches: 38 to 43 % for Llama 3 405B on H100s (Llama
# Team 2024, table 4), 46 % for PaLM 540B on TPU v4 (Chowdhery et al. 2022, table 3).
UTILIZATION = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
  """Time and cost of a whole training run.

  Attributes:
    params, active_params: of the model, and those that one token uses.
    tokens: trained on.
    train_flops: model FLOPs, causal convention, without recomputation.
    utilization: share of the peak of all chips that `seconds` assumes.
    seconds: of training steps; start-up, compilation and evaluation are not included.
    chip_hours: chips x hours.
    price_per_hour_usd: of all chips, on demand.
    price_usd: on demand.
    spot_price_usd: None if spot capacity has no list price, as on Google Cloud, where it moves with
      the market below the price on demand.
  """

  params: int
  active_params: int
  tokens: float
  train_flops: float
  utilization: float
  seconds: float
  chip_hours: float
  price_per_hour_usd: float
  price_usd: float
  spot_price_usd: float | None

  def as_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {
      'days': self.seconds / 86400,
      'tokens_per_second': self.tokens / self.seconds,
    }


def training_run(
  model: ModelConfig,
  length: int,
  target: Target,
  tokens: float,
  utilization: float = UTILIZATION,
  *,
  precision: str = 'bf16',
  price: float | None = None,
) -> TrainingRun:
  """The time and cost of training a model on `tokens` in sequences of `length`. `price` in USD per
  chip-hour overrides the list price."""
  if not 0 < utilization <= 1:
    raise InputError('utilization', utilization, 'above 0 and at most 1')
  per_token = cost(model, length)
  flops = per_token.train_flops_per_token * tokens
  seconds = flops / (target.chip.peak(precision) * target.total_chips * utilization)
  hourly = (target.chip.price_per_hour if price is None else price) * target.total_chips
  spot = target.price_per_hour(spot=True)
  return TrainingRun(
    params=per_token.params,
    active_params=per_token.active_params,
    tokens=tokens,
    train_flops=flops,
    utilization=utilization,
    seconds=seconds,
    chip_hours=seconds / 3600 * target.total_chips,
    price_per_hour_usd=hourly,
    price_usd=hourly * seconds / 3600,
    spot_price_usd=None if spot is None else spot * seconds / 3600,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingCost:
  """Time and price per million tokens of inference.

  Attributes:
    utilization: share of the peak rate of the bottleneck that is assumed: 0.4 means 2.5 times the
      least time of a step.
    seconds_per_million_tokens: of all chips together.
    price_per_hour_usd: of all chips, on demand.
    price_per_million_tokens_usd: on demand.
    spot_price_per_million_tokens_usd: None if spot capacity has no list price.
  """

  utilization: float
  seconds_per_million_tokens: float
  price_per_hour_usd: float
  price_per_million_tokens_usd: float
  spot_price_per_million_tokens_usd: float | None


def serving_cost(
  step: StepTime, target: Target, utilization: float = UTILIZATION, price: float | None = None
) -> ServingCost:
  """What a million tokens cost, from the bounds of a step. `price` in USD per chip-hour overrides
  the list price."""
  seconds = 1e6 / step.tokens_per_second / utilization
  hourly = (target.chip.price_per_hour if price is None else price) * target.total_chips
  spot = target.price_per_hour(spot=True)
  return ServingCost(
    utilization=utilization,
    seconds_per_million_tokens=seconds,
    price_per_hour_usd=hourly,
    price_per_million_tokens_usd=hourly / 3600 * seconds,
    spot_price_per_million_tokens_usd=None if spot is None else spot / 3600 * seconds,
  )


@dataclasses.dataclass(frozen=True)
class StepEstimate:
  """What one step of a setup takes.

  Attributes:
    memory: bytes per device, by formulas.
    step: lower bounds on its time, by formulas.
    compiled: what the TPU compiler reports of the same step; None if it was not asked.
  """

  setup: PlanSetup
  memory: DeviceMemory
  step: StepTime
  compiled: CompiledPlan | None = None

  @property
  def seconds_per_token(self) -> float:
    """The predicted time where the step was compiled for a chip whose clock is known, else the
    lower bound; with the compiler's count of FLOPs if there is one, which includes recomputation
    under remat."""
    s, chip = self.step, self.setup.target.chip
    if self.compiled is not None and self.compiled.profile is not None:
      return self.compiled.profile.seconds / s.tokens
    if self.compiled is None or self.compiled.flops is None:
      return s.seconds / s.tokens
    compute = self.compiled.flops.total * chip.devices / chip.peak(self.setup.precision)
    return dataclasses.replace(s, compute_seconds=compute).seconds / s.tokens

  @property
  def short_by(self) -> float:
    """Bytes per device that are missing; 0 if the step fits."""
    return max(0.0, self.memory.total - self.setup.target.device_memory_bytes)

  def as_json(self) -> dict[str, Any]:
    """Memory, bounds and the figures that they rest on."""
    setup, step, chip = self.setup, self.step, self.setup.target.chip
    # FLOPs per byte of memory traffic at which products and traffic take equally long.
    ridge = chip.peak(setup.precision) / chip.bytes_per_second
    return {
      'phase': setup.phase,
      'memory': dataclasses.asdict(self.memory)
      | {
        'total': self.memory.total,
        'limit': setup.target.device_memory_bytes,
        'fits': not self.short_by,
        'short_by': self.short_by,
        'would_fit': _would_fit(self) if self.short_by else [],
      },
      'step': dataclasses.asdict(step)
      | {
        'bound': step.bound,
        'seconds': step.seconds,
        'tokens_per_second': step.tokens_per_second,
        'arithmetic_intensity': ridge * step.compute_seconds / step.memory_seconds,
        'ridge_intensity': ridge,
        'batch_size': setup.batch_size,
        'sequence_length' if setup.phase == 'train' else 'context_length': setup.length,
      },
      'target': setup.target.as_json(),
      'mesh': dict(setup.abstract_mesh.shape),
    } | ({'remat': setup.remat, 'accumulate': setup.accumulate} if setup.phase == 'train' else {})


def estimate(setup: PlanSetup) -> StepEstimate:
  """Memory and time of one step of a setup. Raises `InputError` for a batch or a model that the
  mesh does not divide, and for inference of a model that does not decode."""
  held = memory(setup)
  return StepEstimate(setup, held, step_time(setup, held))


def inference_setup(
  phase: Any,
  model: ModelConfig,
  target: Target,
  batch_size: int,
  length: int,
  precision: str = 'bf16',
  mesh: MeshConfig | None = None,
) -> PlanSetup:
  """A setup of inference.

  Unless `mesh` is given, it is the first that fits: slices along `replica`, as much of the batch as
  possible along `data`, `tensor` as far as it divides the model, and what is left along `context`;
  if none fits, the one that needs the least memory. Raises `InputError` for a model that does not
  decode."""

  def on(config: MeshConfig) -> PlanSetup:
    return PlanSetup(
      model=model,
      target=target,
      mesh=config,
      batch_size=batch_size,
      length=length,
      phase=phase,
      precision=precision,
    )

  if model.state_size(length) is None:
    why = f'a {model.tag} reads complete sequences and does not decode'
    raise InputError('phase', phase, problem=why)
  if mesh is not None:
    return on(mesh)
  needed: list[tuple[float, PlanSetup]] = []
  for config in _inference_meshes(model, target, batch_size):
    setup = on(config)
    total = memory(setup).total
    if total <= target.device_memory_bytes:
      return setup
    needed.append((total, setup))
  return min(needed, key=lambda pair: pair[0])[1]


def _inference_meshes(model: ModelConfig, target: Target, batch: int) -> Iterator[MeshConfig]:
  """Meshes of a target, those with the most sequences along `data` first."""
  n, seen = target.devices_per_slice, set()
  for data in reversed(divisors(n)):
    if batch % (data * target.slices) and data > 1:
      continue
    for tensor in reversed(divisors(n // data)):
      mesh = MeshConfig(
        replica=target.slices, data=data, tensor=tensor, context=n // data // tensor
      )
      try:
        define(model).abstract(Parallel(abstract_mesh(mesh, target.devices), mesh.rules))
      except InputError:
        continue  # this axis does not divide the model
      if (data, tensor) not in seen:
        seen.add((data, tensor))
        yield mesh
      break


def parse_amount(amount: float | str, what: str = '--tokens') -> float:
  """The number that a text such as '2T', '300B' or '1.4e12' means; a number is itself."""
  number, unit = amount, ''
  if isinstance(amount, str):
    found = re.fullmatch(r'(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)', amount.strip(), re.IGNORECASE)
    number, unit = ('nan', '') if found is None else found.groups()
  value = float(number) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}[unit.upper()]
  if not 0 < value <= _MOST:
    raise InputError(what, amount, 'a number such as 2T, 300B or 1.4e12')
  return value


# ---- what would fit ----------------------------------------------------------------------------


def _would_fit(estimate: StepEstimate) -> list[str]:
  """Changes after which the step would fit, in words."""
  setup = estimate.setup
  if setup.phase == 'train':
    return list(_remedies(setup))
  for times in (2, 4, 8, 16, 32, 64):
    if (target := _larger(setup.target, times)) is not None:
      changed = inference_setup(
        setup.phase, setup.model, target, setup.batch_size, setup.length, setup.precision
      )
      if (total := memory(changed).total) <= target.device_memory_bytes:
        return [f'--target {target.name} ({total / GIB:,.1f} GiB)']
  return []


def _remedies(setup: PlanSetup) -> Iterator[str]:
  """Each single change after which a training step would fit by the formulas, the cheapest
  first."""
  for words, changed in _changes(setup):
    try:
      possible = fits(changed)
    except InputError:
      continue  # this mesh does not divide the model
    if possible:
      yield f'{words} ({memory(changed).total / GIB:,.1f} GiB)'
      if changed.target != setup.target:
        return


def _changes(setup: PlanSetup) -> Iterator[tuple[str, PlanSetup]]:
  mesh = setup.abstract_mesh.shape
  if setup.remat != 'full':
    yield '--training.remat full', dataclasses.replace(setup, remat='full')
  if mesh['data'] > 1:
    wider = setup.mesh.replace(data=1, fsdp=mesh['fsdp'] * mesh['data'])
    yield f'--mesh.data 1 --mesh.fsdp {wider.fsdp}', dataclasses.replace(setup, mesh=wider)
  rows = mesh['replica'] * mesh['data'] * mesh['fsdp'] * mesh['expert']
  if setup.batch_size > rows:
    yield f'--training.batch-size {rows}', dataclasses.replace(setup, batch_size=rows, accumulate=1)
    most = setup.batch_size // rows
    yield f'--training.accumulate {most}', dataclasses.replace(setup, accumulate=most)
  for times in (2, 4, 8, 16, 32, 64):
    target = _larger(setup.target, times)
    if target is not None:
      grown = setup.mesh.replace(**mesh | {'fsdp': mesh['fsdp'] * times})
      yield (
        f'--target {target.name} --training.batch-size {setup.batch_size * times}',
        dataclasses.replace(setup, target=target, mesh=grown, batch_size=setup.batch_size * times),
      )


def _larger(target: Target, times: int) -> Target | None:
  """A slice with `times` as many of the same chips; None if none is offered."""
  chip = target.chip
  if chip.domain is None and chip.name not in SHAPES:
    return None
  size = f':{target.chips * times}' if chip.domain else f'-{target.chips * times * chip.cores}'
  try:
    return parse_target(f'{target.slices} x {chip.name}{size}', {chip.name: chip})
  except InputError:
    return None
