"""Layers of linear attention against their papers' recurrences, written here in float64.

The layers run in fp32. The tolerance is 1e-6 of the largest magnitude of the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.layers.gla import GatedLinearAttention
from jaxformer.layers.hgrn2 import Hgrn2, LowerBounds, bounded_log_sigmoid
from jaxformer.layers.layer import Context
from jaxformer.layers.lightning import LightningAttention
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.retention import Retention
from jaxformer.models.params import define
from jaxformer.testing.case import Alone

B, T, D = 2, 90, 32


def layer(config):
  """(function of a sequence, parameters in float64): official initial values with noise, as scales
  of 1 and biases of 0 would hide mistakes, and larger weights, as the layers are nearly linear
  where these are small."""
  definition, rng = define(Alone(layer=config)), np.random.default_rng(0)
  initial = definition.init(jax.random.key(0))  # in block 1 of 3
  params = {n: np.asarray(p, np.float32) for n, p in initial.items()}
  params = {n: p + rng.normal(0, 0.2, p.shape).astype(np.float32) for n, p in params.items()}

  @jax.jit
  def run(x, segments):
    weights = {n: jnp.asarray(p) for n, p in params.items()}
    return definition.merge(weights)(x, Context(segments_BT=segments)).y

  return run, {n: p.astype(np.float64) for n, p in params.items()}


def sequence():
  """Inputs of two rows, the first of them of two documents, and the numbers of the documents."""
  segments = np.zeros((B, T), np.int32)
  segments[0, 37:] = 1
  return np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32), segments


def agrees(run, expected):
  """`expected` computes one document from the state of zeros."""
  x, segments = sequence()
  got, X = np.asarray(run(x, segments)), x.astype(np.float64)
  want = np.stack([np.concatenate([expected(X[0, :37]), expected(X[0, 37:])]), expected(X[1])])
  difference = np.abs(got - want).max() / np.abs(want).max()
  print(f'largest difference {difference:.1e} of the largest output')
  assert difference < 1e-6


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def rms(x, scale, eps=1e-5):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def heads(x, n):
  return x.reshape(len(x), n, -1)


def recurrence(q, k, v, decay):
  """[T, H, V] from q, k, decay [T, H, K] and v [T, H, V]: o_t = S_t^T q_t with S_t = diag(decay_t)
  S_{t-1} + k_t v_t^T."""
  S, o = np.zeros((*k.shape[1:], v.shape[-1])), np.empty_like(v)
  for t in range(len(q)):
    S = decay[t][..., None] * S + k[t][..., None] * v[t][:, None]
    o[t] = np.einsum('hk,hkv->hv', q[t], S)
  return o


def test_retention_is_that_of_the_paper():
  """Sun et al. 2023, equations 3 and 8, in the parallel form: q, k as complex numbers times
  exp(i n theta), with pairs (i, i + K / 2) for the components, decays gamma^(n - m) and a group
  norm of the heads."""
  H, K, V = 4, 8, 16
  run, p = layer(Retention.Config(heads=H, norm=LayerNorm()))

  def expected(x):
    def rotated(name):
      z = heads(x @ p[f'{name}.kernel'], H)
      z = z[..., : K // 2] + 1j * z[..., K // 2 :]
      angle = np.arange(len(x))[:, None] * 10000.0 ** (-2 * np.arange(K // 2) / K)
      return z * np.exp(1j * angle)[:, None]

    n, gamma = np.arange(len(x)), 1 - 2.0 ** (-5 - np.arange(H))
    D_hnm = np.where(n[:, None] >= n, gamma[:, None, None] ** np.abs(n[:, None] - n), 0.0)
    scores = np.einsum('nhk,mhk->hnm', rotated('q'), rotated('k').conj()).real
    y = np.einsum('hnm,mhv->nhv', scores * D_hnm / np.sqrt(K), heads(x @ p['v.kernel'], H))
    y = y - y.mean(-1, keepdims=True)
    y = rms(y, p['norm.scale']) + p['norm.bias']
    assert y.shape[1:] == (H, V)
    return (silu(x @ p['g.kernel']) * y.reshape(len(x), -1)) @ p['o.kernel']

  agrees(run, expected)


def test_gated_linear_attention_is_that_of_the_paper():
  """Yang et al. 2024, section 4.4."""
  H, K = 2, 8
  run, p = layer(GatedLinearAttention.Config(heads=H, decay_rank=4))

  def expected(x):
    q, k, v, g = (x @ p[f'{name}.kernel'] for name in 'qkvg')
    alpha = sigmoid(x @ p['decay_a.kernel'] @ p['decay_b.kernel'] + p['decay_b.bias']) ** (1 / 16)
    o = recurrence(heads(q, H) / np.sqrt(K), *(heads(z, H) for z in (k, v, alpha)))
    y = rms(o, p['norm.scale']).reshape(len(x), -1)
    return (y * silu(g)) @ p['o.kernel']

  agrees(run, expected)


def test_hgrn2_is_that_of_the_paper():
  """Qin et al. 2024, section 3.2, with the lower bounds of Qin et al. 2023, equation 5: exclusive
  sums over the blocks of a softmax over them."""
  K = 8
  run, p = layer(Hgrn2.Config(head_dim=K))

  def expected(x):
    logits = p['parts.lower_bounds.logits']
    share = np.exp(logits) / np.exp(logits).sum(0)
    bound = (np.cumsum(share, 0) - share[0])[1]
    f = bound + (1 - bound) * sigmoid(x @ p['layer.f.kernel'])
    q, v = silu(x @ p['layer.q.kernel']) / np.sqrt(K), x @ p['layer.v.kernel']
    o = recurrence(*(heads(z, D // K) for z in (q, 1 - f, v, f))).reshape(len(x), D)
    return rms(o, p['layer.norm.scale']) @ p['layer.o.kernel']

  agrees(run, expected)


def test_lightning_attention_is_that_of_the_paper():
  """MiniMax 2025, section 2.2; slopes as in ALiBi, times 1 - l / (L - 1) in block l of L."""
  H, K = 4, 8
  run, p = layer(LightningAttention.Config(heads=H))

  def expected(x):
    qkv = heads(silu(x @ p['layer.qkv.kernel']), H)
    slopes = 2.0 ** (-8 * np.arange(1, H + 1) / H) * (1 - 1 / (2 + 1e-5) + 1e-5)
    decay = np.broadcast_to(np.exp(-slopes)[:, None], (len(x), H, K))
    o = recurrence(*np.split(qkv, 3, axis=-1), decay).reshape(len(x), D)
    y = sigmoid(x @ p['layer.g.kernel']) * rms(o, p['layer.norm.scale'], 1e-6)
    return y @ p['layer.out.kernel']

  agrees(run, expected)


def test_lower_bounds_rise_from_0_to_almost_1():
  bounds = LowerBounds(D, 4)
  found = [np.asarray(bounds(i)) for i in range(4)]
  np.testing.assert_allclose(found, np.outer([0, 1 / 4, 2 / 4, 3 / 4], np.ones(D)), atol=1e-6)


def test_decays_of_bounded_gates_are_precise():
  """Relative to float64, where all or nothing is left, with bounds from 0 to almost 1."""
  z = np.asarray([-200.0, -30.0, -3.0, 0.0, 5.0, 40.0, 200.0])
  for b in np.float32([0.0, 0.3, 1.0 - 1e-6]):
    got = np.asarray(bounded_log_sigmoid(jnp.asarray(z, jnp.float32), jnp.full(7, b)))
    Z, B64 = np.clip(z, -80, 80), np.float64(b)
    low, high = np.minimum(Z, 0), np.maximum(Z, 0)
    want = np.where(
      Z < 0, np.log(np.exp(low) + B64) - np.log1p(np.exp(low)), np.log1p((B64 - 1) * sigmoid(-high))
    )
    # a logarithm below the smallest normal number is 0
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=np.finfo(np.float32).tiny)
  gradient = jax.vmap(jax.grad(bounded_log_sigmoid))(jnp.asarray(z, jnp.float32), jnp.zeros(7))
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  ('config', 'field'),
  [
    (GatedLinearAttention.Config(heads=3), 'expand_k'),
    (Retention.Config(heads=32), 'expand_k'),  # keys of one channel cannot be rotated
    (Retention.Config(heads=4, expand_v=0.3), 'expand_v'),
  ],
)
def test_heads_that_do_not_fit_are_refused(config, field):
  with pytest.raises(InputError, match=rf'\.{field} = '):
    config.build(D, None, None)


def test_states_do_not_grow():
  for config in (Retention.Config(heads=4), GatedLinearAttention.Config(heads=4)):
    assert (
      config.state_size(D, 10) == config.state_size(D, 1000) == 4 * np.prod(config.head_sizes(D))
    )
