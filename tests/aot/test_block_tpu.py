"""What the TPU's compiler makes of a block of recurrent families at the width of 1.3 billion
parameters, for v5e: memory, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.layers.mamba3 import Mamba3
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import BlockLayer, pre_norm
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES, PRESETS
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from jaxformer.testing.case import Alone
from tests.aot.tpu import compile_for_tpu
from tests.tiers import case

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

B, T, D = 2, 2048, 2048
STREAM = 2 * B * T * D  # bytes of the residual stream in bfloat16

STREAMS = {
  'deepseek-v3': 25,
  'deltanet': 35,
  'falcon-h1': 25,
  'gated-deltanet': 60,
  'gla': 27,
  'hgrn2': 30,
  'kda': 55,
  'lfm2': 18,
  'mamba2': 22,
  'mamba3-1.3b': 36,
  'mamba3-mimo': 125,
  'mingru': 36,
  'minimax': 48,
  'minlstm': 38,
  'recurrentgemma': 31,
  'retnet': 36,
  'rwkv7': 62,
  'xlstm': 27,
}
"""Preset of this width, or family -> the limit of temporary memory, in arrays of the residual
stream's size."""


def first_block(name: str) -> BlockLayer.Config:
  """The mixing and the feed-forward layer at the bottom of a model."""
  if name == 'mamba3-mimo':  # the family's heads are for models of a CPU
    return BlockLayer.Config(block=pre_norm(RMSNorm(), Mamba3.Config(rank=4)))
  if name in PRESETS:
    model = PRESETS[name].model
    assert model.width == D
  else:
    family = FAMILIES[name]
    units = {} if family.hidden is None else {'hidden': family.hidden(D)}
    layers = max(family.layer_step, family.fewest_layers)
    model = family.maker()(width=D, layers=layers, vocab_size=264, context_length=T, **units)
  return BlockLayer.Config(block=model.stacks[0][0].pattern[0])


@pytest.mark.parametrize(
  ('name', 'streams'), [case(*item, standing=item[0] == 'gla') for item in STREAMS.items()]
)
def test_a_block_of_1_3b(name, streams):
  """With nothing recomputed but what the layers recompute themselves."""
  definition = define(Alone(layer=first_block(name), width=D))

  def run(params, x, dy):
    y, pull = jax.vjp(lambda p, x: definition.merge(p)(x, Context()).y, params, x)
    return y, pull(dy)

  x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
  params = definition.abstract(dtype=jnp.bfloat16)
  mesh = topology_mesh('v5e:2x2', MeshConfig(data=1))
  compiled = compile_for_tpu(run, params, x, x, mesh=mesh)
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  print(f'{name}: {temporaries / 2**20:.0f} MiB, {temporaries / STREAM:.1f} residual streams')
  assert temporaries < streams * STREAM
