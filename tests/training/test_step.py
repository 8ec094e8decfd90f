import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data import Batch
from jaxformer.models.params import define
from jaxformer.models.zoo.gpt import gpt
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, make_parallel, use_mesh
from jaxformer.training import AdamW, Cosine
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import compiled_train_step, init_state, loss_and_grads, train_step
from tests.tiers import case

DEFINITION = define(gpt(32, 2, 2, context_length=32, vocab_size=264))
# Key offsets have a gradient of zero, which rounding makes 1e-9: with an eps of that size Adam
# would divide noise by noise.
OPTIMIZER = Optimizer(AdamW(learning_rate=1e-3, eps=1e-6), Cosine(warmup=2), 8, DEFINITION.info)


def batch(step: int, rows: int = 8, length: int = 16) -> Batch:
  """Random tokens of which some rows are predicted in part, and one not at all."""
  rng = np.random.default_rng(step)
  tokens = rng.integers(0, 264, (rows, length + 1)).astype(np.int32)
  targets = tokens[:, 1:].copy()
  targets[0, 3:] = -1
  targets[5] = -1
  return Batch(
    tokens[:, :-1], targets, np.cumsum(rng.random((rows, length)) < 0.2, axis=1, dtype=np.int32)
  )


@pytest.mark.parametrize('accumulate', [case(2, standing=False), case(4, standing=True)])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate):
  params, key = DEFINITION.init(jax.random.key(0)), jax.random.key(1)
  whole, _, grads = jax.jit(
    lambda p: loss_and_grads(
      DEFINITION, TrainingConfig(dtype='float32', z_loss=1e-3), p, batch(0), key
    )
  )(params)
  config = TrainingConfig(dtype='float32', z_loss=1e-3, accumulate=accumulate)
  sums, _, parts = jax.jit(lambda p: loss_and_grads(DEFINITION, config, p, batch(0), key))(params)
  np.testing.assert_allclose(sums, whole, rtol=1e-6)
  for name in grads:
    np.testing.assert_allclose(parts[name], grads[name], atol=1e-6, err_msg=name)


@pytest.mark.quick
def test_the_gradient_is_that_of_the_mean_over_counted_targets():
  params, key = DEFINITION.init(jax.random.key(0)), jax.random.key(1)
  sums, _, grads = jax.jit(
    lambda p: loss_and_grads(DEFINITION, TrainingConfig(dtype='float32'), p, batch(0), key)
  )(params)
  name, direction = 'embedder.input.table', jax.random.normal(jax.random.key(2), (264, 32))

  @jax.jit
  def mean(t):
    moved = params | {name: params[name] + t * direction}
    out = loss_and_grads(DEFINITION, TrainingConfig(dtype='float32'), moved, batch(0), key)[0]
    return out.nll / out.count

  slope = float(mean(1e-3) - mean(-1e-3)) / 2e-3
  assert float(jnp.sum(grads[name] * direction)) == pytest.approx(slope, rel=5e-3)
  assert float(sums.count) == 7 * 16 - 13


def run(mesh_config: MeshConfig, devices, steps: int = 4):
  parallel = make_parallel(mesh_config, devices)
  with use_mesh(parallel):
    state = init_state(DEFINITION, OPTIMIZER, 0, parallel)
    step = compiled_train_step(
      DEFINITION, OPTIMIZER, TrainingConfig(dtype='float32', z_loss=1e-4), parallel
    )
    losses = []
    for i in range(steps):
      state, metrics = step(state, jax.device_put(batch(i), parallel.batch))
      losses.append(float(metrics['train/loss']))
  return losses, jax.device_get(state.params), state


@pytest.fixture(scope='module')
def alone():
  return run(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(
  'mesh',
  [
    case(MeshConfig(fsdp=4, tensor=2, data=1), id='fsdp4-tensor2', standing=True),
    case(MeshConfig(data=4, rules='data_parallel', context=2), id='data4-context2', standing=False),
    case(MeshConfig(fsdp=8, data=1), id='fsdp8', standing=False),
    case(MeshConfig(data=8), id='data8', standing=False),
  ],
)
def test_on_eight_devices_the_losses_and_parameters_are_those_of_one(alone, mesh):
  losses, params, state = run(mesh, jax.devices())
  np.testing.assert_allclose(losses, alone[0], atol=1e-5)
  for name in params:
    np.testing.assert_allclose(params[name], alone[1][name], atol=1e-5, err_msg=name)
  whole = state.params['stack.groups.0.0.branches.1.layer.up.kernel']
  assert whole.addressable_shards[0].data.size == whole.size // (mesh.fsdp * mesh.tensor)


@pytest.mark.quick
def test_numbers_that_are_not_finite_are_flagged():
  params = DEFINITION.init(jax.random.key(0))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  state = init_state(DEFINITION, OPTIMIZER, 0, Parallel(mesh))
  step = jax.jit(
    lambda s: train_step(DEFINITION, OPTIMIZER, TrainingConfig(dtype='float32'), s, batch(0))[1][
      'finite'
    ]
  )
  assert step(state)
  bad = {**params, 'embedder.input.table': params['embedder.input.table'].at[3, 4].set(jnp.inf)}
  assert not step(dataclasses.replace(state, params=bad))


@pytest.mark.quick
def test_dropout_differs_between_steps_and_not_between_runs():
  definition = define(gpt(32, 2, 2, context_length=32, vocab_size=264, dropout=0.5))
  params = definition.init(jax.random.key(0))
  loss = jax.jit(
    lambda key: (
      loss_and_grads(definition, TrainingConfig(dtype='float32'), params, batch(0), key)[0].nll
    )
  )
  one, same, other = (float(loss(jax.random.fold_in(jax.random.key(0), i))) for i in (0, 0, 1))
  assert one == same != other
