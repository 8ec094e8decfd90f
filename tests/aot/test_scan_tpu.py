"""What the TPU's compiler makes of the selective scan and of state-space duality for v5e: memory,
forward and backward, in MiB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.selective_scan import selective_scan
from jaxformer.ops.ssd import ssd
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests.aot.tpu import compile_for_tpu, has_array

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

B, T = 8, 2048  # one layer of the 130m models


@pytest.fixture(scope='module')
def one():
  return topology_mesh('v5e:2x2', MeshConfig(data=1))


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def full(*shape):
  return array(*shape, dtype=jnp.float32)


def with_gradients(operation):
  """Output, state, and the gradients of all but the borders, with documents in the rows."""

  def run(starts, dy, *arguments):
    (y, h), pull = jax.vjp(lambda *a: operation(*a, starts), *arguments)
    return y, h, *pull((dy, h))

  return run


def temporaries(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_selective_scan_is_small(one):
  """1,536 channels with 16 states: 3,072 MiB for the states of all steps in fp32, of which a naive
  gradient keeps several."""
  D, N = 1536, 16
  u, maps = array(B, T, D), array(B, T, N)
  with implementation(selective_scan='chunked'):
    compiled = compile_for_tpu(
      with_gradients(selective_scan),
      array(B, T, dtype=jnp.bool_),
      u,
      u,
      full(B, T, D),
      full(D, N),
      maps,
      maps,
      full(D),
      full(B, D, N),
      mesh=one,
    )
  assert temporaries(compiled) < 560
  assert not has_array(compiled, B, T, D, N)


def test_ssd_is_small(one):
  """24 heads of 64 channels with 128 states: 1,536 MiB for the weights of all chunks of 256 in
  fp32, 98,304 for all states."""
  H, P, N = 24, 64, 128
  x, maps = array(B, T, H, P), array(B, T, 1, N)
  with implementation(ssd='chunked'):
    compiled = compile_for_tpu(
      with_gradients(ssd),
      array(B, T, dtype=jnp.bool_),
      x,
      x,
      full(B, T, H),
      full(H),
      maps,
      maps,
      full(H),
      full(B, H, P, N),
      mesh=one,
    )
  assert temporaries(compiled) < 560
