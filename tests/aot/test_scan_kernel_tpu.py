"""What the TPU's compiler makes of our kernel of the selective scan: memory in MiB a device, and
what is sent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops.selective_scan import selective_scan
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests import tiers
from tests.aot.tpu import collectives, compile_for_tpu, has_array

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler


def with_gradients(starts, dy, dh, *arguments):
  out, pull = jax.vjp(lambda *a: selective_scan(*a, starts), *arguments)
  return *out, *pull((dy, dh))


def forward(starts, dy, dh, *arguments):
  return selective_scan(*arguments, starts)


def shapes(B, T, D, N, dtype, place=lambda *axes: None):
  """What `with_gradients` takes; `place` says where an array with these axes lives."""

  def array(*dims, dtype=jnp.float32, axes=()):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place(*axes))

  wide, narrow = array(B, T, D, dtype=dtype, axes='btd'), array(B, T, N, dtype=dtype, axes='bt_')
  state = array(B, D, N, axes='bd_')
  return (
    array(B, T, dtype=jnp.bool_, axes='bt'),
    wide,
    state,
    wide,
    wide,
    array(D, N, axes='d_'),
    narrow,
    narrow,
    array(D, axes='d'),
    state,
  )


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize('chip', tiers.first_stands(['v5e', 'v6e']))
@pytest.mark.parametrize(
  'dtype', tiers.first_stands([jnp.bfloat16, jnp.float32]), ids=['bf16', 'fp32']
)
def test_one_layer_of_mamba_130m(chip, dtype):
  """B8 T2048 D1536 N16. The states of all steps are 3,072 MiB; those between chunks, all that is
  stored, 12."""
  mesh, arguments = (
    topology_mesh(f'{chip}:2x2', MeshConfig(data=1)),
    shapes(8, 2048, 1536, 16, dtype),
  )
  compiled = compile_for_tpu(forward, *arguments, mesh=mesh)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
  assert temporaries(compiled) < 16
  compiled = compile_for_tpu(with_gradients, *arguments, mesh=mesh)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
  assert temporaries(compiled) < 32
  assert not has_array(compiled, 1536, 16, 2048)
  assert not has_array(compiled, 8, 2048, 16, 1536)


@pytest.mark.parametrize(
  ('B', 'T', 'D', 'N'),
  tiers.first_stands([(2, 1000, 200, 4), (1, 512, 4096, 64), (1, 300, 16384, 16), (1, 2, 128, 8)]),
  ids=str,
)
def test_sizes_that_fit_no_block(B, T, D, N):
  """They compile within the VMEM of a v5e: blocks that hang over, wide states, many channels, two
  tokens."""
  compile_for_tpu(
    with_gradients,
    *shapes(B, T, D, N, jnp.bfloat16),
    mesh=topology_mesh('v5e:2x2', MeshConfig(data=1)),
  )


def test_on_a_mesh():
  """Batch over fsdp, channels over tensor: nothing is sent forwards, and backwards only sums of
  what is small."""
  mesh = topology_mesh('v5e:2x4', MeshConfig(data=1, fsdp=2, tensor=4))
  B, T, D, N = 8, 1024, 2048, 16

  def place(*axes):
    return NamedSharding(
      mesh, PartitionSpec(*({'b': ('data', 'fsdp', 'expert'), 'd': 'tensor'}.get(a) for a in axes))
    )

  arguments = shapes(B, T, D, N, jnp.float32, place)
  where = tuple(a.sharding for a in arguments)
  wide, state = where[1], where[2]
  compiled = compile_for_tpu(forward, *arguments, mesh=mesh, out_shardings=(wide, state))
  assert 'tpu_custom_call' in compiled.as_text()
  assert not collectives(compiled)
  compiled = compile_for_tpu(
    with_gradients, *arguments, mesh=mesh, out_shardings=(wide, state, *where[3:])
  )
  assert set(collectives(compiled)) == {'all-reduce'}
  maps, rates = 4 * B // 2 * T * N, 4 * D // 4 * N
  assert sum(c.bytes * c.times for c in list_collectives(compiled)) <= 2 * maps + 2 * rates
