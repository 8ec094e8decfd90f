"""Every implementation of `attention` agrees with the naive one: output and gradients, over the
cases of the mask."""

from __future__ import annotations

import dataclasses
import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.config import InputError
from jaxformer.ops import attention as ops
from jaxformer.ops.attention import ATTENTION, Mask, attention, attention_naive
from jaxformer.sharding import assume_platform
from tests.helpers import forced

quick = pytest.mark.quick

# Of the largest number in the reference. fp32: rounding of sums in another order. bf16 has 8 bits:
# inputs of products are rounded at other places (probabilities before or after the division), so a
# few units of 2^-8.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def arrays(B, T, S, H, G, K, dtype=jnp.float32, seed=0, C=None):
  keys, C = jax.random.split(jax.random.key(seed), 4), C or K
  shapes = (B, T, H, K), (B, S, G, K), (B, S, G, C), (B, T, H, C)
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(f, q, k, v, g):
  def run(q, k, v, g):
    out, pull = jax.vjp(f, q, k, v)
    return out, *pull(g)

  return jax.jit(run)(q, k, v, g)


def assert_same(got, want, tolerance):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), got, want, strict=True):
    assert a.shape == b.shape, name
    assert a.dtype == b.dtype, name
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all(), name
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()), (
      name,
      np.abs(a - b).max(),
      np.abs(b).max(),
    )


def packed(B, T, seed=0):
  """Documents of random lengths, numbered along the sequence."""
  return jnp.asarray(
    np.cumsum(np.random.default_rng(seed).random((B, T)) < 4 / T, axis=1), jnp.int32
  )


# B, T, S, H, G, K, mask, softcap, alibi: odd sizes, grouped heads and every kind of mask
CASES = {
  'causal': (2, 130, 130, 4, 4, 16, Mask(), None, False),
  'causal-exact-blocks': (2, 128, 128, 2, 2, 16, Mask(), None, False),
  'grouped': (2, 97, 97, 6, 2, 8, Mask(), None, False),
  'multi-query': (1, 65, 65, 4, 1, 8, Mask(), None, False),
  'full': (2, 70, 70, 2, 2, 16, Mask(causal=False), None, False),
  'cross': (2, 40, 129, 2, 2, 16, Mask(causal=False), None, False),
  'cross-short-source': (2, 129, 33, 4, 2, 16, Mask(causal=False), None, False),
  'window': (2, 200, 200, 2, 1, 8, Mask(window=37), None, False),
  'window-1': (1, 66, 66, 2, 2, 8, Mask(window=1), None, False),
  'band': (1, 200, 200, 2, 2, 8, Mask(causal=False, window=37), None, False),
  'softcap': (2, 97, 97, 2, 2, 16, Mask(), 2.0, False),
  'alibi': (2, 97, 97, 4, 2, 16, Mask(), None, True),
  'alibi-softcap-window': (2, 97, 97, 4, 2, 16, Mask(window=50), 5.0, True),
  'segments': (3, 150, 150, 4, 2, 8, Mask(segments_BT=packed(3, 150)), None, False),
  'segments-full': (
    3,
    150,
    150,
    4,
    2,
    8,
    Mask(causal=False, segments_BT=packed(3, 150)),
    None,
    False,
  ),
  'segments-of-keys': (
    2,
    50,
    75,
    2,
    2,
    8,
    Mask(False, None, packed(2, 50, 1), packed(2, 75, 2)),
    None,
    False,
  ),
}
CACHES = {
  # 70 of 160 slots filled, the queries are the last 20 of them
  'prefill-into-cache': (
    2,
    20,
    160,
    4,
    2,
    8,
    Mask(index_T=jnp.arange(50, 70), index_S=jnp.r_[jnp.arange(70), jnp.full(90, -1)]),
  ),
  # a ring of 64 slots holding the positions 100..163
  'ring': (
    2,
    30,
    64,
    2,
    2,
    8,
    Mask(window=40, index_T=jnp.arange(134, 164), index_S=100 + (jnp.arange(64) - 36) % 64),
  ),
  'empty': (1, 5, 32, 2, 2, 8, Mask(index_T=jnp.arange(5), index_S=jnp.full(32, -1))),
  'no-key-for-some': (1, 40, 40, 2, 2, 8, Mask(index_T=jnp.arange(40), index_S=jnp.arange(20, 60))),
}


