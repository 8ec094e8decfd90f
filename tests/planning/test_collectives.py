"""Which mesh axes collectives go over: every form that HLO writes groups in, and a compiled program
of known exchanges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.planning.collectives import (
  Collective,
  Traffic,
  axes_of,
  list_collectives,
  traffic_by_axis,
)

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


@pytest.mark.quick
@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{{0,1},{2,3},{4,5},{6,7}}', ('tensor',)),
    ('{{0,2},{1,3},{4,6},{5,7}}', ('fsdp',)),
    ('{{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('{{0,1,2,3},{4,5,6,7}}', ('fsdp', 'tensor')),
    ('{{0},{1},{2},{3},{4},{5},{6},{7}}', ()),
    ('{}', ('data', 'fsdp', 'tensor')),
    ('', ('data', 'fsdp', 'tensor')),
    ('[4,2]<=[8]', ('tensor',)),
    ('[4,2]<=[2,4]T(1,0)', ('data',)),
    ('[2,4]<=[2,2,2]T(1,0,2)', ('data', 'tensor')),
    ('[4,2]<=[2,2,2]T(0,2,1)', ('fsdp',)),
    ("mesh['a'=4,'b'=2] {'b'}", ('tensor',)),
    ("mesh['a'=4,'b'=2] {'a'}", ('data', 'fsdp')),
    ("mesh['a'=8] {'a':(1)2}", ('data',)),
    ("mesh['a'=8] {'a':(2)2}", ('fsdp',)),
    ("mesh['a'=8] {'a':(2)4}", ('fsdp', 'tensor')),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ('tensor',)),
    ('{{0,1},{1,0},{2,3},{3,2}}', ('tensor',)),  # source and target pairs
    ('{{0,2},{2,4},{4,6},{6,0}}', ('data', 'fsdp')),  # a ring through two axes
  ],
)
def test_forms(groups, axes):
  assert axes_of(Collective('all-gather', ('f32[8]',), 32, 1, '', groups), MESH) == axes


LINES = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %all-reduce = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add, metadata={}
  %permute = f32[4]{0} collective-permute(%all-reduce), channel_id=2, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  ROOT %all-gather = f32[8]{0} all-gather(%permute), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
}
"""


@pytest.mark.quick
def test_groups_are_read_from_text():
  assert traffic_by_axis(list_collectives(LINES), MESH) == {
    'data': {'all-reduce': Traffic(1, 16)},
    'fsdp': {'collective-permute': Traffic(1, 16)},
    'tensor': {'all-gather': Traffic(1, 32)},
  }


FUSED = """HloModule m

%all-reduce-scatter.1 (a: f32[8]) -> f32[4] {
  %a = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %slice = f32[4]{0} slice(%sum), slice={[0:4]}
}

%begun (b: f32[4]) -> f32[8] {
  %b = f32[4]{0} parameter(0)
  ROOT %all-gather = f32[8]{0} all-gather(%b), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, backend_config={"custom_call":"AsyncCollectiveStart"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %gathered = f32[8]{0} fusion(%p), kind=kCustom, calls=%begun
  ROOT %scattered = f32[4]{0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


@pytest.mark.quick
def test_a_fused_reduce_scatter_shares_a_channel():
  """Gradients of layers were left out where the compiler numbers a fused all-reduce like the start
  of an asynchronous all-gather."""
  assert traffic_by_axis(list_collectives(FUSED), MESH) == {
    'tensor': {'all-gather': Traffic(1, 32), 'reduce-scatter': Traffic(1, 16)}
  }


def test_a_compiled_program():
  """On 8 devices, 2 x 4: a product of a matrix divided over both axes gathers over one and sums
  over the other, in a loop."""
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  assert isinstance(mesh, Mesh)

  def where(*spec):
    return NamedSharding(mesh, PartitionSpec(*spec))

  def step(x, w):
    def one(x, w):
      w = jax.lax.with_sharding_constraint(w, where(None, 'tensor'))  # gathered over fsdp
      h = jax.lax.with_sharding_constraint(jnp.tanh(x @ w), where('fsdp', 'tensor'))
      # summed over tensor
      return jax.lax.with_sharding_constraint(h @ w.T, where('fsdp', None)), None

    return jax.lax.scan(one, x, w)[0]

  x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=where('fsdp', None))
  w = jax.ShapeDtypeStruct((3, 64, 128), jnp.float32, sharding=where(None, 'fsdp', 'tensor'))
  found = traffic_by_axis(list_collectives(jax.jit(step).lower(x, w).compile()), dict(mesh.shape))
  assert found['fsdp']['all-gather'] == Traffic(3, 3 * 4 * 64 * 128 // 4)
  assert found['tensor']['all-reduce'] == Traffic(3, 3 * 4 * 8 // 2 * 64)
  assert set(found) == {'fsdp', 'tensor'}
