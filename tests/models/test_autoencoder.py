"""An autoencoder: what it computes, and that nothing passes but by the last position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments.mad_autoencoder import Autoencoder, autoencoder
from jaxformer.config import InputError
from jaxformer.data import Batch
from jaxformer.evaluation import evaluate
from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import Context
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import Alibi, LearnedPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.models.zoo.gpt import gpt
from jaxformer.planning.cost import cost
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, use_mesh

pytestmark = pytest.mark.quick
B, T, D, V = 8, 6, 8, 8


def config(*layers, **settings):
  block = Block.Config(branches=tuple(PreNorm(layer=layer, norm=LayerNorm()) for layer in layers))
  return Autoencoder.Config(
    vocab_size=V,
    width=D,
    context_length=T,
    stack=(Group(pattern=(block,), repeats=2),),
    norm=LayerNorm(),
    **settings,
  )


MIXING = config(
  Attention.Config(heads=2, position=Alibi()), Mlp.Config(hidden=12), positions=LearnedPositions()
)
APART = config(Mlp.Config(hidden=12))  # nothing passes from one position to another


def made(config):
  definition = define(config)
  params = definition.init(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), len(params))
  return definition, {
    n: p + 0.3 * jax.random.normal(k, p.shape)
    for k, (n, p) in zip(keys, params.items(), strict=True)
  }


def batch_of(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
  return Batch(tokens, tokens.copy(), None)


def test_only_the_last_position_is_read():
  batch, other = batch_of(), batch_of(1)
  other = other._replace(
    inputs=np.concatenate([other.inputs[:, :-1], batch.inputs[:, -1:]], axis=1)
  )
  for each, same in ((APART, True), (MIXING, False)):
    definition, params = made(each)
    logits = jax.jit(lambda p, b, d=definition: d.merge(p)(b))
    assert np.array_equal(logits(params, batch), logits(params, other)) == same
    # the place asked for counts
    assert not np.allclose(logits(params, batch)[:, 0], logits(params, batch)[:, 1])


def test_the_decoder():
  definition, params = made(APART)
  batch, p = batch_of(), {n: np.asarray(v, np.float64) for n, v in params.items()}

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return (
      x / np.sqrt((x**2).mean(-1, keepdims=True) + LayerNorm().eps) * p[f'{name}.scale']
      + p[f'{name}.bias']
    )

  def gelu(x):
    return x * special.ndtr(x)

  @jax.jit
  def run(params):
    model = definition.merge(params)
    return model.stack(model.embedder.input(batch.inputs), Context()).y, model(batch)

  z, logits = map(np.asarray, run(params))
  z = z[:, -1]
  place = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
  y = z[:, None] + np.stack([np.sin(place), np.cos(place)], axis=-1).reshape(1, T, D)
  for i in (1, 2):
    y = gelu(norm(y, f'norm_{i}') @ p[f'dense_{i}.kernel'] + p[f'dense_{i}.bias'])
  want = norm(y, 'norm_3') @ p['head.kernel'] + p['head.bias']
  np.testing.assert_allclose(logits, want, rtol=2e-5, atol=2e-5)


def test_loss_scores_and_evaluation_are_those_of_the_logits():
  definition, params = made(MIXING)
  batch = batch_of()
  batch.targets_BT[1, 2:] = -1
  run = jax.jit(lambda p: (definition.merge(p)(batch), *definition.merge(p).scores(batch)))
  logits, scores, hit = run(params)
  logits, counted = np.asarray(logits, np.float64), batch.targets_BT != -1
  lse = special.logsumexp(logits, axis=-1)
  nll = np.where(
    counted,
    lse - np.take_along_axis(logits, np.maximum(batch.targets_BT, 0)[..., None], axis=-1)[..., 0],
    0,
  )
  sums, aux = jax.jit(lambda p: definition.merge(p).loss(batch, z_loss=0.1))(params)
  np.testing.assert_allclose(
    sums, (nll.sum() + 0.1 * np.square(lse[counted]).sum(), nll.sum(), 44), rtol=1e-5
  )
  assert aux == {}
  np.testing.assert_allclose(scores, nll, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(hit, (logits.argmax(-1) == batch.targets_BT) & counted)
  result = evaluate(definition, params, [batch])
  np.testing.assert_allclose(
    (result.nll_sum, result.count, result.correct), (nll.sum(), 44, hit.sum()), rtol=1e-5
  )


@pytest.mark.parametrize('mesh', [MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2)])
def test_sharded_equals_unsharded(mesh):
  definition, params = made(MIXING)
  batch = batch_of()

  def loss(params, tokens, targets):
    sums, _ = definition.merge(params).loss(Batch(tokens, targets, None), Context(unroll=False))
    return sums.loss / sums.count

  want = jax.jit(jax.value_and_grad(loss))(params, batch.inputs, batch.targets_BT)
  devices = make_mesh(mesh)
  placed = jax.device_put(params, definition.shardings(Parallel(devices, mesh.rules)))
  rows = [
    jax.device_put(a, Parallel(devices, mesh.rules).batch) for a in (batch.inputs, batch.targets_BT)
  ]
  with use_mesh(Parallel(devices, mesh.rules)):
    got = jax.jit(jax.value_and_grad(loss))(placed, *rows)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_bfloat16_is_near():
  definition, params = made(MIXING)
  batch = batch_of()
  loss = jax.jit(lambda p: definition.merge(p).loss(batch)[0].loss / batch.targets_BT.size)
  assert float(loss(definition.cast(params, jnp.bfloat16))) == pytest.approx(
    float(loss(params)), rel=0.03
  )


def test_cost_and_settings():
  c = cost(MIXING)
  layers, decoder = 2 * (4 * D * D + 2 * D * 12), 2 * D * D + D * V
  assert c.decode_state_bytes is None
  assert c.forward_flops_per_token == pytest.approx(
    2 * (layers + decoder) + 2 * 4 * D * (T + 1) / 2
  )
  assert MIXING.max_len == T
  assert APART.max_len is None
  with pytest.raises(InputError, match='width = 0'):
    APART.replace(width=0)


def test_the_autoencoder_of_a_language_model():
  model = gpt(32, 2, 4, context_length=16, vocab_size=20)
  made_of = autoencoder(model)
  assert (made_of.stack, made_of.width, made_of.positions, made_of.vocab_size) == (
    model.stack,
    32,
    model.positions,
    20,
  )
  assert made_of.norm == model.final_norm
  define(made_of)
