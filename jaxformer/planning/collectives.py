"""Collectives of a compiled program, from its HLO text: how often they run, what they send between
devices, and over which mesh axes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxformer.planning.hlo import SHAPE, Instruction, Program, array_bytes, text_of

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_DEVICES = re.compile(
  r'(?:replica_groups|source_target_pairs)=('
  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
  r'mesh\[[^]]*\](?:, device_ids=\([^ ]*\))? \{[^}]*\}|'
  r'\{(?:\{[^}]*\},?)*\}|'  # {{0,1},{2,3}}
  r'\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?)'
)  # [2,4]<=[4,2]T(1,0)


class Traffic(NamedTuple):
  """Operations of one kind in one run of a program, and bytes of their results per device."""

  count: int
  bytes: int


class Collective(NamedTuple):
  """One collective operation of a program.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'.
    shapes: of its results on one device, such as 'bf16[8,128]'.
    bytes: of all its results.
    times: how often one run of the program executes it.
    source: the operation of the traced program, such as 'jit(step)/jvp()/while/body/...'.
    devices: the groups of devices that communicate, as HLO writes them (`axes_of` reads it).
  """

  kind: str
  shapes: tuple[str, ...]
  bytes: int
  times: int
  source: str
  devices: str = ''


def list_collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
  """Every collective that one run of a compiled program (or of its text) executes. A loop whose
  iterations the text does not give counts as one; every branch of a conditional counts."""
  program = Program(text_of(compiled))

  def starts(name: str) -> bool:
    return any('"AsyncCollectiveStart"' in i.rest for i in program.computations[name].values())

  # The TPU compiler repeats an asynchronous collective, under the same channel, in each computation
  # that it overlaps with.
  started = {
    i.attribute('channel_id')
    for name, lines in program.computations.items()
    if starts(name)
    for i in lines.values()
  } - {''}

  def of(name: str, times: int) -> Iterable[Collective]:
    for i in program.computations[name].values():
      kind = i.operation.removesuffix('-start')
      if i.operation == 'while':
        yield from of(i.attribute('body'), times * program.iterations(name, i))
      elif i.operation == 'conditional':
        for branch in i.branches:
          yield from of(branch, times)
      elif kind in _KINDS:
        if i.attribute('channel_id') not in started or starts(name):
          yield _collective(kind, i, times)
      elif i.called.startswith('all-reduce-scatter'):
        # the TPU compiler writes a reduce-scatter as a fusion with an all-reduce inside
        for c in itertools.islice(of(i.called, times), 1):
          yield _collective('reduce-scatter', i, times)._replace(devices=c.devices)
      elif i.called in program.computations:
        yield from of(i.called, times)

  return list(of(program.entry, 1))


def traffic_by_kind(collectives: Iterable[Collective]) -> dict[str, Traffic]:
  """Kind of collective -> number of operations, and bytes of their results on one device."""
  found: dict[str, Traffic] = {}
  for c in collectives:
    count, size = found.get(c.kind, Traffic(0, 0))
    found[c.kind] = Traffic(count + c.times, size + c.times * c.bytes)
  return found


def traffic_by_axis(
  collectives: Iterable[Collective], mesh: Mapping[str, int]
) -> dict[str, dict[str, Traffic]]:
  """Mesh axes ('fsdp', 'fsdp+tensor') -> kind of collective -> traffic over these axes."""
  found: dict[str, list[Collective]] = {}
  for c in collectives:
    if axes := axes_of(c, mesh):
      found.setdefault('+'.join(axes), []).append(c)
  return {axes: traffic_by_kind(among) for axes, among in found.items()}


def _collective(kind: str, i: Instruction, times: int) -> Collective:
  arrays = [
    (array_bytes(dtype, dims), f'{dtype}[{dims}]')
    for dtype, dims in SHAPE.findall(re.sub(r'\{.*?\}', '', i.shape))
  ]
  if i.operation.endswith('-start') and kind != 'all-reduce':
    # the start of a gather or a permute carries (operands, results, ...), of which no operand is
    # larger than the result
    arrays = [max(arrays)]
  source = re.search(r'op_name="([^"]*)"', i.rest)
  devices = _DEVICES.search(i.rest)
  return Collective(
    kind,
    tuple(a[1] for a in arrays),
    sum(a[0] for a in arrays),
    times,
    source.group(1) if source else '',
    devices.group(1) if devices else '',
  )


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of one group differ, in the order of the mesh; none if
  every device is a group by itself.

  Args:
    mesh: axis -> size; devices are numbered in the order of the mesh, last axis fastest. Text
      without groups means all devices.
  """
  shape = tuple(mesh.values())
  groups = _groups(collective.devices, math.prod(shape))
  places = np.stack(np.unravel_index(groups, shape))  # axis, group, member
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(name for name, d in zip(mesh, differs, strict=True) if d)


def _groups(text: str, devices: int) -> np.ndarray:
  """Device numbers `[group, member]`, from '{{0,1},{2,3}}', '[2,4]<=[4,2]T(1,0)' or
  "mesh['a'=2,'b'=4] {'b'}"."""
  if text.startswith('mesh'):
    return _mesh_groups(text)
  if text.startswith('['):
    dims, rest = text.split('<=')
    return _iota(rest).reshape(_numbers(dims))
  rows = [_numbers(g) for g in re.findall(r'\{([\d,]+)\}', text)]
  # pad shorter groups with their first member, which adds no device
  longest = max(map(len, rows), default=0)
  return (
    np.array([[*r, *r[:1] * (longest - len(r))] for r in rows])
    if rows
    else np.arange(devices)[None]
  )


def _mesh_groups(text: str) -> np.ndarray:
  """Groups over axes of a mesh that the compiler defines, or over parts of an axis: 'a':(2)4 is the
  part of size 4 that follows a part of size 2."""
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
  """The numbers from 0 in a shape, transposed: '[4,2]T(1,0)'."""
  shape, _, order = text.partition('T')
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]
