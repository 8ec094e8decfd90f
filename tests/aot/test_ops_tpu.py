"""What the TPU's compiler makes of attention and cross-entropy for v5e: memory, kernels and
traffic. Memory is in MiB a device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops.attention import Mask, attention
from jaxformer.ops.loss import cross_entropy
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig, Parallel
from tests import tiers
from tests.aot.tpu import collectives, compile_for_tpu, has_array
from tests.helpers import forced

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

D, V = 2048, 128256  # of the loss: a vocabulary of Llama 3


@pytest.fixture(scope='module')
def one():
  return topology_mesh('v5e:2x2', MeshConfig(data=1))


def array(*shape, dtype=jnp.bfloat16, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


# ---- attention ---------------------------------------------------------------------------------


def attention_and_gradients(mask=None, **options):
  def run(q, k, v, do):
    out, pull = jax.vjp(
      lambda q, k, v: attention(q, k, v, mask or Mask(), scale=q.shape[-1] ** -0.5, **options),
      q,
      k,
      v,
    )
    return out, *pull(do)

  return run


def test_attention_is_a_kernel_and_small(one):
  """B4 T4096 H16 K128, causal, forward and backward: 16 GiB of logits in fp32 if it were naive."""
  q = array(4, 4096, 16, 128)
  compiled = compile_for_tpu(attention_and_gradients(), q, q, q, q, mesh=one)
  assert temporaries(compiled) < 400
  assert 'tpu_custom_call' in compiled.as_text()
  assert not has_array(compiled, 4096, 4096)


@pytest.mark.parametrize('K', tiers.first_stands([64, 128]))
def test_grouped_attention_with_window_and_softcap_is_a_kernel(one, K):
  q, k = array(1, 2048, 8, K), array(1, 2048, 2, K)
  compiled = compile_for_tpu(
    attention_and_gradients(Mask(window=512), softcap=30.0), q, k, k, q, mesh=one
  )
  assert 'tpu_custom_call' in compiled.as_text()


@pytest.mark.parametrize('chosen', [None, 'chunked'])
def test_attention_memory_is_linear(one, chosen):
  """A few arrays of the size of q at T = 16,384, where one of the size T x T is eight times q."""
  q = array(1, 16384, 8, 128)
  compiled = compile_for_tpu(
    forced(attention_and_gradients(), **({'attention': chosen} if chosen else {})),
    q,
    q,
    q,
    q,
    mesh=one,
  )
  assert temporaries(compiled) < 6 * 32
  assert not has_array(compiled, 16384, 16384)


def test_attention_on_a_mesh_sends_nothing():
  """Batch over fsdp, heads over tensor: every shard has the keys it needs, though two key heads are
  fewer than four shards."""
  mesh = topology_mesh('v5e:2x4', MeshConfig(data=1, fsdp=2, tensor=4))
  where = NamedSharding(mesh, PartitionSpec(('data', 'fsdp', 'expert'), None, 'tensor', None))
  kv = NamedSharding(mesh, PartitionSpec(('data', 'fsdp', 'expert'), None, None, None))
  q, k = array(4, 1024, 8, 128, sharding=where), array(4, 1024, 2, 128, sharding=kv)
  compiled = compile_for_tpu(
    lambda q, k, v: attention(q, k, v, Mask(), scale=0.1), q, k, k, mesh=mesh, out_shardings=where
  )
  assert 'tpu_custom_call' in compiled.as_text()
  assert not collectives(compiled)


# ---- cross-entropy -----------------------------------------------------------------------------


def loss_and_gradients(transposed=False):
  def loss(x, w, targets):
    return cross_entropy(x, w.T if transposed else w, targets, transposed=transposed).loss

  return jax.value_and_grad(loss, (0, 1))


@pytest.mark.parametrize('transposed', tiers.first_stands([False, True]), ids=['head', 'tied'])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32], ids=['w-bf16', 'w-fp32'])
def test_loss_is_small(one, dtype, transposed):
  """16,384 tokens: 8,016 MiB of logits in fp32 if it were naive, 501 of W in bf16 if it were
  copied."""
  w = array(*((V, D) if transposed else (D, V)), dtype=dtype)
  compiled = compile_for_tpu(
    loss_and_gradients(transposed), array(4, 4096, D), w, array(4, 4096, dtype=jnp.int32), mesh=one
  )
  assert temporaries(compiled) < 260


@pytest.mark.parametrize(
  'sizes', tiers.first_stands([{'fsdp': 4, 'tensor': 2}, {'fsdp': 8}]), ids=str
)
def test_loss_on_a_mesh_gathers_slices_alone(sizes):
  """A loop gathers one slice of W in bf16 and reduces one slice of dW; neither logits nor all of W
  travel."""
  mesh = topology_mesh('v5e:2x4', MeshConfig(data=1, **sizes))
  batch, weight = (
    Parallel(mesh).batch,
    Parallel(mesh, 'fsdp_tensor').param('head', ('embed', 'vocab'), (D, V)),
  )
  wide = NamedSharding(mesh, PartitionSpec(*batch.spec, None))
  compiled = compile_for_tpu(
    loss_and_gradients(),
    array(16, 4096, D, sharding=wide),
    array(D, V, dtype=jnp.float32, sharding=weight),
    array(16, 4096, dtype=jnp.int32, sharding=batch),
    mesh=mesh,
    out_shardings=(None, (wide, weight)),
  )
  assert 'all-to-all' not in collectives(compiled)
  gathers = [c for c in list_collectives(compiled) if c.kind == 'all-gather']
  gathered, whole = sum(c.bytes * c.times for c in gathers), 2 * D * V // sizes.get('tensor', 1)
  # in bf16, once in each loop; the last slice, a shorter one, serves both
  assert 1.98 * whole <= gathered <= 2 * whole
  assert max(c.bytes for c in gathers) <= 2 * D * 2048
  local_dx = 2 * 16 * 4096 * D // sizes['fsdp']
  small = 4 * 16 * 4096 // sizes['fsdp'] * 4
  assert collectives(compiled)['all-reduce'].bytes <= (local_dx if 'tensor' in sizes else 0) + small
