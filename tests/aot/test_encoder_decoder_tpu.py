"""What the TPU's compiler makes of a training step of the Transformer for v5e:2x4: it compiles, a
chip holds its part, and no attention has all its weights in memory; and of a recurrent one, divided
by rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.data import Batch
from jaxformer.layers.init import Uniform
from jaxformer.models.params import define
from jaxformer.models.zoo.gnmt import gnmt
from jaxformer.models.zoo.seq2seq import luong
from jaxformer.models.zoo.transformer import transformer
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig, Parallel, use_mesh
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import AdamW, Optimizer
from jaxformer.training.schedule import Constant
from jaxformer.training.step import abstract_train_state, compiled_train_step
from tests.aot.tpu import has_array

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

INIT = Uniform(bound=0.04)
B, S, T, D = 16, 384, 640, 256
FSDP_TENSOR = MeshConfig(data=1, fsdp=4, tensor=2)
DATA_PARALLEL = MeshConfig(data=8, rules='data_parallel')


def compiled(definition, config: MeshConfig, sizes=(B, S, T)) -> jax.stages.Compiled:
  """The step for pairs of padded sources and targets of other lengths."""
  parallel = Parallel(topology_mesh('v5e:2x4', config), config.rules)
  rows, source, target = sizes
  optimizer = Optimizer(AdamW(), Constant(), 1000, definition.info)
  state = abstract_train_state(definition, optimizer, parallel)

  def ids(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=parallel.batch)

  with use_mesh(parallel):
    how = TrainingConfig(dtype='bfloat16', remat='full', label_smoothing=0.1)
    step = compiled_train_step(definition, optimizer, how, parallel)
    return (
      step.trace(state, Batch(ids(target), ids(target), source_BS=ids(source)))
      .lower(lowering_platforms=('tpu',))
      .compile()
    )


def test_the_transformer_step():
  definition = define(transformer(D, 2, 1024, 2, vocab_size=16384, context_length=T, dropout=0.1))
  step = compiled(definition, FSDP_TENSOR)
  assert step.memory_analysis().argument_size_in_bytes == pytest.approx(
    12 * definition.size / 8, rel=0.02
  )
  # Attention of the encoder, of the decoder to itself and to the source: none holds all its
  # weights.
  for queries, keys in ((S, S), (T, T), (T, S)):
    assert not has_array(step, queries, keys), (queries, keys)
  rows = B // 8 * FSDP_TENSOR.tensor
  # nor are there logits of all positions
  assert not has_array(step, rows, T, 16384 // FSDP_TENSOR.tensor)


@pytest.mark.parametrize(
  'model',
  [
    gnmt(
      256, 3, vocab_size=4096, context_length=32, init=INIT, embedding_init=INIT, head_init=INIT
    ),
    luong(256, 2, None, source_vocab_size=4096, vocab_size=4096, context_length=32, dropout=0.2),
  ],
  ids=['gnmt', 'luong'],
)
def test_a_recurrent_step_sums_gradients_alone(model):
  """Data-parallel: nothing is sent between chips inside the loops over time."""
  definition = define(model)
  step = compiled(definition, DATA_PARALLEL, (16, 24, 32))
  sent = list_collectives(step)
  assert {c.kind for c in sent} == {'all-reduce'}
  assert sum(c.bytes * c.times for c in sent) <= 4.2 * definition.size