def slopes(H, alibi):
  return 2.0 ** -jnp.arange(1.0, H + 1) if alibi else None


IN_BF16 = 'causal', 'grouped', 'alibi-softcap-window', 'segments'


QUICK = 'grouped', 'alibi-softcap-window', 'segments'


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    *(pytest.param(c, jnp.float32, marks=quick if c in QUICK else ()) for c in CASES),
    *((c, jnp.bfloat16) for c in IN_BF16),
  ],
)
def test_agrees_with_naive(case, dtype):
  B, T, S, H, G, K, mask, softcap, alibi = CASES[case]
  inputs = arrays(B, T, S, H, G, K, dtype)
  common = {'scale': K**-0.5, 'softcap': softcap, 'slopes_H': slopes(H, alibi)}
  want = with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, **common), *inputs)
  for name, block in ('chunked', 64), ('unrolled', None):
    found = functools.partial(ATTENTION[name], mask=mask, block=block, **common)
    got = with_gradients(found, *inputs)
    assert_same(got, want, TOLERANCE[dtype])


@quick
@pytest.mark.parametrize('C', [8, 24])
def test_values_may_have_another_dim(C):
  """As in multi-head latent attention, where keys have rotary channels beside those of values."""
  inputs, mask = arrays(2, 97, 97, 4, 2, 16, C=C), Mask(window=50, segments_BT=packed(2, 97))
  want = with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, scale=0.3), *inputs)
  for name in 'chunked', 'unrolled':
    f = forced(lambda q, k, v: attention(q, k, v, mask, scale=0.3), attention=name)
    assert_same(with_gradients(f, *inputs), want, 1e-5)


@pytest.mark.parametrize('block', [16, 512])
@pytest.mark.parametrize('case', CACHES)
def test_chunked_over_a_cache(case, block):
  B, T, S, H, G, K, mask = CACHES[case]
  inputs = arrays(B, T, S, H, G, K)
  got = with_gradients(
    lambda q, k, v: ops.attention_chunked(q, k, v, mask, scale=0.3, block=block), *inputs
  )
  assert_same(
    got, with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, scale=0.3), *inputs), 1e-5
  )


def test_unrolled_without_kept_probabilities(monkeypatch):
  from jaxformer.ops import attention_chunked

  inputs, mask = arrays(2, 150, 150, 4, 2, 16), Mask(segments_BT=packed(2, 150))
  kept = with_gradients(lambda q, k, v: ops.attention_unrolled(q, k, v, mask, scale=0.25), *inputs)
  monkeypatch.setattr(attention_chunked, '_KEEP_BYTES', 0)
  assert_same(
    with_gradients(lambda q, k, v: ops.attention_unrolled(q, k, v, mask, scale=0.25), *inputs),
    kept,
    1e-5,
  )


@pytest.mark.parametrize('case', ['causal', 'grouped', 'full', 'window', 'band'])
def test_xla_agrees_with_naive(case):
  B, T, S, H, G, K, mask, _, _ = CASES[case]
  inputs = arrays(B, T, S, H, G, K)
  got = with_gradients(
    forced(lambda q, k, v: attention(q, k, v, mask, scale=K**-0.5), attention='xla'), *inputs
  )
  assert_same(
    got,
    with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, scale=K**-0.5), *inputs),
    1e-5,
  )


@pytest.mark.parametrize(
  ('mask', 'softcap', 'K'),
  [(Mask(window=100), None, 128), (Mask(segments_BT=packed(1, 256)), None, 128), (Mask(), 3.0, 64)],
  ids=['window', 'segments', 'softcap-head-dim-64'],
)
def test_splash_interpreted_agrees_with_naive(mask, softcap, K):
  inputs = arrays(1, 256, 256, 2, 1, K)
  common = {'scale': K**-0.5, 'softcap': softcap}
  got = with_gradients(
    lambda q, k, v: ops.attention_splash(q, k, v, mask, interpret=True, **common), *inputs
  )
  assert_same(
    got, with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, **common), *inputs), 1e-5
  )


