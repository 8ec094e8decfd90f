"""H3 against its systems written out as dense matrices, in complex128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.h3 import H3
from jaxformer.layers.layer import Context, LayerPosition

B, T, D, N = 2, 23, 12, 6


def dense(layer: H3, x_BTD: np.ndarray) -> np.ndarray:
  """The layer as Fu et al. 2023 write it: x_t = A x_{t-1} + B u_t, y_t = C x_t + D u_t, with both
  conjugates of every state."""
  p = {
    '.'.join(map(str, path)): np.asarray(v[...], np.float64)
    for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))
  }
  K, H, cell = layer.config.head_dim, layer.heads, layer.config.d_state
  q, k, v = (x_BTD @ p[f'{n}.kernel'] + p[f'{n}.bias'] for n in 'qkv')
  dt, shift = np.exp(p['log_dt']), np.eye(cell, k=-1)
  a = -np.exp(p['log_decay']) + 1j * p['frequency']
  a = np.concatenate([a, a.conj()], axis=1)  # [H, N]
  b, c = (np.concatenate([z := p[n][..., 0] + 1j * p[n][..., 1], z.conj()], axis=1) for n in 'bc')
  inverse = 1 / (1 - 0.5 * dt[:, None] * a)
  abar, bbar = inverse * (1 + 0.5 * dt[:, None] * a), inverse * dt[:, None] * b
  keys, memory, out = np.zeros((B, D, cell)), np.zeros((B, H, K, K, cell), complex), []
  for t in range(x_BTD.shape[1]):
    keys = keys @ shift.T + p['shift_b'] * k[:, t, :, None]
    k_t = (keys * p['shift_c']).sum(-1) + p['shift_skip'] * k[:, t]
    z = k_t.reshape(B, H, K, 1) * v[:, t].reshape(B, H, 1, K)
    memory = abar[:, None, None] * memory + bbar[:, None, None] * z[..., None]
    s = (memory * c[:, None, None]).sum(-1) + p['skip'][:, None, None] * z
    assert np.abs(s.imag).max() < 1e-9
    # channels in the order (d h)
    y = np.einsum('bhj,bhjk->bkh', q[:, t].reshape(B, H, K), s.real)
    out.append(y.reshape(B, D) @ p['o.kernel'] + p['o.bias'])
  return np.stack(out, axis=1)


@pytest.mark.quick
@pytest.mark.parametrize('head_dim', [1, 3])
def test_equals_the_dense_recurrence(head_dim):
  layer = H3.Config(head_dim=head_dim, d_state=N, dt_min=0.05, dt_max=0.5).build(
    D, nnx.Rngs(0), LayerPosition()
  )
  random = np.random.default_rng(0)
  for parameter in jax.tree.leaves(layer, is_leaf=lambda v: isinstance(v, nnx.Param)):
    parameter[...] = parameter[...] + jnp.asarray(
      random.normal(0, 0.3, parameter.shape), jnp.float32
    )
  x = random.normal(size=(B, T, D)).astype(np.float32)
  expected = dense(layer, x.astype(np.float64))
  y = jax.jit(lambda x: layer(x, Context()).y)(jnp.asarray(x))
  np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.quick
def test_starts_as_published():
  """B = e_1 of the shift system, so that its filter is C; a bilinear S4D-Lin; steps log-uniform; no
  learning-rate scale."""
  layer = H3.Config().build(64, nnx.Rngs(0), LayerPosition())
  shift, diagonal = layer.systems()
  np.testing.assert_array_equal(shift.c_MHN[0], layer.shift_c[...])
  assert np.abs(layer.shift_c[...]).max() <= 1 / 8
  np.testing.assert_allclose(layer.frequency[0], np.pi * np.arange(32), rtol=1e-6)
  np.testing.assert_allclose(np.exp(layer.log_decay[0]), 0.5, rtol=1e-6)
  dt = np.exp(np.asarray(layer.log_dt[...]))
  assert dt.min() >= 0.999e-3
  assert dt.max() <= 0.1001
  assert np.median(dt) == pytest.approx(1e-2, rel=0.5)
  a = dt[:, None] * (-0.5 + 1j * np.pi * np.arange(32))
  np.testing.assert_allclose(
    np.exp(np.asarray(diagonal.log_a_HP, complex)), (1 + a / 2) / (1 - a / 2), rtol=1e-4
  )
