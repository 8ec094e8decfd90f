import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import InputError
from jaxformer.models.params import ParamInfo, define
from jaxformer.models.zoo.gpt import gpt
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from jaxformer.training import SGD, Adadelta, Adafactor, AdamThenSGD, AdamW, Constant, Lion, Muon
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import Optimizer
from jaxformer.training.step import compiled_train_step, init_state

pytestmark = pytest.mark.quick
ALL = (
  AdamW(learning_rate=1e-2),
  Lion(learning_rate=3e-3),
  Muon(learning_rate=1e-2),
  Adafactor(learning_rate=1e-2, factored_from=16),
  SGD(learning_rate=0.3, momentum=0.9),
  Adadelta(learning_rate=3.0),
  AdamThenSGD(learning_rate=1e-2, adam_learning_rate=1e-2, adam_steps=5),
)


def info(*axes, shape, decay=True, lr_scale=1.0, matmul=True):
  return ParamInfo(
    shape,
    jnp.float32,
    axes,
    decay=decay,
    lr_scale=lr_scale,
    full_precision=False,
    matmul=matmul,
    active=1.0,
  )


INFO = {
  'embedding': info('vocab', 'embed', shape=(16, 8), matmul=False),
  'w': info('layers', 'embed', 'mlp', shape=(3, 8, 12)),
  'scale': info('layers', 'norm', shape=(3, 8), decay=False),
  'slow': info('layers', 'embed', 'mlp', shape=(3, 8, 12), lr_scale=0.5),
}


def tree(seed):
  return {
    n: jax.random.normal(jax.random.fold_in(jax.random.key(seed), k), i.shape)
    for k, (n, i) in enumerate(INFO.items())
  }


@pytest.mark.parametrize('config', ALL, ids=lambda c: c.tag)
def test_weight_decay_and_learning_rates_follow_the_parameters(config):
  o = Optimizer(config.replace(weight_decay=0.1, clip=None), Constant(warmup=0), 10, INFO)
  params, zero = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
  decayed, _, _ = o.update(zero, o.init(params), params, 0)
  for name, i in INFO.items():
    kept = 1 - (config.learning_rate * 0.1 * i.lr_scale if i.decay else 0)
    np.testing.assert_allclose(decayed[name], kept * params[name], rtol=1e-6)
  grads = tree(1) | {'slow': tree(1)['w']}
  o = Optimizer(config.replace(weight_decay=0.0), Constant(warmup=0), 10, INFO)
  moved, _, did = o.update(grads, o.init(params), params, 0)
  np.testing.assert_allclose(
    (moved['slow'] - params['slow']), 0.5 * (moved['w'] - params['w']), atol=1e-6
  )
  np.testing.assert_allclose(did['grad_norm'], optax.tree.norm(grads), rtol=1e-6)


def test_a_learning_rate_of_its_own_does_not_follow_that_of_the_run():
  """Under the schedule of the run: at the fourth of eight steps of warmup, half of the peak."""
  own = dataclasses.replace(INFO['scale'], learning_rate=1e-3)
  for rate in (1e-2, 1e-4):
    o = Optimizer(AdamW(learning_rate=rate), Constant(warmup=8), 10, {'own': own})
    params, grads = {'own': jnp.ones((3, 8))}, {'own': jnp.ones((3, 8))}
    after, _, did = o.update(grads, o.init(params), params, 3)
    np.testing.assert_allclose(params['own'] - after['own'], 0.5e-3, rtol=1e-4)
    assert float(did['learning_rate']) == pytest.approx(rate / 2)


