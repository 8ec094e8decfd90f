"""Mamba-3 against a recurrence in complex numbers written from the paper (NumPy, float64), and its
initial values.

Tolerance: 1e-6 of the largest magnitude, of a layer in fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.mamba3 import Mamba3
from jaxformer.layers.norm import RMSNorm
from jaxformer.ops.implementation import implementation
from tests.layers.initial import built, log_uniform, uniform, values
from tests.tiers import case

pytestmark = pytest.mark.quick
BATCH, LENGTH, WIDTH = 2, 19, 32
BORDERS = (0, 5), (0, 6, 7)  # where documents begin in each row
CONFIGS = {
  'siso': Mamba3.Config(d_state=6, head_dim=16, rotary=0.7, rate_floor=0.8),
  'mimo': Mamba3.Config(
    d_state=8, head_dim=16, groups=2, rank=3, bias=True, map_norm=RMSNorm(eps=0.1)
  ),
  'normed': Mamba3.Config(d_state=4, head_dim=32, rank=2, rotary=1.0, out_norm_eps=1e-3),
}


def softplus(x):
  return np.logaddexp(0, x)


def silu(x):
  return x / (1 + np.exp(-x))


def normed(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def paper(c, p, u):
  """One document `[T, D]`: the outputs and the last state, complex, `[H, P, N - A]`, without
  rotations of B and C: alpha is complex (proposition 2), and y the real part."""
  T, H, P, N, R, A = len(u), p['D'].size, c.head_dim, c.d_state, c.rank or 1, c.angles

  def dense(name, x):
    return x @ p[f'{name}.kernel'] + p.get(f'{name}.bias', 0)

  def as_complex(maps):
    rotated = maps[..., :A] + 1j * maps[..., A : 2 * A]
    return np.concatenate([rotated, maps[..., 2 * A :].astype(complex)], axis=-1)

  z, x = (dense(n, u).reshape(T, H, P) for n in 'zx')
  raw = np.moveaxis(dense('bc', u).reshape(T, 2, c.groups, R, N), 1, 0)
  maps = (normed(m, p[f'{n}_norm.scale'], c.map_norm.eps) for m, n in zip(raw, 'BC', strict=True))
  maps = (np.repeat(m, H // c.groups, axis=1) for m in maps)
  B, C = (as_complex(m + p[f'{n}_bias']) for m, n in zip(maps, 'BC', strict=True))
  dt = softplus(dense('dt', u) + p['dt_bias'])
  rate = -np.maximum(softplus(dense('rate', u)), c.rate_floor)
  trapezoid = 1 / (1 + np.exp(-dense('trapezoid', u)))
  theta = np.pad(np.pi * np.tanh(dense('theta', u)), ((0, 0), (0, N - 2 * A)))
  ones = np.ones((H, R, P))
  up, gate, down = (p.get(n, ones) for n in ('up', 'gate', 'down'))
  h, before, outputs = np.zeros((H, P, N - A), complex), 0.0, []
  for t in range(T):
    v = x[t, :, None] * up
    alpha = np.exp(dt[t, :, None] * (rate[t, :, None] - 1j * theta[t]))[:, None]
    beta = (1 - trapezoid[t])[:, None, None] * dt[t, :, None, None] * alpha
    gamma = (trapezoid[t] * dt[t])[:, None, None]
    added = np.einsum('hrp,hrn->hpn', v, B[t])
    h = alpha * h + beta * before + gamma * added
    y = np.einsum('hpn,hrn->hrp', h, C[t].conj()).real + p['D'][:, None, None] * v
    if c.out_norm_eps is not None:
      y = normed(y, p['norm.scale'].reshape(H, 1, P), c.out_norm_eps)
    outputs.append(np.sum(y * silu(z[t, :, None] * gate) * down, axis=1).ravel())
    before = added
  return dense('out', np.array(outputs)), h


def near(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want)
  assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.parametrize('name', [case(n, standing=n == 'mimo', id=n) for n in CONFIGS])
def test_layer_is_that_of_the_paper(name):
  """Outputs and last states, of several documents, step by step and in chunks."""
  c = CONFIGS[name]
  layer = c.build(WIDTH, nnx.Rngs(params=0), LayerPosition())
  graph, params = nnx.split(layer)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)
  flat = {
    '.'.join(map(str, path)): np.asarray(v[...], np.float64)
    for path, v in nnx.to_flat_state(params)
  }
  u = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
  segments = np.zeros((BATCH, LENGTH), int)
  for row, borders in zip(segments, BORDERS, strict=True):
    for border in borders:
      row[border:] += 1
  layer, ctx = nnx.merge(graph, params), Context(segments_BT=jnp.asarray(segments))
  for form in ('naive', 'chunked'):
    with implementation(mamba3=form):
      out = jax.jit(lambda u, s: layer(u, ctx, s))(u, layer.init_state(BATCH, LENGTH))
    for b, borders in enumerate(BORDERS):
      for first, end in zip(borders, (*borders[1:], LENGTH), strict=True):
        y, h = paper(c, flat, np.asarray(u, np.float64)[b, first:end])
        near(out.y[b, first:end], y)
      A = c.angles
      h = np.concatenate([h[..., :A].real, h[..., :A].imag, h[..., A:].real], axis=-1)
      near(out.state.h_BHPN[b], h)


def test_initial_values():
  """mamba_ssm/modules/mamba3.py (state-spaces/mamba, commit 0348a3d)."""
  c = Mamba3.Config(d_state=32, head_dim=1, rank=2, bias=True, out_norm_eps=1e-5)
  info = built(c, 128)
  v = values(c, 128)
  for name in ('z', 'x', 'bc', 'dt', 'rate', 'trapezoid', 'theta'):
    uniform(v[f'{name}.kernel'], 128**-0.5)
    assert not v[f'{name}.bias'].any()
  uniform(v['out.kernel'], (256 * 6) ** -0.5)
  log_uniform(np.log1p(np.exp(v['dt_bias'].astype(np.float64))), 1e-3, 1e-1)
  for name in ('B_bias', 'C_bias', 'D', 'gate', 'B_norm.scale', 'C_norm.scale', 'norm.scale'):
    assert (v[name] == 1).all()
  assert (v['up'] == 0.5).all()
  assert (v['down'] == 0.5).all()
  assert v['B_bias'].shape == (256, 2, 32)
  assert v['theta.kernel'].shape == (128, 8)
  kept = {n for n, p in info.items() if p.get_metadata()['full_precision']}
  assert kept == {'dt_bias', 'B_bias', 'C_bias', 'D', 'up', 'gate', 'down'}
  assert {n for n, p in info.items() if p.get_metadata()['decay']} == {
    n for n in v if n.endswith('.kernel')
  }


def test_a_state_of_one_number_has_no_pair():
  with pytest.raises(InputError, match='rotary'):
    Mamba3.Config(d_state=3, rotary=0.5)
