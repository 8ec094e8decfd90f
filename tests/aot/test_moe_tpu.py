"""What the TPU's compiler makes of a layer of experts: FLOPs of the active experts alone, by a
kernel, and tokens that travel.

The compiler counts a kernel by its own estimate, and a loop's body once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.ops.grouped_matmul import grouped_matmul
from jaxformer.ops.moe import SLACK, Experts, Form, dropless
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests import tiers
from tests.aot.tpu import collectives, compile_for_tpu, has_array

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

N, D, F, E, K = 16384, 2048, 5632, 8, 2
ACTIVE = 2 * N * K * 3 * D * F  # FLOPs of a forward pass of two SwiGLU experts a token


SWIGLU = Form(lambda up, gate: jax.nn.silu(gate) * up)


def array(*shape, dtype=jnp.bfloat16, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def layer_and_gradients(x, expert, weight, w_in, w_gate, w_out, g):
  def run(x, weight, *weights):
    return dropless(x, expert, weight, Experts(*weights), SWIGLU)

  y, pull = jax.vjp(run, x, weight, w_in, w_gate, w_out)
  return y, pull(g)


def flops(compiled):
  return compiled.cost_analysis()['flops']


@pytest.mark.parametrize('topology', tiers.first_stands(['v5e:2x2', 'v6e:2x2']))
def test_flops_are_those_of_the_active_experts(topology):
  """16,384 tokens, two of eight experts: an ideal of 6.8 TFLOP forward and backward. Computing
  every expert would be 4 times that; it is within 15 %, and all nine products are kernels."""
  x, w = array(8, N // 8, D), array(E, D, F)
  tokens = array(8, N // 8, K, dtype=jnp.int32), array(8, N // 8, K, dtype=jnp.float32)
  compiled = compile_for_tpu(
    layer_and_gradients,
    x,
    *tokens,
    w,
    w,
    array(E, F, D),
    x,
    mesh=topology_mesh(topology, MeshConfig(data=1)),
  )
  print(
    f'{topology}: {flops(compiled):.4g} FLOPs, {flops(compiled) / (3 * ACTIVE):.3f} of the ideal'
  )
  assert 1.0 <= flops(compiled) / (3 * ACTIVE) < 1.15
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 9


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32], ids=['bf16', 'fp32'])
@pytest.mark.parametrize(
  ('M', 'K_', 'N_'), tiers.first_stands([(100, 200, 72), (2, 4096, 14336), (4096, 14336, 4096)])
)
def test_sizes_that_fit_no_tile(M, K_, N_, dtype):
  """They compile within the VMEM of a v5e: a decoding step, sides that no tile divides, the widths
  of Mixtral."""

  def run(x, w, sizes, g):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, pull(g)

  x, w = array(M, K_, dtype=dtype), array(8, K_, N_, dtype=dtype)
  compile_for_tpu(
    run,
    x,
    w,
    array(8, dtype=jnp.int32),
    array(M, N_, dtype=dtype),
    mesh=topology_mesh('v5e:2x2', MeshConfig(data=1)),
  )


def test_tokens_travel_to_their_experts():
  """Experts over four chips, each of them over two: tokens go there and back by all-to-all, what is
  gathered of the weights are those of one chip's experts, and no chip ever holds all of an expert
  axis."""
  mesh = topology_mesh('v5e:2x4', MeshConfig(data=1, expert=4, fsdp=2))
  tokens = NamedSharding(mesh, PartitionSpec(('data', 'fsdp', 'expert')))
  rows, columns = (
    NamedSharding(mesh, PartitionSpec(*spec))
    for spec in (('expert', 'fsdp'), ('expert', None, 'fsdp'))
  )
  x = array(16, 1024, D, sharding=tokens)
  weights = (
    array(E, D, F, sharding=rows),
    array(E, D, F, sharding=rows),
    array(E, F, D, sharding=columns),
  )
  compiled = compile_for_tpu(
    layer_and_gradients,
    x,
    array(16, 1024, K, dtype=jnp.int32, sharding=tokens),
    array(16, 1024, K, dtype=jnp.float32, sharding=tokens),
    *weights,
    x,
    mesh=mesh,
    out_shardings=(tokens, (tokens, tokens, rows, rows, columns)),
  )
  ratio = flops(compiled) / (3 * ACTIVE / 8)
  print(f'tokens that travel: {ratio:.3f} of the ideal')
  # The kernels' estimates count the buckets' free places, a quarter, which cost nothing; the
  # gradient computes forward products again.
  assert ratio < 4 / 3 * SLACK * 1.05
  assert collectives(compiled)['all-to-all'].count >= 4
  gathered = [s for c in list_collectives(compiled) if c.kind == 'all-gather' for s in c.shapes]
  assert any(s.startswith(f'bf16[{E // 4},') for s in gathered)
  assert not has_array(compiled, E, D, F)
  assert not has_array(compiled, E, F, D)
