"""Lower bounds on the time of a step: what each chip computes, reads and sends, at its peak rates.

A step cannot be shorter than the longest of three times: products at the peak, traffic of the
high-bandwidth memory, traffic of the links. They are assumed to overlap perfectly, so none of them
is a prediction.

A training step sends, in bytes that one device puts on its links, for n devices along an axis:

- `fsdp`: the weights in the compute dtype, all-gathered in the forward and again in the backward
  pass, and the gradients reduce-scattered: (n - 1) / n of each.
- `data` and `replica`: the gradients all-reduced, 2 (n - 1) / n of the device's shard of them, in
  fp32 as they are summed.
- `tensor`: after each residual branch an all-reduce of the residual stream, forward and backward: 2
  (n - 1) / n of it.
- `expert`: tokens to the experts of their layer and back, forward and backward: k copies, (n - 1) /
  n of them.
- `context`: keys and values, or states, of the other shards; forward and twice backward.

Inference shards weights and state evenly and sends the residual stream of each branch over
`tensor`, forward.

`replica` crosses the network, as does any axis of GPUs that is wider than the domain of their fast
links; the other axes use the links."""

import dataclasses
import math

from jaxformer.models.params import define
from jaxformer.planning.cost import flops
from jaxformer.planning.memory import DeviceMemory, bytes_of
from jaxformer.planning.setup import PlanSetup


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Lower bounds of one step, in seconds.

  Attributes:
    compute_seconds: products at the peak.
    memory_seconds: traffic of the high-bandwidth memory.
    interconnect_seconds: traffic of the links within a slice or host.
    network_seconds: traffic between slices or hosts.
    tokens: processed by all devices in that time.
  """

  compute_seconds: float
  memory_seconds: float
  interconnect_seconds: float
  network_seconds: float
  tokens: int

  @property
  def by_resource(self) -> dict[str, float]:
    """The four times."""
    names = 'compute', 'memory', 'interconnect', 'network'
    return {name: getattr(self, f'{name}_seconds') for name in names}

  @property
  def bound(self) -> str:
    """The bottleneck: 'compute', 'memory', 'interconnect' or 'network'."""
    return max(self.by_resource, key=self.by_resource.__getitem__)

  @property
  def seconds(self) -> float:
    """The lower bound: the longest of the four."""
    return max(self.by_resource.values())

  @property
  def total_seconds(self) -> float:
    """The sum of the four, as if nothing overlapped."""
    return sum(self.by_resource.values())

  @property
  def tokens_per_second(self) -> float:
    """The upper bound on throughput."""
    return self.tokens / self.seconds


def step_time(setup: PlanSetup, memory: DeviceMemory) -> StepTime:
  """The bounds of one step of a setup, whose memory per device is `memory`.

  The prefill counts the head at every position, although a compiled prefill computes the logits of
  the last one alone (`flops(..., last_logits=True)`)."""
  mesh, chip = setup.abstract_mesh, setup.target.chip
  work = flops(setup.model, setup.phase, setup.batch_size, setup.length) / mesh.size
  if setup.phase == 'train':
    # Policies other than 'full' recompute only what is cheap.
    work *= 4 / 3 if setup.remat == 'full' else 1
    moved, sent = _training_traffic(setup, memory)
  else:
    moved, sent = _inference_traffic(setup, memory)
  links, network = _by_medium(setup, sent)
  return StepTime(
    work * chip.devices / chip.peak(setup.precision),
    moved * chip.devices / chip.bytes_per_second,
    links * chip.devices / chip.interconnect_bytes_per_second,
    network * chip.devices / chip.network_bytes_per_second,
    setup.batch_size * (1 if setup.phase == 'decode' else setup.length),
  )


def _training_traffic(setup: PlanSetup, memory: DeviceMemory) -> tuple[float, dict[str, float]]:
  """(bytes of memory traffic, mesh axis -> bytes sent) of one device."""
  model, mesh, size = setup.model, setup.abstract_mesh, setup.bytes_per_value
  definition, (B, T) = define(model), setup.local_batch
  held = bytes_of(definition.abstract(setup.parallel))
  in_use = size * definition.size / mesh.shape['tensor'] / mesh.shape['expert']
  # Per microbatch: weights read twice, gradients written and read, activations likewise. Once:
  # parameters and optimizer state read and written.
  per_microbatch = 2 * in_use + 2 * held + 2 * memory.activations
  moved = setup.accumulate * per_microbatch + 2 * (held + memory.optimizer)

  def share(axis: str) -> float:
    return (mesh.shape[axis] - 1) / mesh.shape[axis]

  stream = setup.accumulate * size * B * T * model.width
  copies = sum(n * layer.experts_per_token for layer, n in model.layers())
  state = sum(n * layer.state_size(width, T) for layer, width, n in model.layers_with_widths())
  states = setup.accumulate * size * B * state / mesh.shape['tensor']
  return moved, {
    'fsdp': share('fsdp') * 3 * setup.accumulate * in_use,
    'data': share('data') * 2 * held,
    'replica': share('replica') * 2 * held,
    'tensor': share('tensor') * 2 * 2 * _branches(setup) * stream,
    'expert': share('expert') * 4 * copies * stream,
    'context': (mesh.shape['context'] - 1) * 3 * states,
  }


def _inference_traffic(setup: PlanSetup, memory: DeviceMemory) -> tuple[float, dict[str, float]]:
  """(bytes of memory traffic, mesh axis -> bytes sent) of one device.

  The prefill reads all weights once and writes the state; decoding reads the state, and the weights
  that are multiplied. In a mixture these are the experts that the batch selects, if it does so
  evenly: E (1 - (1 - k / E)^batch) of E."""
  mesh, size, rows = setup.abstract_mesh, setup.bytes_per_value, setup.batch_size
  if setup.phase == 'prefill':
    moved, rows = memory.total, rows * setup.length
  else:
    read = sum(
      i.size * (1 - (1 - i.active) ** rows if i.active < 1 else 1)
      for i in define(setup.model).info.values()
      if i.matmul or i.active < 1
    )
    moved = size * read / mesh.size + memory.state
  n = mesh.shape['tensor']
  per_branch = 2 * (n - 1) / n * rows * n / mesh.size * setup.model.width * size
  return moved, {'tensor': _branches(setup) * per_branch}


def _branches(setup: PlanSetup) -> int:
  return sum(n for _, n in setup.model.layers())


def _by_medium(setup: PlanSetup, sent: dict[str, float]) -> tuple[float, float]:
  """Bytes sent over the fast links, and over the network."""
  mesh, target = setup.abstract_mesh, setup.target
  links, network, domain = 0.0, 0.0, target.chip.domain
  for axis, size in sent.items():
    # devices spanned by this axis and those inside it
    inner = math.prod(mesh.shape[a] for a in list(mesh.shape)[list(mesh.shape).index(axis) :])
    if (axis == 'replica' and target.slices > 1) or (
      domain is not None and inner > domain * target.chip.devices
    ):
      network += size
    else:
      links += size
  return links, network
