"""What the TPU's compiler makes of a training step whose sequences are divided over four chips, or
that is on two slices."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxformer.data import Batch
from jaxformer.layers.mamba import Mamba
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import LLAMA3, llama
from jaxformer.models.zoo.mamba import mamba
from jaxformer.planning.collectives import list_collectives
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import AdamW, Optimizer
from jaxformer.training.schedule import Constant
from jaxformer.training.step import abstract_train_state, compiled_train_step

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

B, T, D = 4, 8192, 256
MODELS = {
  'mamba': mamba(Mamba.Config(), D, 2, vocab_size=1024, context_length=T),
  'llama': llama(D, 2, 512, 4, 2, vocab_size=1024, context_length=T, rotary=LLAMA3),
}


def compiled_step(
  model, config: MeshConfig, rows: int = B, length: int = T, slices: int = 1
) -> jax.stages.Compiled:
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x4', num_slices=slices
  ).devices
  definition, parallel = define(model), make_parallel(config, devices)
  optimizer = Optimizer(AdamW(), Constant(), 1000, definition.info)
  state = abstract_train_state(definition, optimizer, parallel)
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=parallel.batch)
  with use_mesh(parallel):
    step = compiled_train_step(
      definition, optimizer, TrainingConfig(dtype='bfloat16', remat='full'), parallel
    )
    return step.trace(state, Batch(ids, ids, ids)).lower(lowering_platforms=('tpu',)).compile()


def numbers(shape: str) -> int:
  return math.prod(int(d) for d in re.findall(r'\d+', shape.split('[')[1]))


@pytest.mark.parametrize('name', MODELS)
def test_a_long_sequence_is_divided_over_four_chips(name):
  compiled = compiled_step(MODELS[name], MeshConfig(data=1, fsdp=2, context=4))
  sequence = B // 2 * T * D
  kinds = 'all-gather', 'all-reduce', 'all-to-all'
  large = [
    c
    for c in list_collectives(compiled)
    if c.kind in kinds and max(map(numbers, c.shapes)) >= sequence // 4
  ]
  if name == 'mamba':
    assert not large
  else:  # keys and values of all positions, two of four heads
    assert large
    assert {max(map(numbers, c.shapes)) for c in large} == {sequence // 2}


def test_a_step_compiles_for_two_slices():
  """Each slice has a copy of the state, divided over its eight chips; the sixteen divide the
  batch."""
  compiled = compiled_step(
    MODELS['llama'], MeshConfig(replica=2, data=1, fsdp=8), 16, 512, slices=2
  )
  state = 12 * define(MODELS['llama']).size / 8
  assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(
    state + 3 * 4 * 512, rel=0.02
  )
