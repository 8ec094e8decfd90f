"""Time of collectives over the links of a TPU slice, from the places of the devices in its torus.

A collective over n devices uses the links of the dimensions along which they differ: in a
dimension that closes to a ring, two links per device, one in each direction; in one that is open,
the device at the end has one. With W the bytes of the whole array and B the bandwidth of those
links, an all-gather and a reduce-scatter take W (n - 1) / n / B, an all-reduce twice that (Austin
et al. 2025, "How to Scale Your Model", section on sharded matrices). An all-to-all sends each part
of a device's V bytes to another device: in a ring of m devices m V / 8 per link, in an open line m
V / 4; over several dimensions, parts of V take them in different order at once, so that the mean
of the dimensions counts. No collective is shorter than the hops that a message takes."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from jaxformer.hardware import Chip
from jaxformer.planning.collectives import Collective, groups_of

HOP_SECONDS = 1e-6  # of one message over one link, as in the same book


@dataclasses.dataclass(frozen=True)
class Links:
  """The links between the devices of a mesh.

  Attributes:
    mesh: over the devices of a described slice, which carry their coordinates.
    chip: its bandwidths.
  """

  mesh: Mesh
  chip: Chip

  def seconds(self, c: Collective) -> float:
    """How long one execution of a collective takes if nothing else uses its links."""
    group = self._largest_group(c)
    n = len(group)
    if n < 2:
      return 0.0
    across, near = self._slices(group)
    inside = self._within(c, group[: n // across], near)
    if across == 1:
      return inside
    network = _share(c, n) * (across - 1) / across / near
    return inside + network * self.chip.devices / self.chip.network_bytes_per_second

  def _largest_group(self, c: Collective) -> list:
    devices, groups = self.mesh.devices.reshape(-1), groups_of(c, self.mesh.size)
    row = max((sorted(set(g.tolist())) for g in groups), key=len)
    return [devices[i] for i in row]

  def _slices(self, group: list) -> tuple[int, int]:
    """How many slices a group spans, and how many of its devices are in each."""
    across = len({getattr(d, 'slice_index', None) for d in group})
    return across, len(group) // across

  def _within(self, c: Collective, group: list, n: int) -> float:
    """Seconds on the links of one slice."""
    places = np.array([d.coords for d in group])
    spans = [d for d in range(places.shape[1]) if len(set(places[:, d].tolist())) > 1]
    if not spans:  # the two devices of one chip
      return 0.0
    each = self.chip.interconnect_bytes_per_second / (self.chip.links or 1) / self.chip.devices
    rings = [self._closed(d, places[:, d]) for d in spans]
    lengths = [len(set(places[:, d].tolist())) for d in spans]
    hops = sum(m // (2 if ring else 1) for m, ring in zip(lengths, rings, strict=True))
    if c.kind == 'collective-permute':
      return max(c.bytes / each, HOP_SECONDS)
    if c.kind == 'all-to-all':
      parts = [m / (8 if ring else 4) for m, ring in zip(lengths, rings, strict=True)]
      return max(c.bytes * sum(parts) / len(parts) / each, hops * HOP_SECONDS)
    bandwidth = each * sum(2 if ring else 1 for ring in rings)
    return max(_share(c, n) * (n - 1) / n / bandwidth, hops * HOP_SECONDS)

  def _closed(self, dimension: int, places: np.ndarray) -> bool:
    """Whether the devices of a group close to a ring: all along a dimension that wraps around."""
    shape = [{d.coords[i] for d in self.mesh.devices.flat} for i in range(3)]
    closed = self.chip.closed([len(places) for places in shape])[dimension]
    return closed and set(places.tolist()) == shape[dimension]


def _share(c: Collective, n: int) -> float:
  """Bytes that each device has to receive, but for the factor (n - 1) / n: the whole array of an
  all-gather or a reduce-scatter, twice the array of an all-reduce."""
  factor = {'all-reduce': 2, 'reduce-scatter': n}
  return c.bytes * factor.get(c.kind, 1)
