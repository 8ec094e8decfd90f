"""Lower bounds on the time of a step: what each chip computes, reads and sends, at its peak rates.

A step cannot be shorter than the longest of three times: products at the peak, traffic of the
high-bandwidth memory, traffic of the links. They are assumed to overlap perfectly, so none of them
is a prediction.

What a training step sends, for n devices along an axis, each as in the program that the TPU
compiler makes (gradients in the compute dtype, before they are cast to fp32):

- `fsdp`: the weights in use, all-gathered in the forward and again in the backward pass, and their
  gradients reduce-scattered, in each microbatch.
- `replica`, `data` and `context`, and `expert` for all parameters but the experts: the device's
  shard of the gradients, all-reduced. With microbatches a compiler may do so in each of them, or
  sum them in fp32 first: what is less.
- `tensor`: after each residual branch whose last product is over a sharded dimension an all-reduce
  of the residual stream, forward and backward.
- `expert`: tokens to the experts of their layer and back, forward and backward, k copies of each.
- `context`: keys and values, or states, of the other shards; forward and twice backward.

Inference sends, forward alone: over `tensor` the residual stream; over `expert` the tokens; in the
prefill over `fsdp` the weights, and over `context` keys and values, or states. What does not divide
over the mesh is replicated, and computed on each of its devices.

Fast links connect the devices of a slice (a TPU), or of a host or rack (GPUs: `Chip.domain`); the
network connects these domains. Of a collective over a group with g devices in each of h domains, a
device receives at least W (g - 1) / g bytes over the links and, since the g devices can receive one
part each and pass it on, W (h - 1) / h / g over the network, where W is the result of the
all-gather; a reduce-scatter costs as much, an all-reduce both."""

import dataclasses
import math

from jaxformer.models.params import define
from jaxformer.planning.cost import flops
from jaxformer.planning.memory import DeviceMemory, bytes_of
from jaxformer.planning.setup import PlanSetup, shapes_in_use, shards_in_use


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
  """The bounds of one step of a setup, whose memory per device is `memory`."""
  mesh, chip, phase = setup.abstract_mesh, setup.target.chip, setup.phase
  work = flops(setup.model, phase, setup.batch_size, setup.length, last_logits=phase == 'prefill')
  if phase == 'train':
    # Policies other than 'full' recompute only what is cheap.
    work *= (4 / 3 if setup.remat == 'full' else 1) / mesh.size
    moved, sent = _training_traffic(setup, memory)
  else:
    (B, T), length = setup.shared_batch, 1 if phase == 'decode' else setup.length
    work *= B / setup.batch_size * T / length / mesh.shape['tensor']
    moved, sent = _inference_traffic(setup, memory)
  links, network = _by_medium(setup, sent)
  return StepTime(
    work * chip.devices / chip.peak(setup.precision),
    moved * chip.devices / chip.bytes_per_second,
    links * chip.devices / chip.interconnect_bytes_per_second,
    network * chip.devices / chip.network_bytes_per_second,
    setup.batch_size * (1 if phase == 'decode' else setup.length),
  )


@dataclasses.dataclass(frozen=True)
class _Sent:
  """Bytes that one device receives in collectives of one kind.

  Attributes:
    axes: of the mesh; the devices that differ along them communicate.
    bytes: of the arrays that are gathered or reduced; of an exchange, those that a device has.
    times: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
    exchange: whether each pair of devices has data of its own, as in an all-to-all.
  """

  axes: tuple[str, ...]
  bytes: float
  times: float = 1
  exchange: bool = False


def _training_traffic(setup: PlanSetup, memory: DeviceMemory) -> tuple[float, list[_Sent]]:
  """(bytes of memory traffic, what is sent) of one device."""
  model, mesh, size = setup.model, setup.abstract_mesh, setup.bytes_per_value
  (B, T), n = setup.local_batch, setup.accumulate
  params = define(model).abstract(setup.parallel)
  held = bytes_of(params)
  in_use = _bytes_in_use(setup)
  # Per microbatch: weights read twice, gradients written and read, activations likewise. Once:
  # parameters and optimizer state read and written.
  per_microbatch = 2 * in_use + 2 * held * size / 4 + 2 * memory.activations
  moved = n * per_microbatch + 2 * (held + memory.optimizer)

  info = define(model).info
  experts = bytes_of({k: p for k, p in params.items() if 'experts' in info[k].axes})
  per_value = min(n * size, max(size, 4))
  stream = n * size * B * T * model.width
  copies = sum(count * layer.experts_per_token for layer, count in model.layers())
  state = sum(count * layer.state_size(w, T) for layer, w, count in model.layers_with_widths())
  states = n * size * B * state / mesh.shape['tensor'] * mesh.shape['context']
  gradients = _batch_axes(setup)
  return moved, [
    _Sent(('fsdp',), n * _bytes_in_use(setup, gathered=True), 3),
    _Sent((*gradients, 'expert'), (held - experts) / 4 * per_value, 2),
    _Sent(gradients, experts / 4 * per_value, 2),
    _Sent(('tensor',), _branches(setup) * stream, 4),
    _Sent(('expert',), copies * stream, 4, exchange=True),
    _Sent(('context',), states, 3),
  ]


