"""What a training, or inference, takes on a target: tokens, FLOPs, time, money, memory, and what
bounds a step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import AbstractMesh

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.cost import cost
from jaxformer.planning.memory import Memory, abstract_mesh, training_memory
from jaxformer.planning.roofline import StepTime, decode, prefill, training_step
from jaxformer.planning.target import SHAPES, Target, parse_target
from jaxformer.sharding import MESH_AXES, MeshConfig

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: about 20 tokens a parameter spend a budget best
OptimizerState = Callable[[ModelConfig, AbstractMesh, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What is planned: a model, and how a step runs.

  Attributes:
    optimizer: (model, mesh, rules) -> its state as abstract arrays with shardings; None for
      AdamW's.
  """

  model: ModelConfig
  target: Target
  mesh: MeshConfig
  batch_size: int
  length: int
  remat: str = 'full'
  accumulate: int = 1
  precision: str = 'bf16'
  optimizer: OptimizerState | None = None

  @property
  def abstract_mesh(self) -> AbstractMesh:
    """Raises `InputError` where the mesh does not multiply to the target's devices, or does not
    know its slices."""
    mesh = abstract_mesh(self.mesh, self.target.devices)
    if mesh.shape['replica'] % self.target.slices:
      raise InputError(
        f'mesh.replica = {mesh.shape["replica"]}: must be a multiple of {self.target.slices}, the '
        f'slices of {self.target.name}'
      )
    return mesh

  def memory(self) -> Memory:
    mesh = self.abstract_mesh
    optimizer = (
      None if self.optimizer is None else self.optimizer(self.model, mesh, self.mesh.rules)
    )
    return training_memory(
      self.model,
      mesh,
      self.mesh.rules,
      self.batch_size,
      self.length,
      remat=self.remat,
      accumulate=self.accumulate,
      dtype='float32' if self.precision == 'fp32' else 'bfloat16',
      optimizer=optimizer,
      platform='gpu' if self.target.chip.domain else 'tpu',
    )

  def step(self, memory: Memory) -> StepTime:
    """The lower bound: at the full peak."""
    return training_step(
      self.model,
      self.target,
      self.abstract_mesh,
      self.mesh.rules,
      self.batch_size,
      self.length,
      kept_bytes=memory.activations,
      optimizer_bytes=memory.optimizer,
      accumulate=self.accumulate,
      remat=self.remat,
      precision=self.precision,
    )


