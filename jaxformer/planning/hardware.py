"""Peak rates of accelerators, by the name that JAX gives a device."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    flops_per_second: dense bfloat16 products, by the maker's data sheet.
    memory_bytes: high-bandwidth memory.
    bytes_per_second: its bandwidth.
    source: where the figures are from.
  """

  flops_per_second: float
  memory_bytes: float
  bytes_per_second: float
  source: str


_TPU, _NVIDIA = 'cloud.google.com/tpu/docs, system architecture, 2026', 'NVIDIA data sheet (dense), 2026'

CHIPS: dict[str, Chip] = {
  'TPU v4': Chip(275e12, 32e9, 1.2e12, _TPU),
  'TPU v5 lite': Chip(197e12, 16e9, 0.82e12, _TPU),
  'TPU v5': Chip(459e12, 95e9, 2.77e12, _TPU),
  'TPU v6 lite': Chip(918e12, 32e9, 1.64e12, _TPU),
  'NVIDIA A100': Chip(312e12, 80e9, 2.0e12, _NVIDIA),
  'NVIDIA H100': Chip(989e12, 80e9, 3.35e12, _NVIDIA),
  'NVIDIA H200': Chip(989e12, 141e9, 4.8e12, _NVIDIA),
}


def chip(device_kind: str) -> Chip | None:
  """The chip that a device is, None where it is not in the table (a CPU)."""
  kind = device_kind.replace('TPU v5p', 'TPU v5').replace('TPU v5e', 'TPU v5 lite').replace('TPU v6e', 'TPU v6 lite')
  names = [name for name in CHIPS if kind == name or (kind.startswith(f'{name} ') and name != 'TPU v5')]
  return CHIPS[max(names, key=len)] if names else None