def test_adamw_is_that_of_optax():
  some = {n: i for n, i in INFO.items() if i.lr_scale == 1}
  o = Optimizer(AdamW(learning_rate=1e-2, weight_decay=0.1, clip=1.0), Constant(warmup=0), 10, some)
  theirs = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-2, 0.9, 0.95, weight_decay=0.1, mask={n: i.decay for n, i in some.items()}),
  )
  params = other = {n: p for n, p in tree(0).items() if n in some}
  state, their_state = o.init(params), theirs.init(params)
  for step in range(4):
    grads = {n: g for n, g in tree(step + 5).items() if n in params}
    params, state, _ = o.update(grads, state, params, step)
    updates, their_state = theirs.update(grads, their_state, other)
    other = optax.apply_updates(other, updates)
  for name in params:
    np.testing.assert_allclose(params[name], other[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('config', [Muon(), Adafactor(factored_from=8)], ids=lambda c: c.tag)
def test_each_matrix_of_a_stack_is_updated_as_it_would_be_alone(config):
  shape = (3, 2, 16, 40)
  stack = {'w': info('layers', 'experts', 'embed', 'mlp', shape=shape)}
  alone = {'w': info('embed', 'mlp', shape=shape[2:])}
  both = [(config.direction(i), i) for i in (stack, alone)]
  grads = jax.random.normal(jax.random.key(0), (4, *shape))
  (ours, _), (single, _) = both
  state = ours.init({'w': grads[0]})
  states = [single.init({'w': grads[0, i, 1]}) for i in range(3)]
  for g in grads:
    out, state = ours.update({'w': g}, state, {'w': g})
    for i in range(3):
      one, states[i] = single.update({'w': g[i, 1]}, states[i], {'w': g[i, 1]})
      np.testing.assert_allclose(out['w'][i, 1], one['w'], rtol=2e-3, atol=2e-4)


def test_muon_orthogonalizes_every_matrix():
  for shape in ((3, 2, 16, 40), (40, 16)):
    axes = ('layers', 'experts', 'embed', 'mlp')[-len(shape) :]
    g = jax.random.normal(jax.random.key(0), shape) * 7
    direction = Muon().direction({'w': info(*axes, shape=shape)})
    x = direction.update({'w': g}, direction.init({'w': g}), {'w': g})[0]['w']
    x = x / (0.2 * 40**0.5)
    values = np.linalg.svd(x, compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    # near U V^T: the mean cosine with its directions
    assert np.sum(np.asarray(x) * (u @ vt)) / np.prod(values.shape) > 0.8


def test_muon_takes_the_matrices_of_blocks_alone():
  definition = define(gpt(32, 2, 2, context_length=32, vocab_size=264))
  taken = {n.rsplit('.', 2)[-2] for n, i in definition.info.items() if Muon().orthogonalized(i)}
  assert taken == {'q', 'k', 'v', 'o', 'up', 'down'}
  params = tree(0)
  o = Optimizer(
    Muon(learning_rate=1.0, adam_learning_rate=1e-3, weight_decay=0.0, clip=None),
    Constant(warmup=0),
    10,
    INFO,
  )
  moved, _, _ = o.update(tree(1), o.init(params), params, 0)
  # Adam's first step: the sign
  np.testing.assert_allclose(jnp.abs(moved['embedding'] - params['embedding']), 1e-3, rtol=1e-2)
  rms = float(jnp.sqrt(jnp.mean(jnp.square(moved['w'] - params['w']))))
  assert 0.1 < rms < 0.3  # 0.2, as AdamW's


def test_adafactor_is_algorithm_4_of_its_paper():
  shape, threshold = (24, 40), 0.9
  config = Adafactor(factored_from=16, threshold=threshold)
  params = {'w': jnp.zeros(shape)}
  direction = config.direction({'w': info('embed', 'mlp', shape=shape)})
  state, R, C = direction.init(params), np.zeros(24), np.zeros(40)
  for t in range(1, 4):
    g = np.asarray(jax.random.normal(jax.random.key(t), shape))
    beta = 1 - t**-0.8
    R = beta * R + (1 - beta) * np.mean(g**2 + 1e-30, 1)
    C = beta * C + (1 - beta) * np.mean(g**2 + 1e-30, 0)
    u = g / np.sqrt(np.outer(R, C) / R.mean())
    out, state = direction.update({'w': g}, state, params)
    expected = u / max(1, np.sqrt(np.mean(u**2)) / threshold)
    np.testing.assert_allclose(out['w'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('config', ALL, ids=lambda c: c.tag)
def test_learns_and_its_state_is_divided_as_its_parameters(config, dataset):
  definition = define(gpt(32, 2, 2, context_length=32, vocab_size=264))
  parallel = make_parallel(MeshConfig(fsdp=2, tensor=2, data=1), jax.devices()[:4])
  o = Optimizer(config, Constant(warmup=2), 12, definition.info)
  batch = dataset.train_batch(0, 8, 0)
  with use_mesh(parallel):
    state = init_state(definition, o, 0, parallel)
    where = {n: p.sharding for n, p in state.params.items()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
      name = next(
        (k.key for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in where), None
      )
      if name is not None and leaf.shape == state.params[name].shape:
        assert leaf.sharding == where[name], path
    step = compiled_train_step(definition, o, TrainingConfig(dtype='float32'), parallel)
    losses = []
    for _ in range(12):
      state, metrics = step(state, batch)
      losses.append(float(metrics['train/loss']))
  assert losses[0] == pytest.approx(np.log(264), abs=0.1)
  assert losses[-1] < losses[0] - 0.7


def test_bad_values_are_refused():
  with pytest.raises(InputError, match=r'AdamW\.learning_rate'):
    AdamW(learning_rate=0.0)
  with pytest.raises(InputError, match=r'Muon\.scale'):
    Muon(scale='adm')


def steps_of(config, grads):
  """The parameters after each update by some gradients."""
  o, params = Optimizer(config, Constant(warmup=0), len(grads), INFO), tree(0)
  state, found = o.init(params), []
  for step, g in enumerate(grads):
    params, state, _ = o.update(g, state, params, step)
    found.append(params)
  return found


@pytest.mark.parametrize(
  ('config', 'theirs'),
  [
    (SGD(learning_rate=0.1), optax.sgd(0.1)),
    (SGD(learning_rate=0.1, momentum=0.9), optax.sgd(0.1, 0.9)),
    (Adadelta(learning_rate=0.5), optax.adadelta(0.5, rho=0.95, eps=1e-6)),
  ],
)
def test_plain_optimizers_are_those_of_optax(config, theirs):
  config, grads = config.replace(clip=None), [tree(k) for k in range(1, 5)]
  params, state = tree(0), theirs.init(tree(0))
  for found, g in zip(steps_of(config, grads), grads, strict=True):
    updates, state = theirs.update(g, state, params)
    params = optax.apply_updates(params, updates)
    for name in ('embedding', 'w', 'scale'):  # of a full rate
      np.testing.assert_allclose(found[name], params[name], rtol=1e-5, atol=1e-7)


def test_adam_then_sgd_is_one_and_then_the_other():
  grads = [tree(k) for k in range(1, 6)]
  both = AdamThenSGD(learning_rate=0.3, adam_learning_rate=0.02, adam_steps=3, clip=None)
  adam = AdamW(learning_rate=0.02, beta2=0.999, weight_decay=0.0, clip=None)
  found, first = steps_of(both, grads), steps_of(adam, grads[:3])
  for got, wanted in zip(found, first):
    for name in INFO:
      np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-7)
  for name, i in INFO.items():
    wanted = found[2][name] - 0.3 * i.lr_scale * (grads[3][name] + grads[4][name])
    np.testing.assert_allclose(found[4][name], wanted, rtol=1e-5, atol=1e-6)