def default_mesh(
  model: ModelConfig, target: Target, batch_size: int, accumulate: int = 1
) -> MeshConfig:
  """A mesh for a target: slices along `replica`; of a slice as much along `fsdp` as divides the
  width and the batch; the rest along `data` where the batch divides, else along `tensor`."""
  n, rows = target.devices_per_slice, batch_size // accumulate
  widths = [
    s
    for i in define(model).info.values()
    for s, a in zip(i.shape, i.axes, strict=True)
    if a == 'embed'
  ]

  def fits(f: int) -> bool:
    return n % f == 0 and all(w % f == 0 for w in widths) and rows % (f * target.slices) == 0

  fsdp = max((f for f in range(1, n + 1) if fits(f)), default=1)
  rest = n // fsdp
  data = rest if rows % (fsdp * rest * target.slices) == 0 else 1
  return MeshConfig(replica=target.slices, data=data, fsdp=fsdp, tensor=rest // data)


def parse_amount(text: str, what: str = '--tokens') -> float:
  """'2T', '300B', '1.4e12' as a number."""
  found = re.fullmatch(r'(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)', text.strip(), re.IGNORECASE)
  if found is None or float(found.group(1)) <= 0:
    raise InputError(f'{what} {text!r}: write a number such as 2T, 300B or 1.4e12')
  return (
    float(found.group(1)) * {'': 1, 'K': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}[found.group(2).upper()]
  )


def run_time(flops: float, target: Target, utilisation: float, precision: str = 'bf16') -> float:
  """Seconds of a training at a share of the peak of all chips."""
  if not 0 < utilisation <= 1:
    raise InputError(f'--utilisation {utilisation}: must be above 0 and at most 1')
  return flops / (target.chip.peak(precision) * target.total_chips * utilisation)


# ---- reports -----------------------------------------------------------------------------------


def training_report(
  setup: Setup, tokens: float, utilisation: float, price: float | None = None
) -> dict[str, Any]:
  """Time, money, memory and bounds, as JSON data. `price` a chip and hour overrides the list
  price."""
  memory, target = setup.memory(), setup.target
  flops = cost(setup.model, setup.length).train_flops_per_token * tokens
  seconds = run_time(flops, target, utilisation, setup.precision)
  step, limit = setup.step(memory), target.device_memory_bytes
  hourly = target.price_per_hour() if price is None else price * target.total_chips
  spot = target.price_per_hour(spot=True)
  fits = memory.total <= limit
  return {
    'run': {
      'tokens': tokens,
      'train_flops': flops,
      'utilisation': utilisation,
      'seconds': seconds,
      'days': seconds / 86400,
      'tokens_per_second': tokens / seconds,
      'chip_hours': seconds / 3600 * target.total_chips,
      'price_usd': None if hourly is None else hourly * seconds / 3600,
      'spot_price_usd': None if spot is None else spot * seconds / 3600,
    },
    'memory': dataclasses.asdict(memory)
    | {
      'total': memory.total,
      'limit': limit,
      'fits': fits,
      'short_by': max(0.0, memory.total - limit),
      'would_fit': [] if fits else [words for words, _ in remedies(setup)],
    },
    'step': _step(step, target, setup.precision)
    | {'batch_size': setup.batch_size, 'sequence_length': setup.length},
    'target': target_report(target),
    'mesh': dict(setup.abstract_mesh.shape),
    'remat': setup.remat,
    'accumulate': setup.accumulate,
  }


def inference_report(
  phase: str,
  model: ModelConfig,
  target: Target,
  batch: int,
  context_length: int,
  precision: str = 'bf16',
) -> dict[str, Any]:
  """Memory of weights and state, divided evenly over the devices, and the bound of a prefill or of
  one decoded token."""
  if model.state_size(context_length) is None:
    raise InputError(
      f'--phase {phase}: a {model.tag} reads a sequence as a whole and does not decode'
    )
  mesh = abstract_mesh(MeshConfig(data=1, tensor=target.devices), target.devices)
  bound = {'prefill': prefill, 'decode': decode}[phase](
    model, target, mesh, batch, context_length, precision=precision
  )
  size = {'fp32': 4, 'bf16': 2}.get(precision, 1)
  weights, state = size * define(model).size, size * (model.state_size(context_length) or 0) * batch
  total, limit = (weights + state) / target.devices, target.device_memory_bytes
  enough = -(-(weights + state) // int(target.chip.memory_bytes))
  return {
    'memory': {
      'weights': weights / target.devices,
      'state': state / target.devices,
      'total': total,
      'limit': limit,
      'fits': total <= limit,
      'short_by': max(0.0, total - limit),
      'would_fit': [] if total <= limit else [f'{enough} chips or more'],
    },
    'step': _step(bound, target, precision)
    | {'batch_size': batch, 'context_length': context_length},
    'target': target_report(target),
    'phase': phase,
  }


def target_report(target: Target) -> dict[str, Any]:
  """The figures that a plan rests on."""
  return {
    'name': target.name,
    'chips': target.total_chips,
    'slices': target.slices,
    'topology': target.topology,
    'devices': target.devices,
    'hosts': target.hosts,
    'price_per_hour_usd': target.price_per_hour(),
    'chip': dataclasses.asdict(target.chip),
  }


def _step(step: StepTime, target: Target, precision: str) -> dict[str, Any]:
  """The times, and the arithmetic intensity: FLOPs for each byte of the chip's memory that is read
  or written, beside the number at which the chip is as long about both (its ridge)."""
  ridge = target.chip.peak(precision) / target.chip.bytes_per_second
  return dataclasses.asdict(step) | {
    'bound': step.bound,
    'seconds': step.seconds,
    'tokens_per_second': step.tokens_per_second,
    'arithmetic_intensity': ridge * step.compute_seconds / step.memory_seconds,
    'ridge_intensity': ridge,
  }


# ---- what would fit ----------------------------------------------------------------------------


def remedies(setup: Setup) -> Iterator[tuple[str, Setup]]:
  """Changes of one thing after which a step would fit by the formulas, the cheapest first, in
  words."""
  for words, changed in _changes(setup):
    try:
      memory = changed.memory()
    except InputError:
      continue  # this mesh does not divide the model
    if memory.total <= changed.target.device_memory_bytes:
      yield f'{words} ({memory.total / 2**30:,.1f} GiB)', changed
      if changed.target != setup.target:
        return


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
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
      grown = setup.mesh.replace(**{a: mesh[a] for a in MESH_AXES} | {'fsdp': mesh['fsdp'] * times})
      yield (
        f'--target {target.name} --training.batch-size {setup.batch_size * times}',
        dataclasses.replace(setup, target=target, mesh=grown, batch_size=setup.batch_size * times),
      )


def _larger(target: Target, times: int) -> Target | None:
  """The same chip, so many times as many of them in a slice; None where that is not offered."""
  chip, chips = target.chip, target.chips * times
  if chip.domain is None and chip.name in SHAPES:
    try:
      one = parse_target(f'{chip.name}-{chips * chip.cores}', {chip.name: chip})
    except InputError:
      return None
    return dataclasses.replace(
      one,
      slices=target.slices,
      name=one.name if target.slices == 1 else f'{target.slices} x {one.name}',
    )
  if chip.domain is None or (chips % chip.chips_per_host and chips > chip.chips_per_host):
    return None
  return dataclasses.replace(target, chips=chips, name=f'{chip.name}:{chips}')
