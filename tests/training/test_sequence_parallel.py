"""Training on sequences that a mesh divides: accumulation, remat and the optimizer's state with
it."""

import json

import jax
import numpy as np
import pytest

from jaxformer.config import to_json
from jaxformer.data import Batch
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.jamba import jamba
from jaxformer.overrides import override
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from jaxformer.sharding_rules import AxisRules, Rules
from jaxformer.training import AdamW, Constant, train
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import compiled_train_step, init_state
from tests.tiers import case, thorough

OWN = Rules(
  params=AxisRules(embed=('fsdp', 'context'), heads=('tensor',), mlp=('tensor',), inner=('tensor',))
)
MESHES = {
  'context4-fsdp2': MeshConfig(data=1, fsdp=2, context=4),
  'own-rules': MeshConfig(data=1, fsdp=2, context=2, tensor=2, rules=OWN),
}


def batch(rows: int = 8, length: int = 32) -> Batch:
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 264, (rows, length + 1)).astype(np.int32)
  return Batch(
    tokens[:, :-1],
    tokens[:, 1:],
    np.cumsum(rng.random((rows, length)) < 0.1, axis=1, dtype=np.int32),
  )


def steps(model, config: MeshConfig, devices, how: TrainingConfig):
  definition, parallel = define(model), make_parallel(config, devices)
  optimizer, losses = (
    Optimizer(AdamW(learning_rate=1e-3, eps=1e-6), Constant(), 8, definition.info),
    [],
  )
  with use_mesh(parallel):
    state = init_state(definition, optimizer, 0, parallel)
    step, put = (
      compiled_train_step(definition, optimizer, how, parallel),
      jax.device_put(batch(), parallel.batch),
    )
    for _ in range(3):
      state, metrics = step(state, put)
      losses.append(float(metrics['train/loss']))
  return losses, state


MODELS = {
  name: PRESETS[f'{name}-tiny'].model for name in ('llama3', 'mamba', 'rwkv6', 'mixtral')
} | {
  'jamba': jamba(
    64,
    2,
    96,
    4,
    2,
    experts=4,
    d_state=8,
    attention_every=2,
    attention_first=1,
    vocab_size=264,
    context_length=256,
  )
}


@pytest.mark.parametrize(
  ('name', 'mesh'),
  [
    *(case(name, 'own-rules', standing=False) for name in ('llama3', 'mamba')),
    *(case(n, 'context4-fsdp2', standing=False) for n in ('jamba', 'mamba', 'rwkv6', 'mixtral')),
  ],
)
def test_losses_and_parameters_are_those_of_one_device(name, mesh):
  model = MODELS[name].replace(stack=tuple(g.replace(repeats=1) for g in MODELS[name].stack))
  # Accumulating on both: a router's loss is the mean over microbatches.
  whole, state = steps(
    model, MeshConfig(data=1), jax.devices()[:1], TrainingConfig(dtype='float32', accumulate=2)
  )
  divided, divided_state = steps(
    model, MESHES[mesh], None, TrainingConfig(dtype='float32', accumulate=2, remat='full')
  )
  np.testing.assert_allclose(divided, whole, atol=1e-4)
  for parameter, value in jax.device_get(state.params).items():
    np.testing.assert_allclose(divided_state.params[parameter], value, atol=1e-4, err_msg=parameter)
  placed = {p.sharding for p in divided_state.params.values()}
  moments = [m for m in jax.tree.leaves(divided_state.opt_state) if m.ndim > 1]
  assert len(moments) >= 2 * len([p for p in divided_state.params.values() if p.ndim > 1])
  assert {m.sharding for m in moments} <= placed


@thorough
def test_the_loop_takes_a_mesh_that_divides_time(experiment, dataset):
  def losses(name, devices, *given):
    e = experiment(name, dropout=0.0, steps=3, eval_every=3, checkpoint_every=3, accumulate=2)
    e = override(
      e, [('model.stack', json.dumps(stack)), *(('mesh.' + axis, n) for axis, n in given)]
    )
    folder = train(e, dataset=dataset, devices=devices, log=lambda _: None).folder
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [
      row[k] for row in rows for k in ('train/loss', 'train/grad_norm', 'eval/loss') if k in row
    ]

  stack = [g | {'repeats': 1} for g in to_json(PRESETS['mamba-tiny'].model)['stack']]
  whole = losses('whole', jax.devices()[:1])
  np.testing.assert_allclose(
    losses('divided', None, ('context', '4'), ('fsdp', '2')), whole, rtol=1e-4
  )
