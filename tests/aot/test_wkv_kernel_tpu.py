"""What the TPU's compiler makes of WKV-6 and of the delta rule of RWKV-7: kernels, memory and
traffic. Memory is in MiB per device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops.wkv6 import wkv6
from jaxformer.ops.wkv7 import wkv7
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests import tiers
from tests.aot.tpu import collectives, compile_for_tpu
from tests.helpers import forced

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

B, T, H, K = 8, 2048, 24, 64
SAVED = 4 * B * H * K * K * (T // 256) / 2**20  # states in fp32, one in 256 tokens


def arguments(H=H, K=K, where=lambda *axes: None):
  """As projections give them, heads side by side: [B, T, H K]."""

  def array(*shape, dtype=jnp.float32, axes=()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where(*axes))

  token = ('batch', None, 'heads')
  r = array(B, T, H * K, dtype=jnp.bfloat16, axes=token)
  return (
    r,
    r,
    r,
    array(B, T, H * K, axes=token),
    array(H, K, axes=('heads', None)),
    array(B, H, K, K, axes=('batch', 'heads', None, None)),
  ), array(B, T, dtype=bool, axes=('batch', None))


def forward(chosen=None, H=H, K=K):
  def run(r, k, v, w, u, state, starts):
    op = forced(wkv6, wkv6=chosen) if chosen else wkv6
    y, state = op(*(x.reshape(B, T, H, K) for x in (r, k, v, w)), u, state, starts)
    return y.reshape(B, T, H * K), state

  return run


def with_gradients(chosen=None, H=H, K=K):
  def run(arguments, starts, dy, dstate):
    out, pull = jax.vjp(lambda *a: forward(chosen, H, K)(*a, starts), *arguments)
    return out, pull((dy, dstate))

  return run


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.fixture(scope='module', params=tiers.first_stands(['v5e:2x2', 'v6e:2x2']))
def one(request):
  return topology_mesh(request.param, MeshConfig(data=1))


def test_forward_needs_no_memory(one):
  tokens, starts = arguments()
  compiled = compile_for_tpu(forward(), *tokens, starts, mesh=one)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
  assert temporaries(compiled) < 1


def test_gradients_need_the_saved_states_alone(one):
  """No array in the order of the inputs (96 MiB the decays), no state a chunk; a megabyte of
  constants and document numbers."""
  tokens, starts = arguments()
  compiled = compile_for_tpu(with_gradients(), tokens, starts, tokens[0], tokens[-1], mesh=one)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
  assert temporaries(compiled) <= SAVED + 1
  if one.devices.flat[0].device_kind == 'TPU v5 lite':
    portable = compile_for_tpu(
      with_gradients('chunked'), tokens, starts, tokens[0], tokens[-1], mesh=one
    )
    print(f'kernel {temporaries(compiled):.0f} MiB, chunked {temporaries(portable):.0f} MiB')
    assert 10 * temporaries(compiled) < temporaries(portable)


@pytest.mark.parametrize(('H', 'K'), tiers.first_stands([(3, 64), (2, 80), (2, 128)]))
def test_other_heads_compile(H, K):
  """An odd number of heads, heads that fill no vector of lanes, and heads of a whole one."""
  tokens, starts = arguments(H, K)
  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(
    with_gradients(H=H, K=K), tokens, starts, tokens[0], tokens[-1], mesh=mesh
  )
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_shards_send_nothing():
  """Batch over two, heads over four."""
  mesh, names = (
    topology_mesh('v5e:2x4', MeshConfig(data=1, fsdp=2, tensor=4)),
    {'batch': 'fsdp', 'heads': 'tensor', None: None},
  )
  tokens, starts = arguments(
    where=lambda *axes: NamedSharding(mesh, PartitionSpec(*(names[a] for a in axes)))
  )
  compiled = compile_for_tpu(
    forward(), *tokens, starts, mesh=mesh, out_shardings=(tokens[0].sharding, tokens[-1].sharding)
  )
  assert 'tpu_custom_call' in compiled.as_text()
  assert not collectives(compiled)


# ---- the generalized delta rule of RWKV-7 --------------------------------------------------------


def delta_rule(H=H, K=K, T=T):
  """The function with its gradients, and its arguments as the layer gives them."""

  def run(arguments, starts, dy):
    def f(*x):
      heads = (a.reshape(B, T, H, K) for a in x)
      return wkv7(*heads, None, starts)[0].reshape(B, T, H * K)

    y, pull = jax.vjp(jax.checkpoint(f), *arguments)
    return y, pull(dy)

  low, full = (jax.ShapeDtypeStruct((B, T, H * K), d) for d in (jnp.bfloat16, jnp.float32))
  starts = jax.ShapeDtypeStruct((B, T), bool)
  return run, ((low, full, full, low, full, full), starts, low)


@pytest.mark.parametrize('topology', tiers.first_stands(['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']))
def test_delta_rule_needs_what_it_saves(topology):
  """At the shapes of rwkv7-1.5b: forward, forward again and backward, and no array of the order of
  an input but those saved for the gradient, in bf16: states, values read, inverses."""
  H, T = 32, 4096
  run, arguments = delta_rule(H, K, T)
  mesh = topology_mesh(topology, MeshConfig(data=1))
  compiled = compile_for_tpu(run, *arguments, mesh=mesh)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
  assert temporaries(compiled) <= 3 * (2 * B * T * H * K) / 2**20 + 8


@pytest.mark.parametrize(('H', 'K'), tiers.first_stands([(2, 80), (3, 64), (2, 128), (2, 256)]))
def test_delta_rule_of_other_heads_compiles(H, K):
  """An odd number of heads, heads that fill no vector of lanes, and heads of one and of two."""
  run, arguments = delta_rule(H, K)
  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(run, *arguments, mesh=mesh)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


def test_delta_rule_in_fp32_compiles():
  run, (arguments, starts, dy) = delta_rule()
  full = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*arguments, dy)]
  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(run, tuple(full[:-1]), starts, full[-1], mesh=mesh)
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
