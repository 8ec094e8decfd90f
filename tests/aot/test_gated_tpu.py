"""What the TPU's compiler makes of the mLSTM at the sizes of 1.3 billion parameters for v5e:
memory, forward and backward, in MiB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.mlstm import mlstm
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests.aot.tpu import compile_for_tpu
from tests.tiers import thorough

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = [pytest.mark.tpu_compiler, thorough]

B, T, H, K, V = 4, 2048, 4, 256, 512


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_mlstm_is_small():
  """64 MiB for the states between chunks in fp32, 16,384 for all states."""

  def run(starts, dy, *inputs):
    y, pull = jax.vjp(lambda *a: mlstm(*a, None, starts)[0], *inputs)
    return y, *pull(dy)

  keys, values, gates = array(B, T, H, K), array(B, T, H, V), array(B, T, H, dtype=jnp.float32)
  compiled = compile_for_tpu(
    run,
    array(B, T, dtype=jnp.bool_),
    values,
    keys,
    keys,
    values,
    gates,
    gates,
    mesh=topology_mesh('v5e:2x2', MeshConfig(data=1)),
  )
  assert compiled.memory_analysis().temp_size_in_bytes / 2**20 < 160
