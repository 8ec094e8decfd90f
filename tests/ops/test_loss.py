"""Both fast implementations of `cross_entropy` agree with the naive one: sums and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.ops.linear import linear
from jaxformer.ops.loss import CROSS_ENTROPY, cross_entropy, token_scores
from jaxformer.task_type import IGNORE
from tests.helpers import forced

quick = pytest.mark.quick
cross_entropy_naive = forced(cross_entropy, cross_entropy='naive')

B, T, D, V = 2, 13, 16, 205


def arrays(dtype=jnp.float32, w_dtype=None, bias=False, V=V, B=B, T=T):
  keys = jax.random.split(jax.random.key(0), 5)
  targets = jnp.where(
    jax.random.bernoulli(keys[3], 0.2, (B, T)), IGNORE, jax.random.randint(keys[2], (B, T), 0, V)
  )
  return {
    'x': jax.random.normal(keys[0], (B, T, D), dtype),
    'w': jax.random.normal(keys[1], (D, V), w_dtype or dtype),
    'bias': jax.random.normal(keys[4], (V,)) if bias else None,
  }, targets


def run(f, arrays, targets, **options):
  """Sums, and the gradients of three times the mean loss."""

  def mean(a):
    sums = f(a['x'], a['w'], targets, bias_V=a['bias'], **options)
    return 3.0 * sums.loss / jnp.maximum(sums.count, 1.0), sums

  (_, sums), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(arrays)
  return sums, gradients


def assert_same(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-2), (
      np.abs(a - b).max(),
      np.abs(b).max(),
    )


# 205 = 5 x 41
IMPLEMENTATIONS = [
  ('rows', 8),
  ('rows', None),
  ('vocabulary', 32),
  ('vocabulary', 41),
  ('vocabulary', None),
]


@quick
@pytest.mark.parametrize(('chosen', 'chunk'), IMPLEMENTATIONS)
@pytest.mark.parametrize(
  'options',
  [
    {},
    {'z_loss': 1e-2, 'softcap': 3.0},
    {'z_loss': 1e-2, 'label_smoothing': 0.1},
    {'max_logit_loss': 0.3},
    {'max_logit_loss': 0.3, 'z_loss': 1e-2, 'softcap': 3.0},
    {'logit_scale': 0.3, 'z_loss': 1e-2, 'max_logit_loss': 0.3, 'softcap': 3.0},
    {'logit_scale': 0.3, 'label_smoothing': 0.1},
  ],
  ids=[
    'plain',
    'z-loss-softcap',
    'smoothed',
    'max-logit',
    'max-logit-softcap',
    'scaled-softcap',
    'scaled-smoothed',
  ],
)
def test_agrees_with_naive(chosen, chunk, options):
  inputs, targets = arrays(bias=bool(options))
  got = run(forced(cross_entropy, cross_entropy=chosen), inputs, targets, chunk=chunk, **options)
  assert_same(got, run(cross_entropy_naive, inputs, targets, **options))


@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
@pytest.mark.parametrize('w_dtype', [jnp.bfloat16, jnp.float32])
def test_bf16(chosen, w_dtype):
  """x in bf16, W in bf16 or fp32: sums to fp32 rounding, gradients to a unit of bf16 (2^-8), where
  d logits is rounded."""
  inputs, targets = arrays(jnp.bfloat16, w_dtype)
  sums, gradients = run(forced(cross_entropy, cross_entropy=chosen), inputs, targets, chunk=32)
  want_sums, want = run(cross_entropy_naive, inputs, targets)
  assert_same(sums, want_sums)
  assert gradients['w'].dtype == w_dtype
  assert_same(gradients, want, 2**-7)


@quick
@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
def test_all_ignored(chosen):
  inputs, targets = arrays(bias=True)
  sums, gradients = run(
    forced(cross_entropy, cross_entropy=chosen), inputs, jnp.full_like(targets, IGNORE), z_loss=0.1
  )
  assert sums == (0.0, 0.0, 0.0)
  assert all((g == 0).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
def test_ignored_tokens_get_no_gradient(chosen):
  inputs, targets = arrays()
  dx = run(forced(cross_entropy, cross_entropy=chosen), inputs, targets, chunk=32)[1]['x']
  assert (np.asarray(dx == 0).all(-1) == np.asarray(targets == IGNORE)).all()


@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
def test_a_tied_table_gets_the_transposed_gradient(chosen):
  inputs, targets = arrays()

  def loss(table_VD):
    return forced(cross_entropy, cross_entropy=chosen)(
      inputs['x'], table_VD.T, targets, chunk=32, transposed=True
    ).loss

  want = jax.jit(jax.grad(lambda w: cross_entropy_naive(inputs['x'], w, targets).loss))(inputs['w'])
  assert_same(jax.jit(jax.grad(loss))(inputs['w'].T), want.T)


@pytest.mark.parametrize(('chosen', 'chunk'), IMPLEMENTATIONS)
def test_token_scores(chosen, chunk):
  inputs, targets = arrays(bias=True)
  top = jnp.argmax(linear(inputs['x'], inputs['w'], inputs['bias']), axis=-1)
  targets = jnp.where(
    (targets != IGNORE) & (jnp.arange(targets.shape[1]) % 3 == 0)[None], top, targets
  )
  score = jax.jit(
    lambda x, w, b: forced(token_scores, token_scores=chosen)(
      x, w, targets, bias_V=b, logit_scale=0.5, softcap=3.0, chunk=chunk
    )
  )
  nll, hit = score(*inputs.values())
  np.testing.assert_array_equal(hit, (targets == top) & (targets != IGNORE))
  assert 0 < hit.sum() < (targets != IGNORE).sum()
  for b, t in (0, 0), (1, 12), (1, 5):
    one = jnp.full_like(targets, IGNORE).at[b, t].set(targets[b, t])
    want = cross_entropy_naive(
      inputs['x'], inputs['w'], one, bias_V=inputs['bias'], logit_scale=0.5, softcap=3.0
    )
    np.testing.assert_allclose(nll[b, t], want.nll, rtol=1e-5, atol=1e-5)


@quick
@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
def test_value_alone_computes_no_gradient(chosen):
  """One matrix product a token when nothing is differentiated."""
  inputs, targets = arrays(V=256, T=16)
  op = forced(cross_entropy, cross_entropy=chosen)
  f = lambda x, w: op(x, w, targets, chunk=64).loss  # noqa: E731
  assert str(jax.make_jaxpr(f)(inputs['x'], inputs['w'])).count('dot_general') == 1


@pytest.mark.parametrize('chosen', ['rows', 'vocabulary'])
def test_no_array_of_all_logits(chosen):
  inputs, targets = arrays(V=2048, B=4, T=256)
  op = forced(cross_entropy, cross_entropy=chosen)
  f = lambda x, w: op(x, w, targets, chunk=128).loss  # noqa: E731
  assert '4,256,2048' not in str(
    jax.make_jaxpr(jax.grad(f, (0, 1)))(inputs['x'], inputs['w'])
  ).replace('1024,2048', '4,256,2048')


@quick
def test_choice(monkeypatch):
  x, small, large = (
    jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4, 4096, 2048), (2048, 8192), (2048, 128256))
  )
  cases = (
    ('cpu', large, 'rows'),
    ('tpu', small, 'rows'),
    ('tpu', large, 'vocabulary'),
    ('gpu', large, 'vocabulary'),
  )
  for platform, w, chosen in cases:
    monkeypatch.setattr(sharding, 'platform', lambda platform=platform: platform)
    assert CROSS_ENTROPY.choose(x, w) == chosen


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 (fake) devices')
@pytest.mark.parametrize(
  'mesh',
  [
    {'fsdp': 8},
    {'fsdp': 2, 'tensor': 4},
    {'data': 2, 'context': 2, 'tensor': 2},
    {'data': 8, 'rules': 'data_parallel'},
  ],
  ids=str,
)
def test_sharded_agrees_with_unsharded(mesh):
  inputs, targets = arrays(bias=True, B=8, T=16, V=208)
  want = run(cross_entropy_naive, inputs, targets, z_loss=1e-2)
  config = sharding.MeshConfig(**{'data': 1} | mesh)
  with sharding.use_mesh(sharding.make_parallel(config)):
    assert CROSS_ENTROPY.choose(inputs['x'], inputs['w']) == 'vocabulary'
    assert_same(run(cross_entropy, inputs, targets, z_loss=1e-2), want)
    assert_same(run(cross_entropy, inputs, targets, z_loss=1e-2, chunk=20), want)


@quick
def test_the_loss_of_the_largest_logit_is_that_of_rwkv():
  """`L2Wrap.backward` (BlinkDL/RWKV-LM, RWKV-v5/src/model.py, commit 43045b7): beside that of the
  cross-entropy, 1e-4 / (B T) max_v l_v at the argmax of each token's logits, here written out for a
  weight of 1 in place of 1e-4, which fp32 shows better."""
  inputs, _ = arrays()
  targets = jnp.zeros((B, T), jnp.int32)

  def mean(x, weight):
    sums = cross_entropy(x, inputs['w'], targets, max_logit_loss=weight)
    return sums.loss / sums.count

  with_loss, without = (jax.grad(mean)(inputs['x'], weight) for weight in (1.0, 0.0))
  logits = np.asarray(inputs['x'], np.float64) @ np.asarray(inputs['w'], np.float64)
  d = np.zeros_like(logits)
  top = logits.argmax(-1)[..., None]
  np.put_along_axis(d, top, 1 / (B * T) * np.take_along_axis(logits, top, -1), -1)
  expected = d @ np.asarray(inputs['w'], np.float64).T
  np.testing.assert_allclose(with_loss - without, expected, atol=2e-6)
  assert np.abs(expected).max() > 0.1
