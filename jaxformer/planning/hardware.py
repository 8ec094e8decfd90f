"""Chip specifications: peak rates, memory, links and list prices, each with its source and date, in
`hardware.toml`. A user's file in the same format can add and override chips."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxformer.config import InputError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Chip specifications.

  Attributes:
    name: short name, as in a target: 'v5p', 'h100'.
    kind: `device_kind` in JAX ('TPU v5'); '' if JAX has none.
    flops_per_second: dense peak (no sparsity) by precision: 'bf16', and 'int8', 'fp8', 'fp32' if
      published.
    memory_bytes: high-bandwidth memory available to a program: the compiler's limit if known, else
      that of the data sheet.
    bytes_per_second: bandwidth of that memory.
    interconnect_bytes_per_second: of all fast links together (ICI, NVLink), in one direction.
    network_bytes_per_second: the chip's share of its host's network, in one direction; used between
      slices, or between GPU hosts.
    chips_per_host: chips of a full host.
    domain: number of chips that the fast links connect; None for an entire slice (TPU).
    cores: TensorCores per chip that names such as `v5p-2048` count; 1 if names count chips.
    devices: JAX devices per chip.
    price_per_hour: on-demand list price per chip, USD.
    spot_per_hour: list price of spot capacity; None if there is none (it moves with the market).
    source: where the figures are from, and which are uncertain.
    date: when the figures were recorded, year-month.
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
    """Peak FLOPs per second at a precision. Raises `InputError` for an unknown precision."""
    if precision not in self.flops_per_second:
      known = ', '.join(self.flops_per_second)
      near = nearest(precision, self.flops_per_second)
      raise InputError('precision', precision, f'one of those of {self.name}, {known}{near}')
    return self.flops_per_second[precision]


def _table() -> dict[str, Chip]:
  text = resources.files('jaxformer.planning').joinpath('hardware.toml').read_text()
  return {name: Chip(name=name, **fields) for name, fields in tomllib.loads(text).items()}


CHIPS = _table()


def chip(device_kind: str) -> Chip | None:
  """The chip of a JAX `device_kind`; None if it is not in the table, such as a CPU."""
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
  """The chip of a short name. Raises `InputError` with the nearest names."""
  if name not in chips:
    raise InputError(f'unknown chip {name!r}; known: {", ".join(chips)}{nearest(name, chips)}')
  return chips[name]


def hardware_file(path: str | Path) -> dict[str, Chip]:
  """The table with the chips of a user's file: TOML or JSON, chip name -> fields of `Chip`.

  Fields override those of a known chip; an unknown chip needs all fields without a default, except
  `source` and `date`. Raises `InputError` that names the file, the chip and the field."""
  path = Path(path)
  try:
    text = path.read_text()
    data = tomllib.loads(text) if path.suffix == '.toml' else json.loads(text)
  except OSError as e:
    raise InputError(f'--hardware {path}: {e.strerror}') from e
  except ValueError as e:
    raise InputError(
      f'--hardware {path}: {e} (read as TOML if the name ends in .toml, else as JSON)'
    ) from e
  if not isinstance(data, dict):
    raise InputError(f'--hardware {path}: must hold chip name -> fields')
  return CHIPS | {
    name: _own(f'--hardware {path}: {name}', name, fields) for name, fields in data.items()
  }


def _own(where: str, name: str, fields: Any) -> Chip:
  known = {f.name: f for f in dataclasses.fields(Chip) if f.name != 'name'}
  if not isinstance(fields, dict):
    raise InputError(where, fields, f'fields of a chip ({", ".join(known)})')
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
    raise InputError(f'{where}: a chip that is not in the table also needs {", ".join(missing)}')
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
    wanted = 'precision -> positive number, including bf16'
  elif field in ('chips_per_host', 'domain', 'cores', 'devices'):
    right, wanted = positive and isinstance(value, int), 'a positive integer'
  else:
    right, wanted = positive, 'a positive number'
  if not right:
    raise InputError(where, value, wanted)
