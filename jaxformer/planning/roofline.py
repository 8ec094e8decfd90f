"""Lower bounds on time, by what a chip computes, reads and sends, each at its peak rate.

A step cannot be shorter than the longest of three times: products at a share of the peak
(`utilisation`), traffic of the high-bandwidth memory, traffic of the links. They are taken to
overlap perfectly, so none of them is a prediction.

What is sent, in bytes that one device puts on its links, for n devices along an axis:

- `fsdp`: the weights in the compute dtype, gathered forward and again backward, and the gradients
  scattered: (n - 1) / n of each.
- `data` and `replica`: the gradients all-reduced, 2 (n - 1) / n of what the device has of them,
  fp32 as they are added up.
- `tensor`: after each residual branch an all-reduce of the residual stream, forward and backward: 2
  (n - 1) / n of it.
- `expert`: tokens to the experts of their layer and back, forward and backward: k copies, (n - 1) /
  n of them.
- `context`: keys and values, or states, of the others; forward and twice backward.

`replica` crosses the network, as does any axis of GPUs that is wider than the domain of their fast
links; the rest is on the links."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh

from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.planning.cost import cost, flops_per_token
from jaxformer.planning.memory import bytes_of, local_batch
from jaxformer.planning.target import Target
from jaxformer.sharding import Rules


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Lower bounds of one step, or of one token in decoding, in seconds.

  Attributes:
    compute_seconds: products at the utilisation that was assumed.
    memory_seconds: of the high-bandwidth memory.
    interconnect_seconds: of the links inside a slice or host.
    network_seconds: between slices or hosts.
    tokens: of all devices, in that time.
  """

  compute_seconds: float
  memory_seconds: float
  interconnect_seconds: float
  network_seconds: float
  tokens: int

  @property
  def bound(self) -> str:
    """What the longest of them is: 'compute', 'memory', 'interconnect' or 'network'."""
    return max(
      ('compute', 'memory', 'interconnect', 'network'),
      key=lambda name: getattr(self, f'{name}_seconds'),
    )

  @property
  def seconds(self) -> float:
    """The lower bound."""
    return getattr(self, f'{self.bound}_seconds')

  @property
  def tokens_per_second(self) -> float:
    """The upper bound that goes with it."""
    return self.tokens / self.seconds


def training_step(
  model: ModelConfig,
  target: Target,
  mesh: AbstractMesh,
  rules: Rules | str,
  batch_size: int,
  length: int,
  *,
  kept_bytes: float,
  optimizer_bytes: int,
  accumulate: int = 1,
  remat: str = 'none',
  utilisation: float = 1.0,
  precision: str = 'bf16',
) -> StepTime:
  """One update.

  Args:
    kept_bytes: activations that a device writes and reads again (`memory.Memory.activations`).
    optimizer_bytes: of the optimizer's state on a device.
    remat: under 'full' and its like the forward pass is computed twice; the other policies compute
      again what is cheap.
  """
  size, chip = 2 if precision != 'fp32' else 4, target.chip
  params = define(model).abstract(mesh, rules)
  held = bytes_of(params)
  B, T = local_batch(mesh, rules, batch_size, length, accumulate)
  flops = flops_per_token(model, length) * batch_size * length / mesh.size
  flops *= 4 / 3 if remat == 'full' else 1
  in_use = size * define(model).size / mesh.shape['tensor'] / mesh.shape['expert']
  # Weights twice a microbatch, gradients written and read; parameters and state read and written
  # once; activations both ways.
  moved = accumulate * (2 * in_use + 2 * held + 2 * kept_bytes) + 2 * (held + optimizer_bytes)
  sent = _training_traffic(model, mesh, B, T, in_use, held, size, accumulate)
  links, network = _where(target, mesh, sent)
  return StepTime(
    flops / (chip.peak(precision) / chip.devices * utilisation),
    moved / (chip.bytes_per_second / chip.devices),
    links / (chip.interconnect_bytes_per_second / chip.devices),
    network / (chip.network_bytes_per_second / chip.devices),
    batch_size * length,
  )


