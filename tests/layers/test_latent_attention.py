"""Latent attention: its two forms against each other, which of them runs, and the size of the
cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.attention import Attention
from jaxformer.layers.latent_attention import LatentAttention
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.ops.implementation import record_choices
from jaxformer.ops.latent_attention import LATENT_ATTENTION
from jaxformer.ops.masks import Mask

B, T, S, H, N, P, V, R = 2, 5, 9, 3, 8, 4, 6, 16


@pytest.mark.quick
def test_forms_are_equal():
  """Outputs and all gradients within 1e-5 of the largest, outputs within 2e-6 of float64 numpy, for
  logits of tens, entries without a document in common, and values narrower than keys."""
  numbers = np.random.default_rng(0)
  q, cache, up = (
    numbers.normal(size=s).astype('float32')
    for s in ((B, T, H, N + P), (B, S, R + P), (R, H * (N + V)))
  )
  index_T, index_S = np.arange(4, 4 + T), np.arange(S)
  segments_BT, segments_BS = (
    np.asarray([[0] * 5, [0, 0, 1, 1, 1]]),
    np.asarray([[0] * 9, [-1, -1, 0, 0, 0, 0, 1, 1, 1]]),
  )
  mask = Mask(True, None, *map(jnp.asarray, (segments_BT, segments_BS, index_T, index_S)))

  def run(form, *arrays):
    return LATENT_ATTENTION[form](*arrays, mask, value_dim=V, scale=1.5)

  seen = (index_S[None] <= index_T[:, None]) & (segments_BT[:, :, None] == segments_BS[:, None])
  w = up.astype(np.float64).reshape(R, H, N + V)
  kv = np.einsum('bsr,rhe->bhse', cache[..., :R].astype(np.float64), w)
  a = np.einsum('bthn,bhsn->bhts', q[..., :N], kv[..., :N])
  a = np.where(
    seen[:, None], 1.5 * (a + np.einsum('bthp,bsp->bhts', q[..., N:], cache[..., R:])), -np.inf
  )
  assert np.abs(a[np.isfinite(a)]).max() > 20
  p = np.exp(a - a.max(-1, keepdims=True))
  expected = np.einsum('bhts,bhsv->bthv', p / p.sum(-1, keepdims=True), kv[..., N:])
  dy = numbers.normal(size=expected.shape).astype('float32')

  def both(form):
    y, pull = jax.vjp(functools.partial(run, form), q, cache, up)
    return y, *pull(dy)

  results = {}
  for form in ('naive', 'expanded', 'absorbed'):
    results[form] = jax.jit(both, static_argnums=0)(form)
    y = results[form][0]
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())
  for form in ('expanded', 'absorbed'):
    for ours, naive in zip(results[form], results['naive'], strict=True):
      np.testing.assert_allclose(ours, naive, atol=1e-5 * np.abs(naive).max())


@pytest.mark.quick
def test_prompts_are_expanded_and_tokens_absorbed():
  """By the numbers of queries and of entries; of the contract, the tests that continue sequences
  hold both to each other on a cache."""
  config = LatentAttention.Config(heads=4, head_dim=16, rope_head_dim=8, v_head_dim=16, kv_rank=64)

  def chosen(length, fresh):
    def run(x):
      layer = config.build(32, nnx.Rngs(0), LayerPosition())
      return layer(x, Context(fresh=fresh), layer.init_state(2, 64)).y

    with record_choices() as choices:
      jax.eval_shape(run, jnp.zeros((2, length, 32)))
    return set(choices['latent_attention'])

  assert chosen(24, True) == chosen(48, False) == {'expanded'}
  assert chosen(1, False) == chosen(8, False) == {'absorbed'}


@pytest.mark.quick
def test_size_of_the_cache():
  """DeepSeek-V3: 512 of the latent and 64 of the key per position and layer, for 128 heads. Grouped
  queries with 8 heads of 128 have 2,048, attention with all heads 32,768."""
  sizes = {'heads': 128, 'head_dim': 128, 'v_head_dim': 128, 'q_rank': 1536}
  latent = LatentAttention.Config(**sizes, kv_rank=512, rope_head_dim=64)
  assert latent.state_size(7168, 1000) == 576 * 1000
  assert latent.state_bytes(7168, 1000) == 2 * 576 * 1000
  grouped = Attention.Config(heads=128, head_dim=128, kv_heads=8)
  assert grouped.state_size(7168, 1000) == 2048 * 1000


def test_cost_is_that_of_the_expanded_form():
  config = LatentAttention.Config(heads=2, head_dim=4, rope_head_dim=2, v_head_dim=6, kv_rank=8)
  assert config.mixing_flops_per_token(16, 9, causal=False) == 2 * 2 * (6 + 6) * 9
  assert config.mixing_flops_per_token(16, 9, causal=True) == 2 * 2 * (6 + 6) * 5
