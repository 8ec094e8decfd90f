"""Sinks of attention: the definition in float64, and every implementation against the naive one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.config import InputError
from jaxformer.ops import attention as ops
from jaxformer.ops import attention_chunked
from jaxformer.ops.attention import ATTENTION, Mask, attention, attention_naive
from jaxformer.ops.attention_sequence_parallel import attention_sharded
from tests.helpers import forced
from tests.ops.test_attention import CASES, TOLERANCE, arrays, packed

quick = pytest.mark.quick
SINKS = jnp.asarray([-3.0, 0.5, 2.0, 7.0])  # from almost none to most of the weight


def gradients(f, *inputs, g):
  """The output of `f` and the gradients of all inputs."""

  def run(g, *inputs):
    out, pull = jax.vjp(f, *inputs)
    return out, *pull(g)

  return jax.jit(run)(g, *inputs)


def assert_same(got, want, tolerance, of_sinks=None):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv', 'dsinks'), got, want, strict=True):
    tolerance = of_sinks if name == 'dsinks' and of_sinks else tolerance
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.abs(a - b).max()
    assert error <= tolerance * max(1.0, np.abs(b).max()), (name, error, np.abs(b).max())


@quick
def test_definition():
  """exp(sink) in the denominator, in float64; and out_with_sinks = out sigmoid(lse - sink)."""
  q, k, v, _ = (np.asarray(x, np.float64) for x in arrays(2, 9, 9, 4, 2, 8))
  a = 0.3 * np.einsum('bthk,bshk->bhts', q, np.repeat(k, 2, axis=2))
  e = np.exp(a) * np.tril(np.ones((9, 9)))
  sinks = np.asarray(SINKS, np.float64).reshape(1, 4, 1, 1)
  want = np.einsum(
    'bhts,bshk->bthk', e / (e.sum(-1, keepdims=True) + np.exp(sinks)), v.repeat(2, 2)
  )
  inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  got = attention_naive(*inputs, Mask(), scale=0.3, sinks_H=SINKS)
  np.testing.assert_allclose(got, want, atol=1e-6)
  lse = np.log(e.sum(-1, keepdims=True))
  without = np.asarray(attention_naive(*inputs, Mask(), scale=0.3))
  factor = (1 / (1 + np.exp(sinks - lse)))[..., 0].transpose(0, 2, 1)[..., None]
  np.testing.assert_allclose(got, without * factor, atol=1e-6)


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    pytest.param('segments', jnp.float32, marks=quick),
    ('alibi-softcap-window', jnp.float32),
    ('segments', jnp.bfloat16),
  ],
)
def test_agrees_with_naive(monkeypatch, case, dtype):
  B, T, S, H, G, K, mask, softcap, alibi = CASES[case]
  *inputs, g = arrays(B, T, S, H, G, K, dtype)
  slopes = 2.0 ** -jnp.arange(1.0, H + 1) if alibi else None

  def run(f, **options):
    def call(q, k, v, sinks):
      return f(q, k, v, mask, scale=0.3, softcap=softcap, slopes_H=slopes, sinks_H=sinks, **options)

    return gradients(call, *inputs, SINKS, g=g)

  want = run(attention_naive)
  assert_same(run(ATTENTION['chunked'], block=64), want, TOLERANCE[dtype])
  assert_same(run(ATTENTION['unrolled']), want, TOLERANCE[dtype])
  monkeypatch.setattr(attention_chunked, '_KEEP_BYTES', 0)
  assert_same(run(ATTENTION['unrolled']), want, TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['fp32', 'bf16'])
def test_splash_interpreted_agrees_with_naive(dtype):
  *inputs, g = arrays(2, 128, 128, 4, 2, 64, dtype)
  mask = Mask(window=100, segments_BT=packed(2, 128))

  def run(f):
    return gradients(
      lambda q, k, v, sinks: f(q, k, v, mask, scale=0.3, sinks_H=sinks), *inputs, SINKS, g=g
    )

  splash = functools.partial(ops.attention_splash, interpret=True)
  # The kernel of JAX 0.10 rounds each of the products in the sum once more.
  of_sinks = 2 * TOLERANCE[dtype]
  assert_same(run(splash), run(attention_naive), TOLERANCE[dtype], of_sinks)


@quick
@pytest.mark.parametrize('implementation', ['naive', 'chunked', 'unrolled'])
def test_a_query_without_keys_gives_zeros(implementation):
  """All weight is the sink's, and nothing has a gradient."""
  *inputs, g = arrays(1, 40, 40, 4, 2, 8)
  no, one = jnp.zeros((1, 40), jnp.int32), jnp.ones((1, 40), jnp.int32)
  mask = Mask(causal=False, segments_BT=one, key_segments_BS=no)
  f = forced(
    lambda q, k, v, sinks: attention(q, k, v, mask, scale=1.0, sinks_H=sinks),
    attention=implementation,
  )
  for x in gradients(f, *inputs, SINKS, g=g):
    np.testing.assert_array_equal(x, np.zeros_like(x))


@quick
def test_kernels_without_sinks_say_so(monkeypatch):
  """On a GPU blocks in plain JAX compute what cuDNN does not; on a TPU splash has sinks."""
  q = jax.ShapeDtypeStruct((4, 2048, 16, 128), jnp.bfloat16)
  for platform, expected in ('gpu', 'chunked'), ('tpu', 'splash'):
    monkeypatch.setattr(sharding, 'platform', lambda platform=platform: platform)
    assert ATTENTION.choose(q, q, Mask(), sinks_H=jnp.zeros(16)) == expected
  monkeypatch.undo()
  q, k, v, _ = arrays(1, 8, 8, 4, 2, 8)
  with pytest.raises(InputError, match='it has no sinks'):
    forced(attention, attention='xla')(q, k, v, Mask(), scale=1.0, sinks_H=SINKS)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 (fake) devices')
@pytest.mark.parametrize(
  ('mesh', 'splash'),
  [({'fsdp': 4, 'tensor': 2}, False), ({'fsdp': 2, 'context': 2, 'tensor': 2}, False)],
  ids=str,
)
def test_sharded_agrees_with_unsharded(mesh, splash):
  """The gradient of the sinks is summed over shards of rows and of time."""
  *inputs, g = arrays(4, 64, 64, 4, 2, 8)
  mask = Mask(segments_BT=packed(4, 64))

  def f(q, k, v, sinks):
    return attention(q, k, v, mask, scale=0.3, sinks_H=sinks)

  want = gradients(
    lambda q, k, v, sinks: attention_naive(q, k, v, mask, scale=0.3, sinks_H=sinks),
    *inputs,
    SINKS,
    g=g,
  )
  with sharding.use_mesh(sharding.make_parallel(sharding.MeshConfig(**{'data': 1} | mesh))):
    assert_same(gradients(f, *inputs, SINKS, g=g), want, 1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 (fake) devices')
def test_splash_on_shards_of_time():
  *inputs, g = arrays(2, 256, 256, 4, 2, 64)
  sharded = functools.partial(attention_sharded, splash=True, interpret=True)

  def run(f):
    return gradients(
      lambda q, k, v, sinks: f(q, k, v, Mask(), scale=0.3, sinks_H=sinks), *inputs, SINKS, g=g
    )

  mesh = sharding.MeshConfig(data=1, fsdp=2, context=2, tensor=2)
  with sharding.use_mesh(sharding.make_parallel(mesh)):
    found = run(sharded)
  assert_same(found, run(attention_naive), 1e-5)
