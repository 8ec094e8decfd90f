"""Accelerator slices by their cloud names: 'v5p-2048', 'v6e-256', '2 x v5e-256', 'v5e:2x4',
'h100:8'."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxformer.config import InputError
from jaxformer.planning.hardware import CHIPS, Chip, chip_named

# The topologies that Google Cloud offers, smallest first; the first of each size is the default.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SOLID = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x4x12',
  '4x8x8',
  '4x4x16',
  '4x8x12',
  '8x8x8',
  '8x8x12',
  '8x8x16',
  '8x16x16',
  '12x12x12',
  '12x12x16',
  '12x16x16',
  '12x12x24',
  '16x16x16',
)
SHAPES: Mapping[str, tuple[str, ...]] = {
  'v4': _SOLID,
  'v5e': _FLAT,
  'v5p': (*_SOLID, '12x16x24', '12x24x24', '16x16x24'),
  'v6e': _FLAT,
  'v7x': (*_SOLID, '12x16x24', '16x16x24', '12x24x24', '16x24x24'),
}
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
  chip = chip_named({'tpu7x': 'v7x', 'v5litepod': 'v5e'}.get(name, name), chips)
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
    shape = 'x'.join(map(str, sorted(map(int, shape.split('x'))))) if shape not in shapes else shape
    if shape not in shapes:
      raise InputError('target', text, f'one of the topologies of {chip.name}: {", ".join(shapes)}')
  else:
    offered = {_size(s): s for s in reversed(shapes)}
    asked = int(number or 0)
    if asked % chip.cores or asked // chip.cores not in offered:
      counts = sorted(n * chip.cores for n in offered)
      near = [*[n for n in counts if n < asked][-1:], *[n for n in counts if n > asked][:1]]
      unit = 'TensorCores, two per chip' if chip.cores == 2 else 'chips'
      sizes = ' or '.join(f'{chip.name}-{n}' for n in near)
      raise InputError('target', text, f'an offered size such as {sizes} (in {unit})')
    shape = offered[asked // chip.cores]
  n = _size(shape)
  # libtpu describes no smaller slice; a single chip is the first of a 2x2
  described = '2x2' if n == 1 else shape
  return Target(
    chip, n, 1, f'{_LIBTPU.get(chip.name, chip.name)}:{described}', f'{chip.name}-{n * chip.cores}'
  )


def _size(shape: str) -> int:
  return math.prod(int(d) for d in shape.split('x'))
