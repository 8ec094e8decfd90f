"""What the TPU's compiler makes of the recurrence of Mamba-3 for v5e: memory, forward and backward,
in MiB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.mamba3 import mamba3
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests.aot.tpu import compile_for_tpu, has_array
from tests.tiers import thorough

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def full(*shape):
  return array(*shape, dtype=jnp.float32)


def with_gradients(starts, dy, dh, *arguments):
  """Output, state, and the gradients of all but the borders, with documents in the rows."""

  def run(x, dt, rate, trapezoid, theta, B, C, B_bias, C_bias, D):
    tokens = x, dt, rate, trapezoid, theta, B, C
    return mamba3(*tokens, B_bias, C_bias, None, D, None, starts)

  (y, h), pull = jax.vjp(run, *arguments)
  return y, h, *pull((dy, dh))


@thorough
def test_one_layer_of_mamba3_1_3b():
  """B1 T2048 H64 P64 N128: the maps of every head, 32 MiB each in bfloat16 and 64 in fp32, are in
  memory for one chunk of 256 only, as are the 16 MiB of its weights in fp32."""
  T, H, P, N, A = 2048, 64, 64, 128, 32
  x, maps, heads, biases = array(1, T, H, P), array(1, T, 1, 1, N), full(1, T, H), full(H, 1, N)
  compiled = compile_for_tpu(
    with_gradients,
    array(1, T, dtype=jnp.bool_),
    array(1, T, H, 1, P),
    full(1, H, P, N),
    x,
    heads,
    heads,
    heads,
    full(1, T, A),
    maps,
    maps,
    biases,
    biases,
    full(H),
    mesh=topology_mesh('v5e:2x2', MeshConfig(data=1)),
  )
  assert compiled.memory_analysis().temp_size_in_bytes / 2**20 < 160
  assert not has_array(compiled, T, H, N)
