"""Chip specifications: peak rates, memory, links, compiler options and list prices, each with its
source and date, in `hardware.toml`. A user's file in the same format can add and override chips."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxformer.config import Config, InputError, from_json, nearest, to_json
from jaxformer.files import regular_file, user_path
from jaxformer.json_data import parse_json

GIB = 2**30


class Chip(Config):
  """Chip specifications.

  Attributes:
    name: short name, as in a target: 'v5p', 'h100'.
    kind: `device_kind` in JAX ('TPU v5'); '' if JAX has none.
    flops_per_second: dense peak (no sparsity) by precision: 'bf16', and 'int8', 'fp8', 'tf32',
      'fp32' if published; products in fp32 see `peak`.
    memory_bytes: high-bandwidth memory available to a program: the compiler's limit if known, else
      that of the data sheet.
    bytes_per_second: bandwidth of that memory.
    interconnect_bytes_per_second: of all fast links together (ICI, NVLink), in one direction.
    network_bytes_per_second: the chip's share of its host's network (all of the host's bandwidth
      over its chips), in one direction; used between slices, or between GPU hosts.
    chips_per_host: chips of a full host.
    domain: number of chips that the fast links connect; None for an entire slice (TPU).
    cores: TensorCores per chip that names such as `v5p-2048` count; 1 if names count chips.
    devices: JAX devices per chip.
    links: of a TPU, fast links per chip, over which `interconnect_bytes_per_second` is divided.
    ring: of a TPU, the dimensions of a slice close to rings if their lengths are multiples of this:
      of a 3D torus all of them or none, of a 2D torus each on its own.
    clock_hz: of a TPU, cycles per second of its matrix units.
    compiler_options: name -> value of options with which training steps are compiled for the chip.
    price_per_hour: on-demand list price per chip, USD.
    spot_per_hour: list price of spot capacity; None if there is none (it moves with the market).
    source: where the figures are from, and which are uncertain.
    date: when the figures were recorded, year-month.
  """

  name: str
  kind: str = ''
  flops_per_second: Any
  memory_bytes: float
  bytes_per_second: float
  interconnect_bytes_per_second: float
  network_bytes_per_second: float
  chips_per_host: int
  domain: int | None = None
  cores: int = 1
  devices: int = 1
  links: int | None = None
  ring: int | None = None
  clock_hz: float | None = None
  compiler_options: Any = dataclasses.field(default_factory=dict)
  price_per_hour: float
  spot_per_hour: float | None = None
  source: str
  date: str

  def validate(self):
    rates = self.flops_per_second
    self.require(
      isinstance(rates, Mapping)
      and 'bf16' in rates
      and all(isinstance(v, int | float) and 0 < v < math.inf for v in rates.values()),
      'flops_per_second',
      'precision -> positive number, including bf16',
    )
    options = self.compiler_options
    self.require(
      isinstance(options, Mapping) and all(isinstance(v, str) for v in options.values()),
      'compiler_options',
      'name of an option -> its value in quotes',
    )
    numbers = [name for name, v in vars(self).items() if isinstance(v, int | float)]
    self.require_positive(*numbers)
    for name in numbers:
      self.require(math.isfinite(getattr(self, name)), name, 'a finite number')

  def closed(self, shape: Sequence[int]) -> tuple[bool, ...]:
    """Which dimensions of a slice of this shape close to rings."""
    rings = [self.ring is not None and n % self.ring == 0 for n in shape]
    return (all(rings),) * len(rings) if self.links == 6 else tuple(rings)

  def peak(self, precision: str = 'bf16') -> float:
    """Peak FLOPs per second at a precision; of 'fp32', that of products of fp32 arrays at the
    default precision of JAX: one pass in bfloat16 on a TPU, TF32 on a GPU that has it. Raises
    `InputError` for an unknown precision."""
    if precision == 'fp32':
      names = ('fp32', 'bf16') if self.domain is None else ('tf32', 'fp32', 'bf16')
      return next(self.flops_per_second[n] for n in names if n in self.flops_per_second)
    if precision not in self.flops_per_second:
      known = ', '.join(self.flops_per_second)
      near = nearest(precision, self.flops_per_second)
      raise InputError('precision', precision, f'one of those of {self.name}, {known}{near}')
    return self.flops_per_second[precision]


_TABLE = resources.files('jaxformer').joinpath('hardware.toml').read_text()
CHIPS = {name: Chip(name=name, **fields) for name, fields in tomllib.loads(_TABLE).items()}
# other names in JAX
_ALIASES = {
  'TPU v5p': 'TPU v5',
  'TPU v5e': 'TPU v5 lite',
  'TPU v6e': 'TPU v6 lite',
  'TPU7': 'TPU7x',
  'TPU v7x': 'TPU7x',
  # the same rates and memory
  'NVIDIA A100-PCIE-40GB': 'NVIDIA A100-SXM4-40GB',
}


def chip(device_kind: str) -> Chip | None:
  """The chip of a JAX `device_kind`; None if it is not in the table, such as a CPU."""
  kind = _ALIASES.get(device_kind, device_kind)
  # the kind of a GPU ends with its memory: 'NVIDIA H100 80GB HBM3'
  found = [
    c
    for c in CHIPS.values()
    if kind == c.kind or (c.domain is not None and kind.startswith((f'{c.kind} ', f'{c.kind}-')))
  ]
  return max(found, key=lambda c: len(c.kind), default=None)


def compiler_options(device_kind: str, given: Sequence[str] = ()) -> dict[str, str]:
  """The options, name -> value, with which a training step is compiled for a device: those of its
  chip, and over them `given`, each NAME=VALUE. Raises `InputError` for one in another form."""
  known = chip(device_kind)
  options = {} if known is None else dict(known.compiler_options)
  for text in given:
    name, equals, value = text.partition('=')
    if not (name and equals and value):
      raise InputError(
        'training.compiler_options', text, 'NAME=VALUE, as xla_tpu_scoped_vmem_limit_kib=32768'
      )
    options[name] = value
  return options


def chip_named(name: str, chips: Mapping[str, Chip] = CHIPS) -> Chip:
  """The chip of a short name. Raises `InputError` with the nearest names."""
  if name not in chips:
    raise InputError(f'unknown chip {name!r}; known: {", ".join(chips)}{nearest(name, chips)}')
  return chips[name]


def hardware_file(path: str | Path) -> dict[str, Chip]:
  """The table with the chips of a user's file: TOML or JSON, chip name -> fields of `Chip`.

  Fields override those of a known chip; an unknown chip needs all fields without a default, except
  `source` and `date`. Raises `InputError` that names the file, the chip and the field."""
  path = user_path(path, '--hardware')
  try:
    text = regular_file(path).read_text()
    data = tomllib.loads(text) if path.suffix == '.toml' else parse_json(text)
  except OSError as e:
    raise InputError(f'--hardware {path}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise InputError(
      f'--hardware {path}: {e} (read as TOML if the name ends in .toml, else as JSON)'
    ) from e
  if not isinstance(data, dict):
    raise InputError(f'--hardware {path}: must hold chip name -> fields')
  return CHIPS | {
    name: _own(f'--hardware {path}: {name}', name, fields) for name, fields in data.items()
  }


def _own(where: str, name: str, fields: Any) -> Chip:
  if not isinstance(fields, dict) or fields.keys() & {'type', 'name'}:
    raise InputError(where, fields, 'fields of a chip other than its name')
  known: dict[str, Any] = to_json(CHIPS[name]) if name in CHIPS else {}
  chip = known | {'type': 'Chip', 'name': name, 'source': where, 'date': 'of the file'} | fields
  if isinstance(rates := fields.get('flops_per_second'), dict):
    chip['flops_per_second'] = known.get('flops_per_second', {}) | rates
  try:
    return from_json(chip, Chip.tag, Chip)
  except InputError as e:  # names the field alone
    raise InputError(f'{where}: {e}') from e
