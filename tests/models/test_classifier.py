"""A classifier: what it computes, and that padding computes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.data import Batch
from jaxformer.evaluation import evaluate
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import Alibi, LearnedPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.classifier import Classifier
from jaxformer.models.embedder import LinearInput, TokenInput
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.planning.cost import cost

pytestmark = pytest.mark.quick
T, CLASSES = 12, 5
LENGTHS = np.array([12, 1, 7, 4])


def classifier(input_, causal, pooling, **settings):
  layers = Attention.Config(heads=2, causal=causal, position=Alibi()), Mlp.Config(hidden=24)
  block = Block.Config(branches=tuple(PreNorm(layer=layer, norm=LayerNorm()) for layer in layers))
  return Classifier.Config(
    input=input_,
    classes=CLASSES,
    width=16,
    context_length=T,
    stack=(Group(pattern=(block,), repeats=2),),
    pooling=pooling,
    **settings,
  )


CONFIGS = {
  'tokens in both directions': classifier(TokenInput(vocab_size=9), False, 'mean'),
  'numbers from the left': classifier(
    LinearInput.Config(features=3), True, 'last', positions=LearnedPositions()
  ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def case(request):
  """A definition, parameters away from their initial values, and sequences of unequal lengths with
  what pads them."""
  definition = define(request.param)
  params = definition.init(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), len(params))
  params = {
    n: p + 0.1 * jax.random.normal(k, p.shape)
    for k, (n, p) in zip(keys, params.items(), strict=True)
  }
  return definition, params, padded(request.param, seed=0)


def padded(config, seed):
  """A batch whose sequences are always the same, and whose padding depends on the seed."""
  rng, noise = np.random.default_rng(7), np.random.default_rng(seed)
  inside = np.arange(T)[None] < LENGTHS[:, None]
  targets = np.full((4, T), -1, np.int32)
  targets[np.arange(4), LENGTHS - 1] = [3, 0, 4, 3]
  if config.task.features is None:
    tokens = np.where(inside, rng.integers(0, 9, (4, T)), noise.integers(0, 9, (4, T)))
    return Batch(tokens.astype(np.int32), targets, inside.astype(np.int32))
  values = np.where(inside[:, :, None], rng.normal(size=(4, T, 3)), noise.normal(size=(4, T, 3)))
  return Batch(values.astype(np.float32), targets, inside.astype(np.int32))


def test_padding_changes_nothing(case):
  definition, params, batch = case
  logits = jax.jit(lambda p, b: definition.merge(p)(b))
  together = logits(params, batch)
  np.testing.assert_array_equal(together, logits(params, padded(definition.config, seed=1)))
  for i, length in enumerate(LENGTHS):
    alone = Batch(batch.inputs[i : i + 1, :length], batch.targets_BT[i : i + 1, :length], None)
    np.testing.assert_allclose(logits(params, alone)[0], together[i], rtol=1e-5, atol=1e-5)
  # it would, if it were read
  assert not np.allclose(together, logits(params, batch._replace(segments_BT=None)), atol=1e-3)


def test_loss_scores_and_evaluation_are_those_of_the_logits(case):
  definition, params, batch = case
  # a row that does not count
  batch = batch._replace(targets_BT=np.where(np.arange(4)[:, None] == 1, -1, batch.targets_BT))
  run = jax.jit(lambda p: (definition.merge(p)(batch), *definition.merge(p).scores(batch)))
  logits, scores, hit = run(params)
  logits = np.asarray(logits, np.float64)
  lse = np.log(np.exp(logits).sum(-1))
  rows, labels = np.array([0, 2, 3]), np.array([3, 4, 3])
  nll, hits = lse[rows] - logits[rows, labels], logits[rows].argmax(-1) == labels
  sums, aux = jax.jit(lambda p: definition.merge(p).loss(batch, z_loss=0.1))(params)
  np.testing.assert_allclose(
    sums, (nll.sum() + 0.1 * np.square(lse[rows]).sum(), nll.sum(), 3), rtol=1e-5
  )
  assert float(aux['accuracy']) == pytest.approx(hits.mean())
  np.testing.assert_allclose(np.asarray(scores)[rows, LENGTHS[rows] - 1], nll, rtol=1e-5)
  assert np.count_nonzero(scores) == 3
  assert np.asarray(hit).sum() == hits.sum()
  result = evaluate(definition, params, [batch])
  np.testing.assert_allclose(
    (result.nll_sum, result.count, result.accuracy), (nll.sum(), 3, hits.mean()), rtol=1e-5
  )


def test_evaluation_refuses_what_does_not_fit(case):
  definition, params, batch = case
  with pytest.raises(
    InputError, match=r'targets from -1 to 5: must be below the number of classes of 5'
  ):
    evaluate(
      definition, params, [batch._replace(targets_BT=np.where(batch.targets_BT >= 0, 5, -1))]
    )
  if definition.config.task.features is None:
    with pytest.raises(InputError, match=r'tokens from .* must be below the vocabulary of 9'):
      evaluate(definition, params, [batch._replace(inputs=batch.inputs + 4)])


def test_cost(case):
  definition, _, _ = case
  c, config = cost(definition.config), definition.config
  matrices = 2 * (4 * 16 * 16 + 2 * 16 * 24) + (3 * 16 if config.task.features else 0)
  seen = (T + 1) / 2 if config.task.features else T
  assert c.decode_state_bytes is None
  assert c.forward_flops_per_token == pytest.approx(
    2 * matrices + 2 * 4 * 16 * seen + 2 * 16 * CLASSES / T
  )
  head, norms = 16 * CLASSES + CLASSES, 5 * 2 * 16
  inputs = 3 * 16 + 16 + T * 16 if config.task.features else 9 * 16
  assert c.params == 2 * (4 * 16 * 16 + 2 * 16 * 24) + inputs + norms + head


def test_settings():
  for change, message in (({'classes': 1}, 'classes = 1'), ({'width': 0}, 'width = 0')):
    with pytest.raises(InputError, match=message):
      CONFIGS['tokens in both directions'].replace(**change)
  with pytest.raises(InputError, match='vocab_size = 0'):
    TokenInput(vocab_size=0)
  with pytest.raises(InputError, match='features = 0'):
    LinearInput.Config(features=0)


def test_gradients_do_not_reach_the_padding():
  definition = define(CONFIGS['numbers from the left'])
  params, batch = definition.init(jax.random.key(0)), padded(definition.config, seed=0)

  def loss(x):
    return definition.merge(params).loss(batch._replace(inputs=x))[0].loss

  slope = jax.jit(jax.grad(loss))(jnp.asarray(batch.inputs))
  np.testing.assert_array_equal(np.abs(slope).sum(-1) > 0, batch.segments_BT == 1)