def prefill(
  model: ModelConfig,
  target: Target,
  mesh: AbstractMesh,
  batch: int,
  length: int,
  *,
  utilisation: float = 1.0,
  precision: str = 'bf16',
) -> StepTime:
  """`batch` prompts of `length` tokens: forward products alone; weights read once, the state
  written."""
  tokens, size = batch * length, _size(precision)
  flops = flops_per_token(model, length) / 3 * tokens
  state = size * (model.state_size(length) or 0) * batch
  return _inference(
    model,
    target,
    mesh,
    flops,
    size * define(model).size + state,
    tokens,
    tokens,
    utilisation,
    precision,
  )


def decode(
  model: ModelConfig,
  target: Target,
  mesh: AbstractMesh,
  batch: int,
  context_length: int,
  *,
  utilisation: float = 1.0,
  precision: str = 'bf16',
) -> StepTime:
  """One token of each of `batch` sequences that are `context` tokens long: weights and state are
  read once. Of a mixture, the experts that so many tokens choose between them, evenly: E (1 - (1 -
  k / E)^batch) of E."""
  size = _size(precision)
  flops = batch * (
    cost(model, context_length).forward_flops_per_token + _last_token_extra(model, context_length)
  )
  weights = size * sum(
    i.size * (1 - (1 - i.active) ** batch if i.active < 1 else 1)
    for i in define(model).info.values()
    if i.matmul or i.active < 1
  )
  state = size * (model.state_size(context_length) or 0) * batch
  return _inference(
    model, target, mesh, flops, weights + state, batch, batch, utilisation, precision
  )


def _size(precision: str) -> int:
  return {'fp32': 4, 'bf16': 2}.get(precision, 1)


def _last_token_extra(model: ModelConfig, context_length: int) -> float:
  """The last of `context` tokens sees all of them, where the mean one sees half."""
  return model.mixing_flops_per_token(context_length, False) - model.mixing_flops_per_token(
    context_length, True
  )


def _inference(model, target, mesh, flops, moved, rows, tokens, utilisation, precision) -> StepTime:
  """Work and bytes divided evenly over the devices; over `tensor`, two all-reduces of the rows a
  block's branch."""
  chip, n = target.chip, mesh.shape['tensor']
  sent = {
    'tensor': 2
    * (n - 1)
    / n
    * _branches(model)
    * rows
    * n
    / mesh.size
    * model.width
    * _size(precision)
  }
  links, network = _where(target, mesh, sent)
  each = chip.devices
  return StepTime(
    flops / mesh.size / (chip.peak(precision) / each * utilisation),
    moved / mesh.size / (chip.bytes_per_second / each),
    links / (chip.interconnect_bytes_per_second / each),
    network / (chip.network_bytes_per_second / each),
    tokens,
  )


def _branches(model: ModelConfig) -> int:
  return sum(n for _, n in model.layers())


def _training_traffic(
  model: ModelConfig,
  mesh: AbstractMesh,
  B: int,
  T: int,
  in_use: float,
  held: float,
  size: int,
  accumulate: int,
) -> dict[str, float]:
  """Bytes that a device sends in a step, by mesh axis."""

  def share(axis: str) -> float:
    return (mesh.shape[axis] - 1) / mesh.shape[axis]

  stream = accumulate * size * B * T * model.width
  copies = sum(n * layer.experts_per_token for layer, n in model.layers())
  state = sum(n * (layer.state_size(model.width, T)) for layer, n in model.layers())
  return {
    'fsdp': share('fsdp') * 3 * accumulate * in_use,
    'data': share('data') * 2 * held,
    'replica': share('replica') * 2 * held,
    'tensor': share('tensor') * 2 * 2 * _branches(model) * stream,
    'expert': share('expert') * 4 * copies * stream,
    'context': (mesh.shape['context'] - 1)
    * 3
    * accumulate
    * size
    * B
    * state
    / mesh.shape['tensor'],
  }


def _where(target: Target, mesh: AbstractMesh, sent: dict[str, float]) -> tuple[float, float]:
  """Bytes on the fast links, and on the network."""
  links, network, reach = 0.0, 0.0, target.chip.domain
  for axis, size in sent.items():
    # devices up to and with this axis
    inner = math.prod(mesh.shape[a] for a in list(mesh.shape)[list(mesh.shape).index(axis) :])
    slow = (axis == 'replica' and target.slices > 1) or (
      reach is not None and inner > reach * target.chip.devices
    )
    links, network = (links, network + size) if slow else (links + size, network)
  return links, network
