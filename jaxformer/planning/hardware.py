"""Accelerators: peak rates, memory, links and list prices, each with its source and date; a user's
own file adds or overrides."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformer.config import InputError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator, as one buys it.

  Attributes:
    name: short, as in a target: 'v5p', 'h100'.
    kind: what JAX calls such a device ('TPU v5'); '' for one that JAX has no name for.
    flops_per_second: dense peak (no sparsity) by precision: 'bf16', and 'int8', 'fp8', 'fp32' where
      the maker states them.
    memory_bytes: high-bandwidth memory that a program may use: the compiler's own limit where it is
      known, else the data sheet's.
    bytes_per_second: bandwidth of that memory.
    interconnect_bytes_per_second: of all its fast links together (ICI, NVLink), in one direction.
    network_bytes_per_second: its share of its host's network, in one direction: between slices, or
      between GPU hosts.
    chips_per_host: chips of a full host.
    domain: how many chips the fast links join; None for a whole slice (TPU).
    cores: TensorCores that names such as `v5p-2048` count; 1 where names count chips.
    devices: JAX devices a chip.
    price_per_hour: on-demand list price a chip, USD.
    spot_per_hour: of spot capacity; None where no list price stands (it moves with the market).
    source: where each kind of figure is from, and what is uncertain.
    date: when the figures were noted, year-month.
  """

  name: str
  kind: str = ''
  flops_per_second: Mapping[str, float]
  memory_bytes: float
  bytes_per_second: float
  interconnect_bytes_per_second: float
  network_bytes_per_second: float
  chips_per_host: int
  domain: int | None = None
  cores: int = 1
  devices: int = 1
  price_per_hour: float
  spot_per_hour: float | None = None
  source: str
  date: str

  def peak(self, precision: str = 'bf16') -> float:
    """FLOPs a second at a precision. Raises `InputError` for one that the table does not have."""
    if precision not in self.flops_per_second:
      known = ', '.join(self.flops_per_second)
      raise InputError(
        f'precision {precision!r}: {self.name} has '
        f'{known}{nearest(precision, self.flops_per_second)}'
      )
    return self.flops_per_second[precision]


def _tpu(name: str, kind: str, price: float, where: str, note: str = '', **figures: Any) -> Chip:
  page = 'docs.cloud.google.com/tpu/docs/' + name.replace('v7x', 'tpu7x')
  source = (
    f'rates and links: {page}, of links half of the bidirectional figure; memory: the limit of '
    'libtpu 0.0.42; '
    f'price: cloud.google.com/tpu/pricing, {where}, as known in 2025 and not looked up since{note}'
  )
  return Chip(name=name, kind=kind, price_per_hour=price, source=source, date='2026-01', **figures)


def _gpu(name: str, kind: str, price: float, where: str, per_host: int = 8, **figures: Any) -> Chip:
  source = (
    'rates, memory and links: NVIDIA data sheet, half of its figures with sparsity and of its '
    'bidirectional ones for links; '
    f'network and price: {where}, as known in 2025 and not looked up since'
  )
  return Chip(
    name=name,
    kind=kind,
    price_per_hour=price,
    chips_per_host=per_host,
    domain=per_host,
    source=source,
    date='2025-12',
    **figures,
  )


_HOPPER = {'bf16': 989e12, 'int8': 1979e12, 'fp8': 1979e12, 'fp32': 67e12}

CHIPS: dict[str, Chip] = {
  c.name: c
  for c in (
    _tpu(
      'v4',
      'TPU v4',
      3.22,
      'us-central2',
      '; network: an estimate (no figure a chip is published)',
      flops_per_second={'bf16': 275e12, 'int8': 275e12},
      memory_bytes=30.5 * GIB,
      bytes_per_second=1.2e12,
      interconnect_bytes_per_second=300e9,
      network_bytes_per_second=3.125e9,
      chips_per_host=4,
      cores=2,
    ),
    _tpu(
      'v5e',
      'TPU v5 lite',
      1.20,
      'us-central1',
      flops_per_second={'bf16': 197e12, 'int8': 393e12},
      memory_bytes=15.75 * GIB,
      bytes_per_second=0.819e12,
      interconnect_bytes_per_second=200e9,
      network_bytes_per_second=3.125e9,
      chips_per_host=8,
    ),
    _tpu(
      'v5p',
      'TPU v5',
      4.20,
      'us-east5',
      flops_per_second={'bf16': 459e12, 'int8': 918e12, 'fp8': 459e12},
      memory_bytes=95.74 * GIB,
      bytes_per_second=2.765e12,
      interconnect_bytes_per_second=600e9,
      network_bytes_per_second=6.25e9,
      chips_per_host=4,
      cores=2,
    ),
    _tpu(
      'v6e',
      'TPU v6 lite',
      2.70,
      'us-east5',
      flops_per_second={'bf16': 918e12, 'int8': 1836e12, 'fp8': 918e12},
      memory_bytes=31.25 * GIB,
      bytes_per_second=1.638e12,
      interconnect_bytes_per_second=400e9,
      network_bytes_per_second=12.5e9,
      chips_per_host=8,
    ),
    _tpu(
      'v7x',
      'TPU7x',
      12.00,
      'us-central1',
      ' (uncertain: sold by contract at first)',
      flops_per_second={'bf16': 2307e12, 'fp8': 4614e12},
      memory_bytes=189.5 * GIB,
      bytes_per_second=7.38e12,
      interconnect_bytes_per_second=600e9,
      network_bytes_per_second=12.5e9,
      chips_per_host=4,
      cores=2,
      devices=2,
    ),
    _gpu(
      'a100',
      'NVIDIA A100',
      3.43,
      'EC2 p4de.24xlarge, us-east-1',
      flops_per_second={'bf16': 312e12, 'int8': 624e12, 'fp32': 19.5e12},
      memory_bytes=80e9,
      bytes_per_second=2.039e12,
      interconnect_bytes_per_second=300e9,
      network_bytes_per_second=6.25e9,
    ),
    _gpu(
      'h100',
      'NVIDIA H100',
      6.88,
      'EC2 p5.48xlarge, us-east-1',
      flops_per_second=_HOPPER,
      memory_bytes=80e9,
      bytes_per_second=3.35e12,
      interconnect_bytes_per_second=450e9,
      network_bytes_per_second=50e9,
    ),
    _gpu(
      'h100-nvl',
      'NVIDIA H100 NVL',
      6.98,
      'Azure NC40ads_H100_v5, East US',
      2,
      flops_per_second={'bf16': 835e12, 'int8': 1671e12, 'fp8': 1671e12, 'fp32': 60e12},
      memory_bytes=94e9,
      bytes_per_second=3.9e12,
      interconnect_bytes_per_second=300e9,
      network_bytes_per_second=5e9,
    ),
    _gpu(
      'h200',
      'NVIDIA H200',
      7.91,
      'EC2 p5en.48xlarge, us-east-1',
      flops_per_second=_HOPPER,
      memory_bytes=141e9,
      bytes_per_second=4.8e12,
      interconnect_bytes_per_second=450e9,
      network_bytes_per_second=50e9,
    ),
    _gpu(
      'b200',
      'NVIDIA B200',
      14.24,
      'EC2 p6-b200.48xlarge, us-east-1',
      flops_per_second={'bf16': 2250e12, 'int8': 4500e12, 'fp8': 4500e12, 'fp32': 75e12},
      memory_bytes=180e9,
      bytes_per_second=7.7e12,
      interconnect_bytes_per_second=900e9,
      network_bytes_per_second=50e9,
    ),
  )
}


