"""Losses against sums written out, whatever the batches, the mesh or the dtype."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.evaluation import bits_per_byte, evaluate, loss_by_position
from jaxformer.layers.init import Zeros
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.sharding import MeshConfig, Parallel, make_mesh
from jaxformer.task_type import Batch
from tests.inference.models import CONFIGS, model

T = 24


class Rows(Batch):
  def rows(self, i, j):
    return Rows(*(a if a is None else a[i:j] for a in self))


def data(rows=7, packed=True, length=T, vocab=32):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
  targets = np.where(rng.random((rows, length)) < 0.2, -1, tokens[:, 1:]).astype(np.int32)
  segments = np.cumsum(rng.random((rows, length)) < 0.15, axis=1, dtype=np.int32) + 1
  return Rows(tokens[:, :-1], targets, segments if packed else None)


def naive(definition, params, batch):
  """nll of every position, float64, document by document."""
  forward = jax.jit(lambda p, t: definition.merge(p)(t).y)
  nll, positions = np.zeros(batch.inputs.shape), np.zeros(batch.inputs.shape, int)
  for b, row in enumerate(batch.inputs):
    segments = np.ones(len(row)) if batch.segments_BT is None else batch.segments_BT[b]
    for s in np.unique(segments):
      here = np.flatnonzero(segments == s)
      padded = np.zeros((1, len(row)), np.int32)
      padded[0, : len(here)] = row[here]
      logits = np.asarray(forward(params, padded), np.float64)[0, : len(here)]
      lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
      nll[b, here] = lse - logits[np.arange(len(here)), np.maximum(batch.targets_BT[b, here], 0)]
      positions[b, here] = np.arange(len(here))
  return nll, positions


@pytest.mark.quick
@pytest.mark.parametrize('packed', [False, True], ids=['whole rows', 'packed'])
def test_sums_are_exact_whatever_the_batches(packed):
  definition, params = model('grouped')
  batch = data(packed=packed)
  nll, _ = naive(definition, params, batch)
  counted = batch.targets_BT >= 0
  for size in (7, 3):
    token_bytes_V = np.arange(definition.config.vocab_size) % 4
    result = evaluate(
      definition,
      params,
      (batch.rows(i, i + size) for i in range(0, 7, size)),
      token_bytes_V=token_bytes_V,
    )
    assert result.bytes == token_bytes_V[batch.targets_BT[counted]].sum()
    assert result.count == counted.sum()
    np.testing.assert_allclose(result.nll_sum, nll[counted].sum(), rtol=2e-6)
    assert result.loss == result.nll_sum / result.count
    assert result.bits_per_byte == pytest.approx(result.nll_sum / math.log(2) / result.bytes)
    assert result.perplexity == math.exp(result.loss)


@pytest.mark.quick
def test_agrees_with_the_training_loss():
  """Also with a head that is biased, capped and tied."""
  config = CONFIGS['alibi'].replace(head_bias=Zeros(), softcap=5.0, tied=True)
  definition, batch = define(config), data()
  params = {
    k: v + 0.3 * jax.random.normal(jax.random.key(2), v.shape)
    for k, v in definition.init(jax.random.key(0)).items()
  }
  sums, _ = jax.jit(lambda p: definition.merge(p).loss(batch))(params)
  result = evaluate(definition, params, [batch])
  np.testing.assert_allclose(result.nll_sum, sums.nll, rtol=2e-6)


@pytest.mark.parametrize('axes', [{'fsdp': 4, 'tensor': 2}, {'data': 8}], ids=str)
def test_sharded_equals_one_device(axes):
  definition, params = model('grouped')
  mesh = make_mesh(MeshConfig(**{'data': 1} | axes))
  placed = jax.device_put(params, definition.shardings(Parallel(mesh)))
  batch = data()  # 7 rows divide nothing
  one, many = (
    evaluate(definition, params, [batch]),
    evaluate(definition, placed, [batch.rows(0, 4), batch.rows(4, 7)], parallel=Parallel(mesh)),
  )
  np.testing.assert_allclose(many.nll_sum, one.nll_sum, rtol=2e-6)
  assert many.count == one.count


@pytest.mark.quick
@pytest.mark.parametrize('packed', [False, True], ids=['whole rows', 'packed'])
def test_loss_by_position(packed):
  definition, params = model('grouped')
  batch = data(packed=packed)
  nll, positions = naive(definition, params, batch)
  counted = batch.targets_BT >= 0
  result = loss_by_position(definition, params, [batch.rows(0, 4), batch.rows(4, 7)])
  for t in range(T):
    here = counted & (positions == t)
    if not here.any():
      assert t >= len(result) or result[t] is None
    else:
      assert result[t].count == here.sum()
      np.testing.assert_allclose(result[t].nll_sum, nll[here].sum(), rtol=1e-5, atol=1e-5)
  total = evaluate(definition, params, [batch])
  np.testing.assert_allclose(sum(r.nll_sum for r in result if r), total.nll_sum, rtol=1e-6)
  assert sum(r.correct for r in result if r) == total.correct


@pytest.mark.quick
def test_beyond_the_training_length():
  definition, params = model('alibi')
  # its context is 64
  assert len(loss_by_position(definition, params, [data(rows=2, packed=False, length=80)])) == 80
  learned, params = model('gpt2-tiny')
  with pytest.raises(InputError, match=r'257.*256'):
    evaluate(learned, params, [data(rows=1, length=257)])


@pytest.mark.quick
def test_bf16_is_close():
  definition, params = model('grouped')
  definition, params = define(definition.config), definition.init(jax.random.key(0))
  low, full = (evaluate(definition, params, [data()], dtype=d).loss for d in (jnp.bfloat16, None))
  assert low != full
  np.testing.assert_allclose(low, full, rtol=5e-3)


@pytest.mark.quick
def test_an_untrained_model_knows_nothing():
  config: LanguageModel.Config = CONFIGS['grouped']
  definition = define(config)
  params = {k: 0 * v for k, v in definition.init(jax.random.key(0)).items()}
  np.testing.assert_allclose(evaluate(definition, params, [data()]).loss, math.log(32), rtol=1e-6)
  assert bits_per_byte(math.log(256), 1) == pytest.approx(8)


@pytest.mark.quick
def test_errors():
  definition, params = model('grouped')
  nothing = data()._replace(targets_BT=np.full((7, T), -1, np.int32))
  for call in (evaluate, loss_by_position):
    with pytest.raises(InputError, match='no target'):
      call(definition, params, [nothing])
    with pytest.raises(InputError, match='no target'):
      call(definition, params, [])
  with pytest.raises(InputError, match=r'tokens from 0 to 40.*32'):
    evaluate(definition, params, [data(vocab=41)])
  with pytest.raises(InputError, match='bytes = 0'):
    bits_per_byte(1.0, 0)
