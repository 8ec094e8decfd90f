"""What the TPU's compiler makes of attention and Mamba-2 side by side for v5e: memory, forward and
backward, in MiB."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.parallel import ParallelLayers, Summand
from jaxformer.layers.position import Rotary
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from tests.aot.tpu import compile_for_tpu

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

B, T, D = 4, 2048, 2048
LIMIT = 1000


def test_attention_beside_mamba2_is_small():
  """The two layers of Falcon-H1 1.5B: 8 heads of 128 beside 48 of 64 with 256 states, without
  recomputation. An activation of the width takes 32 MiB in bfloat16; the states of all steps would
  take 24,576 MiB in fp32."""
  config = ParallelLayers.Config(
    summands=(
      Summand(
        layer=Mamba2.Config(heads=48, d_state=256, norm_eps=None), in_scale=1.25, out_scale=0.25
      ),
      Summand(
        layer=Attention.Config(heads=8, kv_heads=2, head_dim=128, position=Rotary(theta=1e11))
      ),
    )
  )
  module = nnx.eval_shape(lambda: config.build(D, nnx.Rngs(params=0), LayerPosition()))
  graph, params = nnx.split(module)
  params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
  x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)

  def run(params, x, dy):
    y, pull = jax.vjp(lambda p, x: nnx.merge(graph, p)(x, Context()).y, params, x)
    return y, *pull(dy)

  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(run, params, x, x, mesh=mesh)
  temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
  print(f'temporary: {temporary:.0f} MiB')
  assert temporary < LIMIT