def chip(device_kind: str) -> Chip | None:
  """The chip that a JAX device of this kind belongs to; None where it is not in the table (a
  CPU)."""
  kind = (
    device_kind.replace('TPU v5p', 'TPU v5')
    .replace('TPU v5e', 'TPU v5 lite')
    .replace('TPU v6e', 'TPU v6 lite')
  )
  kind = 'TPU7x' if kind.startswith(('TPU7x', 'TPU v7x', 'TPU7')) else kind
  found = [
    c
    for c in CHIPS.values()
    if kind == c.kind or (kind.startswith((f'{c.kind} ', f'{c.kind}-')) and c.kind != 'TPU v5')
  ]
  return max(found, key=lambda c: len(c.kind)) if found else None


def chip_named(name: str, chips: Mapping[str, Chip] = CHIPS) -> Chip:
  """A chip by its short name. Raises `InputError` with the nearest name."""
  if name not in chips:
    raise InputError(f'unknown chip {name!r}; known: {", ".join(chips)}{nearest(name, chips)}')
  return chips[name]


def hardware_file(path: str | Path) -> dict[str, Chip]:
  """The table with a user's own figures: a TOML or JSON file of chip name -> fields of `Chip`.

  A known chip keeps the figures that are not given; an unknown one must give all that have no
  default. `source` and `date` may be left out. Raises `InputError` that names the file, the chip
  and the field."""
  path = Path(path)
  try:
    text = path.read_text()
    data = tomllib.loads(text) if path.suffix == '.toml' else json.loads(text)
  except OSError as e:
    raise InputError(f'--hardware {path}: {e.strerror}') from e
  except ValueError as e:
    raise InputError(
      f'--hardware {path}: {e} (TOML for a name that ends in .toml, else JSON)'
    ) from e
  if not isinstance(data, dict):
    raise InputError(f'--hardware {path}: must hold chip name -> fields')
  return CHIPS | {
    name: _own(f'--hardware {path}: {name}', name, fields) for name, fields in data.items()
  }


def _own(where: str, name: str, fields: Any) -> Chip:
  known = {f.name: f for f in dataclasses.fields(Chip) if f.name != 'name'}
  if not isinstance(fields, dict):
    raise InputError(f'{where} = {fields!r}: must be fields of a chip ({", ".join(known)})')
  for field, value in fields.items():
    if field not in known:
      raise InputError(f'{where}: no such field {field!r}{nearest(field, known)}')
    _check(f'{where}.{field}', field, value)
  base = CHIPS.get(name)
  given: dict[str, Any] = {'source': f'{where}', 'date': 'of the file'} | fields
  if base is not None:
    rates = {**base.flops_per_second, **fields.get('flops_per_second', {})}
    return dataclasses.replace(base, **given | {'flops_per_second': rates})
  missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
  if missing:
    raise InputError(f'{where}: a chip that is not in the table needs {", ".join(missing)} as well')
  return Chip(name=name, **given)


def _check(where: str, field: str, value: Any) -> None:
  positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
  if field in ('kind', 'source', 'date'):
    right, wanted = isinstance(value, str), 'text'
  elif field == 'flops_per_second':
    right = (
      isinstance(value, dict)
      and 'bf16' in value
      and all(isinstance(v, int | float) and v > 0 for v in value.values())
    )
    wanted = 'precision -> positive number, bf16 among them'
  elif field in ('chips_per_host', 'domain', 'cores', 'devices'):
    right, wanted = positive and isinstance(value, int), 'a positive whole number'
  else:
    right, wanted = positive, 'a positive number'
  if not right:
    raise InputError(f'{where} = {value!r}: must be {wanted}')
