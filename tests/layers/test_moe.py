"""What mixtures of experts do beside the layer contract: what they refuse, show, drop, and learn to
balance."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.data import Batch
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.mlp import GatedMlp, Mlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.router import (
  BiasBalanced,
  ExpertChoice,
  NoisyTopK,
  SigmoidTopK,
  SoftmaxTopK,
  TopKSoftmax,
)
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.ops.routing import BIAS_GRADIENT
from jaxformer.training.experiment import TrainingConfig
from jaxformer.training.optimizer import AdamW, Optimizer
from jaxformer.training.schedule import Constant
from jaxformer.training.step import TrainState, over_layers, train_step

pytestmark = pytest.mark.quick
D, E = 16, 4
EXPERT = GatedMlp.Config(hidden=8)


def run(config, x, ctx=Context(), **values):
  layer = config.build(x.shape[-1], nnx.Rngs(0), LayerPosition())
  for name, value in values.items():
    getattr(layer.router, name)[...] = value
  return layer(x, ctx)


def inputs(B=2, T=8):
  return jax.random.normal(jax.random.key(1), (B, T, D))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'experts': 1}, 'Moe.experts = 1: must be at least 2'),
    ({'router': TopKSoftmax(k=5)}, 'TopKSoftmax.k = 5: must be at most the number of experts, 4'),
    ({'router': NoisyTopK(k=4)}, 'NoisyTopK.k = 4: must be below the number of experts, 4'),
    ({'router': ExpertChoice(choices=5.0)}, 'ExpertChoice.choices = 5.0: must be at most'),
    (
      {'router': ExpertChoice(), 'capacity_factor': 1.0},
      'Moe.capacity_factor = 1.0: must be none: experts that choose fill their own slots',
    ),
    ({'capacity_factor': 0.0}, 'Moe.capacity_factor = 0.0: must be positive'),
    ({'expert': Mlp.Config(dropout=0.1)}, 'Moe.expert.dropout = 0.1'),
  ],
)
def test_settings_that_do_not_fit(change, message):
  with pytest.raises(InputError, match=message):
    Moe.Config(**{'experts': E, **change})


def test_routers_refuse_settings_without_effect():
  with pytest.raises(
    InputError, match='k = 1: must be at least 2: the weight of a single expert would always be 1'
  ):
    TopKSoftmax(k=1)
  with pytest.raises(
    InputError, match=r'balance = 0\.1: must be none: experts that choose are always balanced'
  ):
    ExpertChoice(balance=0.1)
  with pytest.raises(InputError, match=r'z_loss = 0\.0: must be positive, or none'):
    SoftmaxTopK(z_loss=0.0)


LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))  # of a token whose channels are 1, 0, 0, ...


@pytest.mark.parametrize(
  ('router', 'experts', 'weights'),
  [
    (TopKSoftmax(), [0, 1], [4 / 7, 3 / 7]),
    (SoftmaxTopK(), [0, 1], [0.4, 0.3]),
    (SoftmaxTopK(k=1), [0], [0.4]),
    (SigmoidTopK(k=2), [0, 1], [0.4 / 1.4, 0.3 / 1.3]),
    (NoisyTopK(k=3), [0, 1, 2], [4 / 9, 3 / 9, 2 / 9]),
    (
      BiasBalanced(scale=2.5),
      [0, 1],
      [2.5 * (4 / 14) / (4 / 14 + 3 / 13), 2.5 * (3 / 13) / (4 / 14 + 3 / 13)],
    ),
  ],
  ids=lambda v: getattr(v, 'tag', ''),
)
def test_choices_and_weights(router, experts, weights):
  """Probabilities 0.4, 0.3, 0.2, 0.1: renormalised over the chosen (Mixtral, Shazeer) or not
  (Jamba, Switch); sigmoids p / (1 + p)."""
  built = router.build(D, E, nnx.Rngs(0), LayerPosition())
  built.kernel[...] = jnp.zeros((D, E)).at[0].set(LOGITS)
  choice = built(jnp.zeros((1, 1, D)).at[..., 0].set(1.0), Context())
  np.testing.assert_array_equal(choice.index[0, 0], experts)
  np.testing.assert_allclose(choice.weight[0, 0], weights, rtol=1e-5)


def test_a_bias_changes_the_choice_and_not_the_weights():
  built = BiasBalanced().build(D, E, nnx.Rngs(0), LayerPosition())
  built.kernel[...] = jnp.zeros((D, E)).at[0].set(LOGITS)
  built.bias[...] = jnp.array([-1.0, 0.0, 0.0, 0.0])
  choice = built(jnp.zeros((1, 1, D)).at[..., 0].set(1.0), Context())
  np.testing.assert_array_equal(choice.index[0, 0], [1, 2])
  np.testing.assert_allclose(
    choice.weight[0, 0], np.array([3 / 13, 2 / 12]) / (3 / 13 + 2 / 12), rtol=1e-5
  )


def test_a_bias_on_the_logits_changes_both():
  built = TopKSoftmax(logit_bias=True).build(D, E, nnx.Rngs(0), LayerPosition())
  built.kernel[...] = jnp.zeros((D, E)).at[0].set(LOGITS)
  built.logit_bias[...] = jnp.log(jnp.array([0.1, 1.0, 1.0, 1.0]))
  choice = built(jnp.zeros((1, 1, D)).at[..., 0].set(1.0), Context())
  np.testing.assert_array_equal(choice.index[0, 0], [1, 2])
  np.testing.assert_allclose(choice.weight[0, 0], [3 / 5, 2 / 5], rtol=1e-5)


def test_noise_and_jitter_need_a_key():
  x, keys = inputs(), [Context(dropout_key=jax.random.key(i)) for i in (1, 2)]
  for router, values in ((NoisyTopK(k=2), {}), (SoftmaxTopK(k=1, jitter=0.1), {})):
    config = Moe.Config(experts=E, expert=EXPERT, router=router)
    calm, *wild = (np.asarray(run(config, x, ctx, **values).y) for ctx in (Context(), *keys))
    assert np.abs(wild[0] - wild[1]).max() > 0
    np.testing.assert_array_equal(calm, run(config, x, Context(), **values).y)


def test_experts_that_choose_take_their_most_probable_tokens():
  """Two choices of eight tokens by four experts: four slots each; the weight is the
  probability."""
  x = inputs(1, 8)
  built = ExpertChoice(choices=2.0).build(D, E, nnx.Rngs(0), LayerPosition())
  chosen = built(x, Context())
  assert chosen.index.shape == (1, E, 4)
  p = np.asarray(jax.nn.softmax(built.logits(x), axis=-1))[0]
  for e in range(E):
    np.testing.assert_array_equal(np.sort(chosen.index[0, e]), np.sort(np.argsort(-p[:, e])[:4]))
    np.testing.assert_allclose(np.sort(chosen.weight[0, e]), np.sort(p[:, e])[4:], rtol=1e-6)
  config = Moe.Config(experts=E, router=ExpertChoice())
  assert not config.decodes
  block = Block.Config(branches=(PreNorm(layer=config),))
  model = LanguageModel.Config(
    vocab_size=8, width=D, context_length=8, stack=(Group(pattern=(block,)),)
  )
  with pytest.raises(
    InputError, match='Moe: reads tokens ahead of its output, so it cannot decode'
  ):
    model.build(nnx.Rngs(0)).init_state(1, 8)


def test_capacity_drops_what_it_says():
  """A router without preference sends all tokens to the first two of four experts: of C = ceil(1.25
  x 8 x 2 / 4) = 5 slots each, five of eight tokens keep both and three lose both; the last three
  rows are zeros."""
  config = Moe.Config(experts=E, expert=EXPERT, capacity_factor=1.25)
  out = run(config, inputs(), kernel=jnp.zeros((D, E)))
  assert float(out.aux['moe/dropped']) == pytest.approx(3 / 8)
  assert np.abs(np.asarray(out.y[:, :5])).min(axis=-1).max() > 0
  assert np.abs(np.asarray(out.y[:, 5:])).max() == 0
  whole = run(config.replace(capacity_factor=None), inputs(), kernel=jnp.zeros((D, E))).y
  np.testing.assert_allclose(out.y[:, :5], whole[:, :5], rtol=1e-4, atol=1e-6)


# ---- in a model --------------------------------------------------------------------------------


def model(router, layers=3, experts=8):
  moe = Moe.Config(experts=experts, expert=GatedMlp.Config(hidden=16), router=router)
  block = Block.Config(branches=(PreNorm(layer=moe),))
  return LanguageModel.Config(
    vocab_size=32, width=D, context_length=16, stack=(Group(pattern=(block,), repeats=layers),)
  )


def batch(seed=0, B=8, T=16):
  tokens = jax.random.randint(jax.random.key(seed), (B, T + 1), 0, 32)
  return types.SimpleNamespace(inputs=tokens[:, :-1], targets_BT=tokens[:, 1:], segments_BT=None)


@pytest.mark.parametrize('unroll', [False, True])
def test_a_router_that_collapses_is_visible(unroll):
  """Router 1 of three sends all tokens to the same two of eight experts: its own entry says so, and
  so does the log."""
  definition = define(model(TopKSoftmax(balance=0.01)))
  params = definition.init(jax.random.key(0))
  (name,) = (n for n in params if n.endswith('router.kernel'))
  params[name] = params[name].at[1].set(0.0)
  _, aux = jax.jit(lambda p: definition.merge(p).loss(batch(), Context(unroll=unroll)))(params)
  ratio = aux['moe/load_ratio']
  assert ratio.shape == (3,)
  assert float(ratio[1]) == pytest.approx(8 / 2)
  assert max(float(ratio[0]), float(ratio[2])) < 3
  assert aux['loss/balance'].shape == ()
  log = over_layers(aux)
  assert float(log['moe/load_ratio_max']) == pytest.approx(4)
  assert float(log['moe/load_ratio_min']) < 3
  assert float(log['moe/router_logits_min']) == 0
  assert len(log) == 1 + 3 * 3


def load_balancing_loss(logits_LNE, k):
  """`load_balancing_loss_func` of transformers (src/transformers/models/mixtral/modular_mixtral.py,
  commit 008f5c8) in numpy, and its gradient with respect to the logits: f and P are means over the
  tokens of all layers, the loss is E sum_e f_e P_e."""
  logits = np.concatenate(logits_LNE).astype(np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  chosen = np.argsort(-p, axis=-1)[:, :k]
  one_hot = chosen[..., None] == np.arange(logits.shape[-1])
  f = one_hot.mean(0).sum(0)
  gradient = p * (f - (p * f).sum(-1, keepdims=True)) * (logits.shape[-1] / len(p))
  return logits.shape[-1] * np.sum(f * p.mean(0)), gradient.reshape(np.shape(logits_LNE))


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('router', [TopKSoftmax(), SoftmaxTopK()])
def test_the_pooled_balancing_loss_is_that_of_transformers(router, unroll):
  """Two layers with different routers, whose experts return zero so that both read the same: value
  and gradient of the one loss, which is neither the sum nor the mean of the losses of the layers,
  and no larger with more layers."""
  weight = 0.3
  definition = define(model(router.replace(pooled_balance=weight), layers=2))
  params = definition.init(jax.random.key(0))
  (name,) = (n for n in params if n.endswith('router.kernel'))
  (down,) = (n for n in params if n.endswith('expert_down.kernel'))
  params[name] = 2.0 * jax.random.normal(jax.random.key(3), params[name].shape)
  params[down] = jnp.zeros_like(params[down])

  def loss(kernel_LDE):
    m = definition.merge(params | {name: kernel_LDE})
    return m.loss(batch(), Context(unroll=unroll))[1]['loss/balance']

  value, gradient = jax.jit(jax.value_and_grad(loss))(params[name])
  x = np.asarray(params['embedder.input.table'], np.float64)[np.asarray(batch().inputs)]
  x = x.reshape(-1, D)
  x /= np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)  # the norm before each layer
  logits = [x @ np.asarray(w, np.float64) for w in params[name]]
  expected, by_logits = load_balancing_loss(logits, 2)
  assert float(value) == pytest.approx(weight * expected, rel=1e-5)
  np.testing.assert_allclose(gradient, [weight * x.T @ g for g in by_logits], rtol=1e-4, atol=1e-6)
  alone = [load_balancing_loss(l[None], 2)[0] for l in logits]
  assert abs(expected - sum(alone)) > 1
  assert abs(expected - np.mean(alone)) > 0.01


def test_a_pooled_loss_does_not_grow_with_depth():
  """All routers at zero choose the same two of eight experts: 8 x 2 / 8, whatever the depth, where
  the losses of single layers add up."""
  for layers in (1, 3):
    definition = define(model(TopKSoftmax(pooled_balance=0.1, balance=0.1), layers=layers))
    params = definition.init(jax.random.key(0))
    params = {n: jnp.zeros_like(p) if 'router' in n else p for n, p in params.items()}
    aux = jax.jit(lambda p, d=definition: d.merge(p).loss(batch())[1])(params)
    assert float(aux['loss/balance']) == pytest.approx(0.1 * 2 * (1 + layers), rel=1e-5)
    assert not [name for name in aux if name.startswith('pooled/')]


def trained(router, steps, rate=0.02, accumulate=1):
  """Load ratios of a mixture whose router begins collapsed, over training steps of the loop's own
  function."""
  definition = define(model(router, layers=1, experts=4))
  optimizer = Optimizer(AdamW(learning_rate=rate), Constant(), steps, definition.info)
  params = definition.init(jax.random.key(0))
  (bias,) = (n for n in params if n.endswith('router.bias'))
  params[bias] = jnp.array([0.3, 0.3, 0.0, 0.0])  # the sigmoids are all near a half
  state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(1))
  config = TrainingConfig(dtype='float32', accumulate=accumulate)
  fixed = batch(B=16)

  @jax.jit
  def step(state):
    return train_step(
      definition, optimizer, config, state, Batch(fixed.inputs, fixed.targets_BT, None)
    )

  ratios, norms = [], []
  for _ in range(steps):
    state, metrics = step(state)
    ratios.append(float(metrics['train/moe/load_ratio']))
    norms.append(float(metrics['train/grad_norm']))
  return ratios, norms


@pytest.mark.parametrize('accumulate', [1, 2])
def test_biases_balance_without_a_loss(accumulate):
  """All tokens begin at two of four experts (a ratio of 2); the optimizer's own steps on the biases
  bring them to all. Without them nothing does."""
  ratios, norms = trained(BiasBalanced(), 80, accumulate=accumulate)
  assert ratios[0] == pytest.approx(2)
  assert np.mean(ratios[-20:]) < 1.35
  assert np.all(np.isfinite(norms))


def test_without_moving_biases_nothing_balances():
  ratios, _ = trained(BiasBalanced(bias_rate=1e-6), 80)
  assert np.mean(ratios[-20:]) > 1.8


def test_biases_leave_the_gradient_norm_to_the_loss():
  definition = define(model(BiasBalanced()))
  params = definition.init(jax.random.key(0))

  def loss(params):
    sums, _ = definition.merge(params).loss(batch())
    return sums.loss / sums.count

  gradients = jax.jit(jax.grad(loss))(params)
  (bias,) = (n for n in params if n.endswith('router.bias'))
  assert set(np.unique(np.abs(np.asarray(gradients[bias])))) <= {
    np.float32(0),
    np.float32(BIAS_GRADIENT),
  }
  squares = {n: float(jnp.sum(jnp.square(g))) for n, g in gradients.items()}
  assert squares[bias] < 1e-4 * sum(squares.values())
