"""Which axes of a mesh a collective operation goes over, from the groups of devices that HLO text
writes with it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxformer.planning.program import Collective, Traffic


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The axes along which the devices of one group differ, in the order of the mesh; none where each
  device keeps to itself.

  Args:
    mesh: axis -> size; devices are numbered in the order of the mesh, last axis fastest. Text
      without groups means all devices.
  """
  shape = tuple(mesh.values())
  groups = _groups(collective.devices, math.prod(shape))
  places = np.stack(np.unravel_index(groups, shape))  # axis, group, member
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(name for name, d in zip(mesh, differs, strict=True) if d)


def by_axis(
  collectives: list[Collective], mesh: Mapping[str, int]
) -> dict[str, dict[str, Traffic]]:
  """'fsdp' or 'fsdp+tensor' -> kind -> how many, and bytes of their results on a device, in one run
  of a program."""
  found: dict[str, dict[str, Traffic]] = {}
  for c in collectives:
    if not (axes := axes_of(c, mesh)):
      continue
    kinds = found.setdefault('+'.join(axes), {})
    count, size = kinds.get(c.kind, Traffic(0, 0))
    kinds[c.kind] = Traffic(count + c.times, size + c.times * c.bytes)
  return found


def _groups(text: str, devices: int) -> np.ndarray:
  """[group, member] of a list '{{0,1},{2,3}}', of '[2,4]<=[4,2]T(1,0)', or of "mesh['a'=2,'b'=4]
  {'b'}"."""
  if text.startswith('mesh'):
    return _of_mesh(text)
  if text.startswith('['):
    dims, rest = text.split('<=')
    return _iota(rest).reshape(_numbers(dims))
  rows = [_numbers(g) for g in re.findall(r'\{([\d,]+)\}', text)]
  # a group of fewer repeats its first member, which changes nothing
  longest = max(map(len, rows), default=0)
  return (
    np.array([[*r, *r[:1] * (longest - len(r))] for r in rows])
    if rows
    else np.arange(devices)[None]
  )


def _of_mesh(text: str) -> np.ndarray:
  """Groups over axes of a mesh of the compiler's own, or over parts of them: 'a':(2)4 is the part
  of size 4 behind one of 2."""
  found = re.match(r'mesh\[([^]]*)\](?:, device_ids=\((.*)\))? \{([^}]*)\}', text)
  assert found is not None, text
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
  asked = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found.group(3))
  shape, over = [], []
  for name, size in sizes.items():
    spans = [
      (int(before), int(before) * int(part)) if part else (1, size)
      for n, before, part in asked
      if n == name
    ]
    for low, high in itertools.pairwise(sorted({1, size, *itertools.chain(*spans)})):
      over += [len(shape)] if any(first <= low and high <= last for first, last in spans) else []
      shape.append(high // low)
  ids = (_iota(found.group(2)) if found.group(2) else np.arange(math.prod(sizes.values()))).reshape(
    shape
  )
  members = math.prod(shape[i] for i in over)
  return np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
  """'[4,2]T(1,0)': the numbers from 0 in this shape, transposed."""
  shape, _, order = text.partition('T')
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]
