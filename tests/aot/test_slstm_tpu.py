"""What the TPU's compiler makes of the sLSTM at the sizes of 1.3 billion parameters for v5e:
memory, forward and backward, in MiB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.slstm import slstm
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests.aot.tpu import compile_for_tpu
from tests.tiers import thorough

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = [pytest.mark.tpu_compiler, thorough]

B, T, H, K = 4, 2048, 4, 512


def test_slstm_is_linear_in_time():
  """A gate of all positions is 64 MiB: seven are kept for the gradient, five activated and two
  states; beside them are their gradients and copies with time first."""

  def run(starts, dy, gates, u):
    zeros = (jnp.zeros((B, H, K)),) * 4
    y, pull = jax.vjp(lambda *a: slstm(*a, zeros, starts)[0], gates, u)
    return y, *pull(dy)

  compiled = compile_for_tpu(
    run,
    jax.ShapeDtypeStruct((B, T), jnp.bool_),
    jax.ShapeDtypeStruct((B, T, H, K), jnp.float32),
    jax.ShapeDtypeStruct((B, T, H, 4, K), jnp.float32),
    jax.ShapeDtypeStruct((H, K, 4, K), jnp.bfloat16),
    mesh=topology_mesh('v5e:2x2', MeshConfig(data=1)),
  )
  assert compiled.memory_analysis().temp_size_in_bytes / 2**20 < 520
