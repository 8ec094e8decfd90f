"""Whether what is asked for fits the memory of a device at all: checked before it is begun, since a
program that takes more may be killed without a word."""

import os
from pathlib import Path
from typing import Any

import jax

from jaxformer.config import InputError

_CGROUPS = 'memory.max', 'memory/memory.limit_in_bytes'  # of version 2 and of version 1


def check_fits(
  needed: float, field: str, value: Any, what: str, accepted: str, device: jax.Device | None = None
) -> None:
  """Raise `InputError` for `field` where `what` needs more bytes than a device has.

  Args:
    needed: a lower bound, so that nothing which fits is refused.
    device: None for the first one.
  """
  device = device or jax.local_devices()[0]
  limit, shared = memory_of(device)
  if limit is not None and needed > limit:
    owner = 'this machine' if shared else device.device_kind
    problem = f'{what} need at least {gigabytes(needed)}, and {owner} has {gigabytes(limit)}'
    raise InputError(field, value, problem=f'{problem}; must be {accepted}')


def memory_of(device: jax.Device) -> tuple[int | None, bool]:
  """Return the bytes of memory that programs on a device can have, None if unknown, and whether the
  devices of this process share them."""
  if device.platform != 'cpu':
    return (device.memory_stats() or {}).get('bytes_limit'), False
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limits = (_number(Path('/sys/fs/cgroup', name)) for name in _CGROUPS)
  return min(n for n in (total, *limits) if n) + _swap(), True


def gigabytes(count: float) -> str:
  return f'{count / 1e9:,.1f} GB'


def _number(file: Path) -> int | None:
  try:
    return int(file.read_text())
  except (OSError, ValueError):  # no such limit, or `max`
    return None


def _swap() -> int:
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
  except OSError:
    return 0
  return sum(1024 * int(line.split()[1]) for line in lines if line.startswith('SwapTotal:'))
