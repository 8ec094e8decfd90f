"""What the TPU's compiler makes of the kernel of state-space duality: memory in MiB per device, and
what is sent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops.ssd import ssd
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests import tiers
from tests.aot.tpu import collectives, compile_for_tpu

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler


def arguments(B, T, H, P, G, N, dtype=jnp.bfloat16, where=lambda *axes: None):
  """x, dt, A, B, C, D, state and starts; x and the maps as projections give them, side by side."""

  def array(*shape, dtype=jnp.float32, axes=()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where(*axes))

  token = ('batch', None, 'heads')
  heads, maps = array(H, axes=('heads',)), array(B, T, G * N, dtype=dtype, axes=('batch',))
  return (
    array(B, T, H * P, dtype=dtype, axes=token),
    array(B, T, H, axes=token),
    heads,
    maps,
    maps,
    heads,
    array(B, H, P, N, axes=('batch', 'heads')),
    array(B, T, dtype=jnp.bool_, axes=('batch',)),
  )


def forward(P, N):
  def run(x, dt, A, B, C, D, state, starts):
    b, T = starts.shape
    x, B, C = (a.reshape(b, T, -1, size) for a, size in ((x, P), (B, N), (C, N)))
    y, last = ssd(x, dt, A, B, C, D, state, starts)
    return y.reshape(b, T, -1), last

  return run


def with_gradients(P, N):
  def run(*arguments):
    *tokens, starts = arguments
    out, pull = jax.vjp(lambda *a: forward(P, N)(*a, starts), *tokens)
    return out, pull(out)

  return run


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def kernels(compiled):
  return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize('topology', tiers.first_stands(['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']))
def test_one_layer_of_mamba2_1_3b(topology):
  """B4 T2048 H64 P64 N128: the states before the chunks, step sizes and decays in fp32, a number
  per token and head, and no array of x's size (64 MiB)."""
  B, T, H, P, N = 4, 2048, 64, 64, 128
  mesh = topology_mesh(topology, MeshConfig(data=1))
  tokens = arguments(B, T, H, P, 1, N)
  compiled = compile_for_tpu(forward(P, N), *tokens, mesh=mesh)
  assert kernels(compiled) == 1
  # the state before and after, with its channels along lanes
  assert temporaries(compiled) < 32
  compiled = compile_for_tpu(with_gradients(P, N), *tokens, mesh=mesh)
  assert kernels(compiled) == 2
  saved = 2 * B * H * P * N * (T // 128) / 2**20
  assert temporaries(compiled) < saved + 48


@pytest.mark.parametrize(
  ('B', 'T', 'H', 'P', 'G', 'N', 'dtype'),
  tiers.first_stands(
    [
      (1, 256, 6, 64, 2, 64, jnp.bfloat16),  # an odd head beside tiles of two; half of the lanes
      (1, 1000, 80, 64, 1, 128, jnp.bfloat16),  # of mamba2-2.7b; a padded chunk
      (1, 4096, 24, 64, 1, 128, jnp.float32),
      (2, 20, 3, 128, 1, 256, jnp.bfloat16),
    ]
  ),
  ids=str,
)
def test_other_sizes_compile(B, T, H, P, G, N, dtype):
  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(with_gradients(P, N), *arguments(B, T, H, P, G, N, dtype), mesh=mesh)
  assert kernels(compiled) == 2


def test_on_a_mesh():
  """Batch over two, heads over four: nothing is sent forwards, and backwards only sums of the
  gradients of maps, which shards of heads share, and of rates."""
  mesh = topology_mesh('v5e:2x4', MeshConfig(data=1, fsdp=2, tensor=4))
  names = {'batch': ('data', 'fsdp', 'expert'), 'heads': 'tensor', None: None}
  B, T, H, P, N = 4, 512, 16, 64, 128
  tokens = arguments(
    B,
    T,
    H,
    P,
    1,
    N,
    where=lambda *axes: NamedSharding(mesh, PartitionSpec(*(names[a] for a in axes))),
  )
  where = tuple(a.sharding for a in tokens[:-1])
  out = (where[0], where[-1])
  compiled = compile_for_tpu(forward(P, N), *tokens, mesh=mesh, out_shardings=out)
  assert kernels(compiled) == 1
  assert not collectives(compiled)
  compiled = compile_for_tpu(with_gradients(P, N), *tokens, mesh=mesh, out_shardings=(out, where))
  assert set(collectives(compiled)) == {'all-reduce'}
  maps = 4 * B // 2 * T * N
  assert sum(c.bytes * c.times for c in list_collectives(compiled)) <= 2.1 * maps