@pytest.mark.parametrize(('K', 'C'), [(192, 128), (128, 64)])
def test_splash_takes_values_of_another_dim(K, C):
  inputs, mask = arrays(1, 256, 256, 2, 1, K, C=C), Mask()
  got = with_gradients(
    lambda q, k, v: ops.attention_splash(q, k, v, mask, scale=0.1, interpret=True), *inputs
  )
  want = with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, scale=0.1), *inputs)
  assert_same(got, want, 1e-5)


@quick
@pytest.mark.parametrize('implementation', ['naive', 'chunked', 'unrolled'])
def test_a_query_without_keys_gives_zeros(implementation):
  """Queries of a segment that no key has: output and gradients 0, nothing infinite."""
  q, k, v, g = arrays(1, 40, 40, 2, 2, 8)
  mask = Mask(
    causal=False,
    segments_BT=jnp.ones((1, 40), jnp.int32),
    key_segments_BS=jnp.zeros((1, 40), jnp.int32),
  )
  for x in with_gradients(
    forced(lambda q, k, v: attention(q, k, v, mask, scale=1.0), attention=implementation),
    q,
    k,
    v,
    g,
  ):
    np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize('implementation', ['chunked', 'unrolled'])
def test_large_logits_stay_finite(implementation):
  q, k, v, g = arrays(1, 70, 70, 2, 2, 8)
  inputs = (q * 1e3, k * 1e3, v, g)
  got = with_gradients(
    forced(lambda q, k, v: attention(q, k, v, Mask(), scale=1.0), attention=implementation), *inputs
  )
  assert all(np.isfinite(x).all() for x in got)
  np.testing.assert_allclose(got[0], attention_naive(*inputs[:3], Mask(), scale=1.0), atol=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def packed_run(f, q, k, v, g, segments, causal, window):
  mask = Mask(causal=causal, window=window, segments_BT=segments)
  return with_gradients(lambda q, k, v: f(q, k, v, mask, scale=0.3), q, k, v, g)


# one object, so that jit finds it again
chunked_by_32 = functools.partial(ops.attention_chunked, block=32)


@hypothesis.given(
  st.lists(st.integers(1, 60), max_size=8),
  st.sampled_from([(True, None), (True, 30)]),
  st.integers(0, 99),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_random_packing(lengths, kind, seed):
  """Packed documents, in any numbering: as naive, and the first as it is alone."""
  lengths, T = [*lengths, 130], 130
  segments = jnp.asarray(
    np.repeat(np.random.default_rng(seed).permutation(len(lengths)), lengths)[:T], jnp.int32
  )[None]
  inputs = arrays(1, T, T, 2, 1, 8, seed=seed)
  want = packed_run(attention_naive, *inputs, segments, *kind)
  for f in ops.attention_unrolled, chunked_by_32:
    assert_same(packed_run(f, *inputs, segments, *kind), want, 1e-5)
  end = min(T, lengths[0])
  # causal, so what follows the first is unseen
  alone = packed_run(attention_naive, *inputs, jnp.zeros_like(segments), *kind)[0]
  np.testing.assert_allclose(want[0][:, :end], alone[:, :end], atol=1e-5)


def test_chunked_memory_is_linear():
  def temporaries(T):
    x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)

    def f(q, k, v):
      return ops.attention_chunked(q, k, v, Mask(), scale=0.2, block=256).sum()

    return (
      jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    )

  assert temporaries(8192) < 2.2 * temporaries(4096)


# ---- the choice of an implementation ---------------------------------------------------------


def shape(B=4, T=2048, H=16, K=128, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((B, T, H, K), dtype)


@quick
@pytest.mark.parametrize(
  ('platform', 'q', 'k', 'mask', 'options', 'expected'),
  [
    ('tpu', shape(), shape(), Mask(), {}, 'splash'),
    ('tpu', shape(), shape(H=4), Mask(window=512), {'softcap': 30.0}, 'splash'),
    ('tpu', shape(), shape(), Mask(segments_BT=jnp.zeros((4, 2048), jnp.int32)), {}, 'splash'),
    ('tpu', shape(), shape(), Mask(), {'slopes_H': jnp.ones(16)}, 'chunked'),
    ('tpu', shape(T=2000), shape(T=2000), Mask(), {}, 'chunked'),
    (
      'tpu',
      shape(T=1),
      shape(),
      Mask(index_T=jnp.zeros(1, jnp.int32), index_S=jnp.arange(2048)),
      {},
      'naive',
    ),
    (
      'tpu',
      shape(T=256),
      shape(),
      Mask(index_T=jnp.arange(256), index_S=jnp.arange(2048)),
      {},
      'chunked',
    ),
    ('gpu', shape(), shape(), Mask(), {}, 'cudnn'),
    ('gpu', shape(), shape(H=4), Mask(window=512), {}, 'cudnn'),
    ('gpu', shape(), shape(T=512), Mask(causal=False), {}, 'cudnn'),
    ('gpu', shape(dtype=jnp.float32), shape(dtype=jnp.float32), Mask(), {}, 'chunked'),
    ('gpu', shape(K=100), shape(K=100), Mask(), {}, 'chunked'),
    ('gpu', shape(), shape(), Mask(), {'v_dim': 128}, 'cudnn'),
    ('gpu', shape(), shape(), Mask(), {'v_dim': 64}, 'chunked'),
    ('tpu', shape(), shape(), Mask(), {'v_dim': 64}, 'splash'),
    ('gpu', shape(K=256), shape(K=256), Mask(), {}, 'chunked'),
    ('gpu', shape(), shape(), Mask(causal=False, window=8), {}, 'chunked'),
    ('gpu', shape(), shape(), Mask(), {'softcap': 30.0}, 'chunked'),
    ('gpu', shape(), shape(), Mask(segments_BT=jnp.zeros((4, 2048), jnp.int32)), {}, 'chunked'),
    ('gpu', shape(T=1), shape(), Mask(causal=False), {}, 'naive'),
    ('cpu', shape(T=256, H=4), shape(T=256, H=4), Mask(), {}, 'unrolled'),
    ('cpu', shape(T=8192), shape(T=8192), Mask(), {}, 'chunked'),
    (
      'cpu',
      shape(B=1, T=64, H=4),
      shape(B=1, T=256, H=4),
      Mask(index_T=jnp.arange(64), index_S=jnp.arange(256)),
      {},
      'naive',
    ),
  ],
)
def test_choice(monkeypatch, platform, q, k, mask, options, expected):
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  assert ATTENTION.choose(q, k, mask, **options) == expected


@quick
@pytest.mark.parametrize('mask', [Mask(), Mask(causal=False), Mask(window=8)], ids=str)
def test_cudnn_is_traced_where_it_is_not_installed(monkeypatch, mask):
  """As planning traces a program for a GPU: the same results, and the residuals of the real one,
  which JAX traces once it is told of a version of cuDNN."""
  import jax._src.cudnn.fused_attention_stablehlo as real

  def run(q, k, v):
    return ATTENTION['cudnn'](q, k, v, mask, scale=0.25)

  def kept(dtype):
    q, k, v = (jax.ShapeDtypeStruct((2, 32, heads, 16), dtype) for heads in (4, 2, 2))
    names = {}
    traced = jax.make_jaxpr(lambda *a: jax.vjp(run, *a)[1])(q, k, v)
    for x in traced.out_avals:
      if x.size:
        names[x.str_short()] = names.get(x.str_short(), 0) + 1
    return names

  with assume_platform('gpu'):
    assumed = kept(jnp.bfloat16)
    q, k, v, do = arrays(2, 32, 32, 4, 2, 16)
    out, backward = jax.vjp(run, q, k, v)
    found = out, *backward(do)
  monkeypatch.setattr(real, 'cuda_versions', types.SimpleNamespace(cudnn_get_version=lambda: 91000))
  assert assumed == kept(jnp.bfloat16)
  out, backward = jax.vjp(lambda q, k, v: attention_naive(q, k, v, mask, scale=0.25), q, k, v)
  for a, b in zip(found, (out, *backward(do)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@quick
@pytest.mark.parametrize(
  ('implementation', 'mask', 'message'),
  [
    ('cudnn', Mask(), 'runs on a GPU'),
    ('splash', Mask(), 'runs on a TPU'),
    ('unrolled', Mask(index_T=jnp.arange(8), index_S=jnp.arange(8)), 'same positions'),
    ('xla', Mask(segments_BT=jnp.zeros((1, 8), jnp.int32)), 'no segments'),
    ('flash', Mask(), 'one of naive'),
  ],
)
def test_a_forced_implementation_says_what_it_cannot_do(implementation, mask, message):
  q, k, v, _ = arrays(1, 8, 8, 2, 2, 8)
  with pytest.raises(ValueError, match=message):
    forced(attention, attention=implementation)(q, k, v, mask, scale=1.0)


# ---- on a mesh ---------------------------------------------------------------------------------


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 (fake) devices')
@pytest.mark.parametrize(
  ('mesh', 'G', 'implementation'),
  [
    ({'fsdp': 2, 'tensor': 4}, 8, None),
    ({'fsdp': 2, 'tensor': 4}, 2, None),
    ({'fsdp': 2, 'tensor': 4}, 1, 'chunked'),
    ({'data': 8}, 2, 'chunked'),
    ({'fsdp': 2, 'context': 2, 'tensor': 2}, 8, None),
    ({'fsdp': 2, 'context': 2, 'tensor': 2}, 1, None),
  ],
  ids=str,
)
def test_sharded_agrees_with_unsharded(mesh, G, implementation):
  inputs, mask = arrays(8, 64, 64, 8, G, 8), Mask(segments_BT=packed(8, 64))
  f = forced(
    lambda q, k, v: attention(q, k, v, mask, scale=0.3),
    **({'attention': implementation} if implementation else {}),
  )
  want = with_gradients(lambda q, k, v: attention_naive(q, k, v, mask, scale=0.3), *inputs)
  with sharding.use_mesh(sharding.make_parallel(sharding.MeshConfig(**{'data': 1} | mesh))):
    assert_same(with_gradients(f, *inputs), want, 1e-5)


@quick
def test_remat_by_name_saves_the_residuals():
  """Under a policy that saves `SAVED`, the backward pass does not run the forward loop again."""
  q, k, v, _ = arrays(1, 64, 64, 2, 2, 8)

  def loops(policy):
    f = jax.checkpoint(
      lambda q, k, v: ops.attention_chunked(jnp.sin(q), k, v, Mask(), scale=0.3, block=32).sum(),
      policy=policy,
    )
    return str(jax.make_jaxpr(jax.grad(f))(q, k, v)).count('while')

  saved = jax.checkpoint_policies.save_only_these_names(ops.SAVED)
  assert loops(saved) < loops(jax.checkpoint_policies.nothing_saveable)


@quick
def test_mask_is_a_pytree():
  mask = Mask(window=3, segments_BT=jnp.zeros((1, 4), jnp.int32))
  assert jax.tree.map(lambda x: x, mask).window == 3
  assert dataclasses.replace(mask, window=None).segments_BT is mask.segments_BT


@quick
def test_dropout_of_weights():
  """`attn_pdrop` of GPT-2: a weight is 0 at the rate, or divided by 1 - rate, after the softmax.
  Values are unit vectors, so that the output is the weights themselves."""
  B, T, H, rate = 2, 24, 3, 0.25
  q, k, *_ = arrays(B, T, T, H, H, T)
  v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, H, T))
  mask, key = Mask(True, None, packed(B, T)), jax.random.key(5)
  p = attention(q, k, v, mask, scale=0.3)
  dropped = attention(q, k, v, mask, scale=0.3, dropout=rate, dropout_key=key)
  np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, p / (1 - rate)), rtol=1e-5)
  seen = np.asarray(p) > 0
  assert abs(np.mean(np.asarray(dropped)[seen] == 0) - rate) < 5 * 0.45 / np.sqrt(seen.sum())
  assert (attention(q, k, v, mask, scale=0.3, dropout=rate) == p).all()
  with pytest.raises(InputError, match=r'chunked.*it has no dropout of weights'):
    forced(attention, attention='chunked')(q, k, v, mask, scale=0.3, dropout=rate, dropout_key=key)
