"""Accelerator slices by their cloud names: 'v5p-2048', 'v6e-256', '2 x v5e-256', 'v5e:2x4',
'h100:8'."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxformer.config import InputError
from jaxformer.hardware import CHIPS, Chip, chip_named

# The topologies that Google Cloud offers. Of the chips with a 3D torus (v4, v5p, v7x) these are the
# slices below a cube of 64 chips; from there on A x B x C with A <= B <= C in multiples of four
# (cloud.google.com/tpu/docs/types-topologies; "Plan TPUs in GKE", custom topologies), up to
# the chips of a pod. Names with a number mean the one closest to a cube, as in the tables there and
# in xpk (`core/system_characteristics.py`): v5p-1408 is 4x4x44, v5p-11520 is 12x20x24. Single jobs
# on v5p are documented up to 6,144 chips, in pods of 8,960. Read in 2026-11.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SOLID = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
SHAPES: Mapping[str, tuple[str, ...]] = {
  'v2': ('2x2', '4x4', '8x8', '8x16', '16x16'),
  'v3': ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16', '16x32', '32x32'),
  'v4': _SOLID,
  'v5e': _FLAT,
  'v5p': _SOLID,
  'v6e': _FLAT,
  'v7x': ('1x1x1', *_SOLID),
}
MOST_CHIPS: Mapping[str, int] = {'v4': 4096, 'v5p': 8960, 'v7x': 9216}  # of a pod
_CUBE = 4  # chips along each side of the smallest torus
_NAMES = {'tpu7x': 'v7x', 'v5litepod': 'v5e', 'v5lite': 'v5e'}  # other names of sellers
_LIBTPU = {'v7x': 'tpu7x'}  # chip -> its name in libtpu, if different
_FORM = re.compile(
  r'(?:({n})\s*x\s*)?(?=[a-z])([a-z][\w\-]*?)(?:-({n})|:({n}(?:x{n})*))'.replace(
    '{n}', '[0-9]{1,9}'
  )
)


@dataclasses.dataclass(frozen=True)
class Target:
  """Slices of one kind of chip.

  Attributes:
    chip: its specifications.
    chips: number per slice; of GPUs, all of them.
    slices: number of slices, connected by the network alone.
    topology: of a slice, as libtpu names it ('v5p:8x8x16'); None for GPUs.
    name: its cloud name.
  """

  chip: Chip
  chips: int
  slices: int
  topology: str | None
  name: str

  @property
  def devices(self) -> int:
    """JAX devices of all slices, to which the axes of a mesh multiply."""
    return self.total_chips * self.chip.devices

  @property
  def devices_per_slice(self) -> int:
    return self.chips * self.chip.devices

  @property
  def platform(self) -> str:
    """'gpu' or 'tpu': whose kernels run."""
    return 'gpu' if self.chip.domain else 'tpu'

  @property
  def total_chips(self) -> int:
    return self.chips * self.slices

  @property
  def device_memory_bytes(self) -> float:
    """Memory that one JAX device may use."""
    return self.chip.memory_bytes / self.chip.devices

  @property
  def hosts(self) -> int:
    """Hosts of all slices."""
    return self.slices * -(-self.chips // self.chip.chips_per_host)

  def price_per_hour(self, spot: bool = False) -> float | None:
    """List price of all chips in USD per hour; None for spot capacity without a list price."""
    price = self.chip.spot_per_hour if spot else self.chip.price_per_hour
    return None if price is None else price * self.total_chips

  def as_json(self) -> dict[str, Any]:
    """The figures that an estimate rests on."""
    return {
      'name': self.name,
      'chips': self.total_chips,
      'slices': self.slices,
      'topology': self.topology,
      'devices': self.devices,
      'hosts': self.hosts,
      'price_per_hour_usd': self.price_per_hour(),
      'chip': dataclasses.asdict(self.chip),
    }


def parse_target(text: str, chips: Mapping[str, Chip] = CHIPS) -> Target:
  """The target that a name means.

  `NAME-N` counts chips (v5e, v6e) or TensorCores, two per chip (v4, v5p, v7x); `NAME:AxB` is a
  topology; `GPU:N` a number of GPUs; `S x ...` is S slices. Raises `InputError` with the nearest
  chip name, or the nearest sizes that are offered."""
  match = _FORM.fullmatch(text.strip().lower())
  if match is None:
    names = 'a cloud name such as v5p-2048, v6e-256, 2 x v5e-256, v5e:2x4 or h100:8'
    raise InputError('target', text, names)
  slices, name, number, shape = match.groups()
  chip = chip_named(_NAMES.get(name, name), chips)
  count = int(slices or 1)
  if count < 1:
    raise InputError('target', text, 'at least one slice')
  one = (
    _gpus(text, chip, number or shape, count) if chip.domain else _slice(text, chip, number, shape)
  )
  return dataclasses.replace(
    one, slices=count, name=one.name if count == 1 else f'{count} x {one.name}'
  )


def _gpus(text: str, chip: Chip, number: str, slices: int) -> Target:
  if 'x' in number or int(number) < 1:
    raise InputError('target', text, f'a number of GPUs, such as {chip.name}:8')
  n = int(number)
  if n > chip.chips_per_host and n % chip.chips_per_host:
    each, below = chip.chips_per_host, n // chip.chips_per_host * chip.chips_per_host
    whole = f'full hosts of {each} GPUs, such as {below} or {below + each}'
    raise InputError('target', text, whole)
  return Target(chip, n, slices, None, f'{chip.name}:{n}')


def _slice(text: str, chip: Chip, number: str | None, shape: str | None) -> Target:
  shapes = SHAPES.get(chip.name)
  if shape is not None and 'x' not in shape:
    forms = f'a topology ({chip.name}:{(shapes or _FLAT)[1]}) or a size ({chip.name}-{shape})'
    raise InputError('target', text, forms)
  if shapes is None:  # a chip of a user's --hardware file
    n = _size(shape or number or '0')
    return Target(chip, n, 1, None, f'{chip.name}-{n}')
  if shape is not None:
    shape = _offered_shape(text, chip, shape)
  else:
    offered, asked = offered_sizes(chip.name), int(number or 0)
    if asked % chip.cores or asked // chip.cores not in offered:
      counts = [n * chip.cores for n in offered]
      near = [*[n for n in counts if n < asked][-1:], *[n for n in counts if n > asked][:1]]
      unit = 'TensorCores, two per chip' if chip.cores == 2 else 'chips'
      sizes = ' or '.join(f'{chip.name}-{n}' for n in near)
      raise InputError('target', text, f'an offered size such as {sizes} (in {unit})')
    shape = offered[asked // chip.cores]
  n = _size(shape)
  # libtpu describes no smaller slice; a single chip is the first of its host
  described = {'1x1': '2x2', '1x1x1': '2x2x1'}.get(shape, shape)
  return Target(
    chip, n, 1, f'{_LIBTPU.get(chip.name, chip.name)}:{described}', f'{chip.name}-{n * chip.cores}'
  )


def _offered_shape(text: str, chip: Chip, shape: str) -> str:
  """A topology as Google writes it. Raises `InputError` for one that is not offered."""
  small, most = SHAPES[chip.name], MOST_CHIPS.get(chip.name)
  dims = sorted(map(int, shape.split('x')))
  for s in small:
    if sorted(map(int, s.split('x'))) == dims:
      return s
  cubes = most is not None and len(dims) == 3 and all(d and d % _CUBE == 0 for d in dims)
  if most is not None and cubes and math.prod(dims) <= most:
    return 'x'.join(map(str, dims))
  larger = (
    f', or multiples of {_CUBE} chips along each side, at most {most:,} in all' if most else ''
  )
  raise InputError(
    'target', text, f'one of the topologies of {chip.name}: {", ".join(small)}{larger}'
  )


@functools.cache
def offered_sizes(chip: str) -> dict[int, str]:
  """Number of chips -> the topology closest to a cube, smallest first."""
  found = {_size(s): s for s in SHAPES[chip]}
  most = MOST_CHIPS.get(chip, 0) // _CUBE**3
  for a in range(1, most + 1):
    for b in range(a, most // a + 1):
      for c in range(b, most // (a * b) + 1):
        n, dims = _CUBE**3 * a * b * c, [_CUBE * x for x in (a, b, c)]
        if n not in found or sum(dims) < sum(map(int, found[n].split('x'))):
          found[n] = 'x'.join(map(str, dims))
  return dict(sorted(found.items()))


def _size(shape: str) -> int:
  return math.prod(int(d) for d in shape.split('x'))
