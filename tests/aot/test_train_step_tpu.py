"""What the TPU's compiler makes of a whole training step for v5e:2x4: what each chip holds and what
the chips send each other.

The model is a Llama of two layers, so that each loop over layers has two rounds. Bytes are those of
results on one chip: of a reduce-scatter over eight, an eighth of what is summed. On a mesh of two
axes the compiler sums the gradients of most weights by an all-reduce, of which each chip keeps its
part."""

from __future__ import annotations

import re

import pytest

from jaxformer.data import Text
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import LLAMA3, llama
from jaxformer.planning.collectives import list_collectives
from jaxformer.planning.compiler import topology_mesh
from jaxformer.sharding import MeshConfig
from jaxformer.training.experiment import Experiment, TrainingConfig
from jaxformer.training.schedule import Constant
from jaxformer.training.step import lowered_train_step
from tests.aot.tpu import has_array

pytest.importorskip(
  'libtpu', reason='needs libtpu, the compiler for TPUs (pip install jaxformer[tpu])'
)
pytestmark = pytest.mark.tpu_compiler

MESHES = {
  'fsdp': MeshConfig(data=1, fsdp=8, rules='fsdp'),
  'fsdp_tensor': MeshConfig(data=1, fsdp=4, tensor=2, rules='fsdp_tensor'),
  'data_parallel': MeshConfig(data=8, rules='data_parallel'),
}
B, T, D, V, LAYERS = 16, 1024, 512, 16384, 2
TOKENS = B * T // 8  # of a chip, where all eight divide the batch
DEFINITION = define(llama(D, LAYERS, 1408, 4, 2, vocab_size=V, context_length=T, rotary=LLAMA3))
# Bytes in bf16 of the matrices of the layers and the head, and of the norms' scales.
WEIGHTS = sum(2 * i.size for i in DEFINITION.info.values() if i.matmul and 'norm' not in i.axes)
NORMS = 2 * (2 * LAYERS + 1) * D


class Step:
  """A compiled training step, with what it sends."""

  def __init__(self, rules: str, remat: str = 'full'):
    data, training = (
      Text(sequence_length=T, packing='stream'),
      TrainingConfig(batch_size=B, remat=remat),
    )
    experiment = Experiment(
      model=DEFINITION.config, data=data, schedule=Constant(), training=training, mesh=MESHES[rules]
    )
    self.compiled = lowered_train_step(
      experiment, topology_mesh('v5e:2x4', MESHES[rules])
    ).compile()
    self.collectives = list_collectives(self.compiled)

  def sent(self, *kinds: str, dtype: str = '', where: str = '') -> int:
    """Bytes, of some kinds, a dtype, and a part of the program's path, without the names of layers
    in it: jvp(Head) is jvp()."""
    some = (
      c
      for c in self.collectives
      if c.kind in kinds
      and c.shapes[0].startswith(dtype)
      and where in re.sub(r'jvp\(\w+\)', 'jvp()', c.source)
    )
    return sum(c.bytes * c.times for c in some)

  @property
  def forward(self) -> int:
    return self.sent('all-gather', dtype='bf16', where='/jvp()/while')

  @property
  def backward(self) -> int:
    return self.sent('all-gather', dtype='bf16', where='transpose(jvp())/while')

  def large(self, dtype: str) -> list:
    return [c for c in self.collectives if c.bytes > 4096 and c.shapes[0].startswith(dtype)]

  @property
  def temporaries(self) -> int:
    return self.compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope='module')
def steps():
  made: dict[tuple[str, str], Step] = {}

  def step(rules: str, remat: str = 'full') -> Step:
    if (rules, remat) not in made:
      made[rules, remat] = Step(rules, remat)
    return made[rules, remat]

  return step


@pytest.mark.parametrize(
  ('rules', 'shards'), [('fsdp', 8), ('fsdp_tensor', 8), ('data_parallel', 1)]
)
def test_a_chip_holds_its_part_and_little_else(steps, rules, shards):
  """Parameters and AdamW's two moments in fp32; attention is a kernel; there are no logits of all
  tokens, nor of all positions."""
  step = steps(rules)
  assert step.compiled.memory_analysis().argument_size_in_bytes == pytest.approx(
    12 * DEFINITION.size / shards, rel=0.02
  )
  # attention forward and backward
  assert step.compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2
  assert not has_array(step.compiled, T, T)
  tensor = MESHES[rules].tensor
  rows, columns = B // 8 * tensor, V // tensor
  assert not has_array(step.compiled, rows, T, columns)
  assert not has_array(step.compiled, rows, T, 1, columns)
  # Gradients, rounded weights and one period's whole weights; a slice of logits; a few arrays as
  # large as the residual stream.
  assert (
    step.temporaries
    < 6 * DEFINITION.size / shards + 2 * WEIGHTS / LAYERS + 2**24 + 8 * 2 * rows * T * D
  )


def test_fsdp_gathers_weights_once_forward_and_once_backward(steps):
  step = steps('fsdp')
  assert step.forward == step.backward == WEIGHTS
  # Tokens are looked up in each chip's columns of the embedding and exchanged: the table itself
  # never travels.
  assert step.sent('all-to-all') == 2 * 2 * TOKENS * D
  assert step.sent('all-gather', where='_take') <= 2 * 4 * B * T
  # Gradients: scattered in bf16. Only those of the norms, which every chip keeps, are summed whole.
  assert 8 * step.sent('reduce-scatter') == WEIGHTS
  assert step.sent('all-reduce') <= NORMS + 1024
  assert not step.large('f32')


def test_fsdp_tensor_gathers_halves_and_sums_activations(steps):
  step = steps('fsdp_tensor')
  assert step.forward == step.backward == WEIGHTS // 2
  stream = 2 * 2 * TOKENS * D  # of a chip in bf16: two chips share their tokens
  # The two layers of a block each sum their output forward and their input's gradient backward;
  # attention's once more, remat. Gradients of weights are summed once.
  activations, gradients = 5 * LAYERS * stream, WEIGHTS // 2
  sums = step.sent('all-reduce', dtype='bf16', where='while')
  assert sums + 4 * step.sent('reduce-scatter', where='while') == activations + gradients
  assert step.sent('all-reduce') <= sums + stream + NORMS + 64 * TOKENS
  assert not [c for c in step.large('f32') if c.bytes > 4 * 2 * TOKENS]


def test_data_parallel_sums_gradients_alone(steps):
  step = steps('data_parallel')
  assert {c.kind for c in step.collectives} == {'all-reduce'}
  assert step.sent('all-reduce') == pytest.approx(2 * DEFINITION.size, rel=1e-3)
  assert not step.large('f32')


def test_remat_trades_memory(steps):
  """What is kept grows from nothing, attention's output, also hidden units, to all; whole weights
  are never kept."""
  none, names, attention, full = (
    steps('fsdp', remat) for remat in ('none', 'names', 'attention', 'full')
  )
  assert none.temporaries >= names.temporaries >= attention.temporaries >= full.temporaries
  assert names.temporaries - attention.temporaries >= 0.9 * 2 * TOKENS * 1408 * LAYERS
  assert none.forward == none.backward == WEIGHTS
