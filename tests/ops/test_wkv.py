"""The recurrences of RWKV-4 and of RWKV-5 and 6: every fast implementation agrees with the naive
one in outputs, states and gradients, the gradient of the incoming state included; and the naive one
means what the papers' sums say.

Tolerances are relative to the largest magnitude: 1e-5 for outputs and states, 1e-4 for gradients
(fp32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.wkv4 import Wkv4State, wkv4
from jaxformer.ops.wkv6 import wkv6
from tests.helpers import forced

quick = pytest.mark.quick


def close(got, want, rtol):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all(), jax.tree_util.keystr(path)
    gap, scale = np.abs(a - b).max(initial=0.0), max(np.abs(b).max(initial=0.0), 1e-3)
    assert gap <= rtol * scale, (
      f'{jax.tree_util.keystr(path)}: differs by {gap:.2e} where values reach {scale:.2e}'
    )


def starts(B, T, seed=0, rate=0.1):
  return jnp.asarray(np.random.default_rng(seed).random((B, T)) < rate)


def results(op, arguments, begins, chosen, chunk):
  """((y, state), gradients of a scalar that all of it bears on)."""

  def scalar(arguments):
    out = forced(op, **{op.__name__: chosen})(*arguments, begins, chunk=chunk)
    leaves = jax.tree.leaves(out)
    weights = [
      jnp.sin(1.0 + jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in leaves
    ]
    return sum(jnp.sum(w * x) for w, x in zip(weights, leaves, strict=True)), out

  gradients, out = jax.jit(jax.grad(scalar, has_aux=True))(arguments)
  return out, gradients


# ---- RWKV-4 ------------------------------------------------------------------------------------


def arrays4(T, w=None, fresh=False, B=2, D=6):
  r = np.random.default_rng(T)
  k, v, u = r.normal(0, 2, (B, T, D)), r.normal(0, 1, (B, T, D)), r.normal(0, 1, D)
  w = np.exp(r.normal(-1, 2, D)) if w is None else np.full(D, w)
  state = (
    Wkv4State.empty(B, D)
    if fresh
    else Wkv4State(
      *(
        jnp.asarray(x, jnp.float32)
        for x in (r.normal(0, 1, (B, D)), np.exp(r.normal(0, 1, (B, D))), r.normal(0, 2, (B, D)))
      )
    )
  )
  return *(jnp.asarray(x, jnp.float32) for x in (k, v, w, u)), state


@quick
def test_wkv4_is_the_weighted_mean():
  k, v, w, u, _ = arrays4(9)
  y, _ = forced(wkv4, wkv4='naive')(k, v, w, u, None, starts(2, 9, rate=0.0))
  k, v, w, u = (np.asarray(x, np.float64) for x in (k, v, w, u))
  for t in range(9):
    weights = np.stack(
      [np.exp(-(t - 1 - i) * w + k[:, i]) for i in range(t)] + [np.exp(u + k[:, t])]
    )
    expected = (weights * np.moveaxis(v[:, : t + 1], 1, 0)).sum(0) / weights.sum(0)
    np.testing.assert_allclose(y[:, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('chosen', ['chunked', 'associative'])
@pytest.mark.parametrize(
  ('T', 'w', 'fresh'), [(1, None, True), (21, None, False), (16, np.exp(3.0), True)]
)
def test_wkv4_fast_implementations_equal_the_naive_one(chosen, T, w, fresh):
  """Chunks of 8: complete ones, and a remainder. Decays from none to strong: e^3 is the strongest
  of RWKV-4's initial ones."""
  arguments, begins = arrays4(T, w, fresh), starts(2, T)
  fast, naive = (results(wkv4, arguments, begins, f, 8) for f in (chosen, 'naive'))
  close(fast[0], naive[0], 1e-5)
  close(fast[1], naive[1], 1e-4)


# ---- RWKV-5 and 6 ------------------------------------------------------------------------------


def arrays6(T, log_decay=None, static=False, B=2, H=2, K=4, V=3):
  n = np.random.default_rng(T)
  shape = (1, 1, H, K) if static else (B, T, H, K)
  decay = -np.exp(n.normal(-1, 2, shape)) if log_decay is None else np.full(shape, log_decay)
  arrays = (
    *(n.normal(0, 1, (B, T, H, d)) for d in (K, K, V)),
    decay,
    n.normal(0, 1, (H, K)),
    n.normal(0, 1, (B, H, K, V)),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


@quick
def test_wkv6_is_the_decayed_sum():
  r, k, v, log_decay, u, _ = arrays6(9)
  y, last = forced(wkv6, wkv6='naive')(r, k, v, log_decay, u, None, starts(2, 9, rate=0.0))
  r, k, v, log_decay, u = (np.asarray(x, np.float64) for x in (r, k, v, log_decay, u))

  def reaches(i, t):  # what is left of token i at token t
    return np.exp(log_decay[:, i + 1 : t].sum(1))

  for t in range(9):
    own = (r[:, t] * u[None] * k[:, t]).sum(-1, keepdims=True) * v[:, t]
    expected = own + sum(
      (r[:, t] * k[:, i] * reaches(i, t)).sum(-1, keepdims=True) * v[:, i] for i in range(t)
    )
    np.testing.assert_allclose(y[:, t], expected, rtol=1e-5, atol=1e-5)
  expected = sum((k[:, i] * reaches(i, 9))[..., None] * v[:, i, :, None] for i in range(9))
  np.testing.assert_allclose(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('T', 'log_decay', 'static'),
  [
    (1, None, False),
    (21, None, False),
    (16, -np.exp(3.0), False),
    (5, -1e6, False),
    (21, None, True),
  ],
)
def test_wkv6_chunked_equals_naive(T, log_decay, static):
  """Chunks of 8: complete ones, and a remainder. Decays from nearly none to so strong that a step
  leaves nothing."""
  arguments, begins = arrays6(T, log_decay, static), starts(2, T)
  fast, naive = (results(wkv6, arguments, begins, f, 8) for f in ('chunked', 'naive'))
  close(fast[0], naive[0], 1e-5)
  close(fast[1], naive[1], 1e-4)


@quick
def test_a_strong_decay_takes_no_digits_from_later_weak_ones():
  """Differences of cumulative sums would: after a sum of -2e4 the log decays here are below its
  last digit."""
  r, k, v, _, u, state = arrays6(16)
  log_decay = jnp.full(r.shape, -1e-3).at[:, 1].set(-2e4)
  begins = starts(2, 16, rate=0.0)
  fast, naive = (
    jax.jit(forced(wkv6, wkv6=f))(r, k, v, log_decay, u, state, begins)
    for f in ('chunked', 'naive')
  )
  close(fast, naive, 1e-6)


# ---- both --------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize(('op', 'arrays'), [(wkv4, arrays4), (wkv6, arrays6)], ids=['wkv4', 'wkv6'])
def test_dtypes_and_implementations(op, arrays):
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays(6)[:-1])
  y, state = op(*low, None, starts(2, 6))
  assert y.dtype == jnp.bfloat16
  assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype('float32')}
  y32, _ = op(*(x.astype(jnp.float32) for x in low), None, starts(2, 6))
  np.testing.assert_array_equal(y, y32.astype(jnp.bfloat16))
  with pytest.raises(ValueError, match=r"= 'fast': must be one of naive, chunked"):
    forced(op, every='naive', **{op.__name__: 'fast'})(*low, None, starts(2, 6))
