"""Collectives of a compiled program, from its HLO text: how often they run, what they send between
devices, and over which mesh axes."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxformer.planning.hlo import Instruction, Program, itemsize, numbers

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_DEVICES = re.compile(
  r'(?:replica_groups|source_target_pairs)=('
  # mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}
  r'mesh\[[^]]*\](?:, device_ids=\([^ ]*\))? \{[^}]*\}|'
  r'\{(?:\{[^}]*\},?)*\}|'  # {{0,1},{2,3}}
  r'\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?)'
)  # [2,4]<=[4,2]T(1,0)


@dataclasses.dataclass(frozen=True)
class Traffic:
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
  program = Program(compiled)
  # The TPU compiler repeats an asynchronous collective, under the same channel, in each computation
  # that it overlaps with.
  starts = {
    name: {i.attribute('channel_id') for i in lines.values()} - {''}
    for name, lines in program.computations.items()
    if any('"AsyncCollectiveStart"' in i.rest for i in lines.values())
  }
  started = set().union(*starts.values())

  def of(name: str, times: int) -> Iterable[Collective]:
    for i in program.computations[name].values():
      kind = i.operation.removesuffix('-start')
      inside, iterations = program.calls(i)
      if kind in KINDS:
        if name in starts or i.attribute('channel_id') not in started:
          yield collective_of(kind, i, times)
      elif i.attribute('calls').startswith('all-reduce-scatter'):
        # The TPU compiler writes a reduce-scatter as a fusion with an all-reduce inside, whose
        # channel may be that of an asynchronous collective elsewhere.
        fused = program.computations[inside[0]].values()
        among = next(collective_of('', j, 1) for j in fused if j.operation in KINDS)
        yield collective_of('reduce-scatter', i, times)._replace(devices=among.devices)
      else:
        for called in inside:
          yield from of(called, times * iterations)

  return list(of(program.entry, 1))


def traffic_by_kind(collectives: Iterable[Collective]) -> dict[str, Traffic]:
  """Kind of collective -> number of operations, and bytes of their results on one device."""
  found: dict[str, Traffic] = {}
  for c in collectives:
    before = found.get(c.kind, Traffic(0, 0))
    found[c.kind] = Traffic(before.count + c.times, before.bytes + c.times * c.bytes)
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


def collective_of(kind: str, i: Instruction, times: int) -> Collective:
  arrays = [
    (itemsize(dtype) * math.prod(dims), f'{dtype}[{",".join(map(str, dims))}]')
    for dtype, dims in i.arrays
  ]
  if i.operation.endswith('-start') and kind != 'all-reduce':
    # the start of a gather or a permute carries (operands, results, ...), of which no operand is
    # larger than the result
    arrays = [max(arrays)]
  devices = _DEVICES.search(i.rest)
  return Collective(
    kind,
    tuple(text for _, text in arrays),
    sum(size for size, _ in arrays),
    times,
    i.attribute('op_name'),
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
  groups = groups_of(collective, math.prod(shape))
  places = np.stack(np.unravel_index(groups, shape))  # axis, group, member
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(name for name, d in zip(mesh, differs, strict=True) if d)


def groups_of(collective: Collective, devices: int) -> np.ndarray:
  """The devices of a collective by their number in the mesh, `[group, member]`; text without groups
  means all of the `devices`."""
  text = collective.devices  # '{{0,1},{2,3}}', '[2,4]<=[4,2]T(1,0)' or "mesh['a'=2,'b'=4] {'b'}"
  if text.startswith('mesh'):
    return _mesh_groups(text)
  if text.startswith('['):
    dims, rest = text.split('<=')
    return _iota(rest).reshape(numbers(dims))
  rows = [numbers(g) for g in re.findall(r'\{([\d,]+)\}', text)] or [list(range(devices))]
  # pad shorter groups with their first member, which adds no device
  longest = max(map(len, rows))
  return np.array([[*r, *r[:1] * (longest - len(r))] for r in rows])


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
      (int(before or 1), int(before or 1) * int(part or size))
      for n, before, part in asked
      if n == name
    ]
    for low, high in itertools.pairwise(sorted({1, size, *itertools.chain(*spans)})):
      if any(first <= low and high <= last for first, last in spans):
        over.append(len(shape))
      shape.append(high // low)
  ids = _iota(found.group(2) or str(math.prod(shape))).reshape(shape)
  members = math.prod(shape[i] for i in over)
  return np.moveaxis(ids, over, range(-len(over), 0)).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
  """The numbers from 0 in a shape, transposed: '[4,2]T(1,0)'."""
  shape, _, order = text.partition('T')
  ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
  return ids.transpose(numbers(order)) if order else ids