def _batch_axes(setup: PlanSetup) -> tuple[str, ...]:
  """Mesh axes over which every device computes with the same shard of the parameters, and other
  tokens."""
  table, specs = setup.parallel.table, define(setup.model).shardings(setup.parallel).values()
  entries = [entry for where in specs for entry in where.spec if entry is not None]
  sharded = {axis for e in entries for axis in ((e,) if isinstance(e, str) else e)}
  tokens = (*table.activations['batch'], *table.activations['time'])
  return tuple(axis for axis in tokens if axis not in sharded and axis != 'expert')


def _bytes_in_use(setup: PlanSetup, gathered: bool = False) -> float:
  """Bytes of the weights of one device where they are used, without tables that are looked up; with
  `gathered`, of those that are all-gathered."""
  shapes, definition = shapes_in_use(setup.model, setup.parallel), define(setup.model)
  where, total = definition.shardings(setup.parallel), 0
  for name, i in definition.info.items():
    used = math.prod(shapes[name])
    if i.matmul and not (gathered and math.prod(where[name].shard_shape(i.shape)) == used):
      total += used * i.uses
  return setup.bytes_per_value * total


def _inference_traffic(setup: PlanSetup, memory: DeviceMemory) -> tuple[float, list[_Sent]]:
  """(bytes of memory traffic, what is sent) of one device.

  The prefill writes the state, decoding reads it. Both read the weights that are multiplied: in a
  mixture those of the experts that the tokens select, if they do so evenly, E (1 - (1 - k / E)^n)
  of E experts for n tokens."""
  model, mesh, size = setup.model, setup.abstract_mesh, setup.bytes_per_value
  B, T = setup.shared_batch
  in_use, where = shapes_in_use(model, setup.parallel), define(model).shardings(setup.parallel)
  tokens, read = B * T * mesh.shape['expert'], 0.0
  for name, i in define(model).info.items():
    if i.matmul or i.active < 1:
      # decoding all-gathers no weights (see `memory`)
      shape = in_use[name] if setup.phase == 'prefill' else where[name].shard_shape(i.shape)
      selected = 1 - (1 - i.active) ** tokens if i.active < 1 else 1
      read += size * math.prod(shape) * selected * i.uses

  stream, prefill = size * B * T * model.width, setup.phase == 'prefill'
  copies = sum(n * layer.experts_per_token for layer, n in model.layers())
  sent = [
    _Sent(('tensor',), _branches(setup) * stream, 2),
    _Sent(('expert',), copies * stream, 2, exchange=True),
  ]
  if prefill:
    sent += [
      _Sent(('fsdp',), _bytes_in_use(setup, gathered=True)),
      _Sent(('context',), memory.state),
    ]
  return read + memory.state, sent


def _branches(setup: PlanSetup) -> int:
  """The number of residual branches whose last product is over a dimension that `tensor` shards, so
  that results are summed over the devices."""
  shards, count = shards_in_use(setup.model, setup.parallel), {}
  for name, i in define(setup.model).info.items():
    branch, inputs = (
      name.partition('.layer.')[0],
      [n for axis, n in zip(i.axes[:-1], shards[name][:-1], strict=True) if axis != 'layers'],
    )
    if i.axes[-1:] == ('embed',) and math.prod(inputs) > 1 and '.branches.' in name:
      count[branch] = i.shape[0] if i.axes[0] == 'layers' else 1
  return sum(count.values())


def _by_medium(setup: PlanSetup, sent: list[_Sent]) -> tuple[float, float]:
  """Bytes that a device receives over the fast links, and over the network."""
  mesh, target = setup.abstract_mesh, setup.target
  domain = target.chip.domain
  devices = target.devices_per_slice if domain is None else domain * target.chip.devices
  near, inner = {}, 1  # devices along an axis that are in one domain
  for axis, n in reversed(mesh.shape.items()):
    near[axis] = math.gcd(n, max(1, devices // inner))
    inner *= n
  links = network = 0.0
  for s in sent:
    g = math.prod(near[a] for a in s.axes)
    n = math.prod(mesh.shape[a] for a in s.axes)
    links += s.times * s.bytes * (g - 1) / (n if s.exchange else g)
    network += s.times * s.bytes * (1 - g / n) / (1 if s.exchange else g)
  return links, network
