"""The fast implementations of the selective scan and of state-space duality agree with the naive
ones;
the short convolution means its sum.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states,
1e-4 for gradients (fp32)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import selective_scan as scan_ops
from jaxformer.ops import ssd as ssd_ops
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.implementation import implementation

pytestmark = pytest.mark.quick

BATCH, LENGTH, CHUNK = 2, 37, 8  # a remainder of 5


def starts(length=LENGTH):
  """Borders inside a chunk, at the first step of one, at the last, and two in a row; the other row
  has one at the very first."""
  rows = np.zeros((BATCH, length), bool)
  rows[0, [3, 8, 15, 16, 30]] = True
  rows[1, [0, 21]] = True
  return jnp.asarray(rows)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def steps(seed, *shape):
  """Positive step sizes over three orders of magnitude."""
  return jnp.exp(1.5 * normal(seed, *shape) - 2)


def scan_arrays():
  D, N = 6, 3
  return (
    normal(0, BATCH, LENGTH, D),
    steps(1, BATCH, LENGTH, D),
    -jnp.exp(normal(2, D, N)),
    normal(3, BATCH, LENGTH, N),
    normal(4, BATCH, LENGTH, N),
    normal(5, D),
    normal(6, BATCH, D, N),
  )


def ssd_arrays(G=2):
  H, P, N = 4, 3, 5
  # the last forgets all but the present within a chunk
  rates = -jnp.asarray([0.1, 1.0, 16.0, 200.0])
  return (
    normal(0, BATCH, LENGTH, H, P),
    steps(1, BATCH, LENGTH, H),
    rates,
    normal(3, BATCH, LENGTH, G, N),
    normal(4, BATCH, LENGTH, G, N),
    normal(5, H),
    normal(6, BATCH, H, P, N),
  )


OPERATIONS = {
  'selective_scan': (scan_ops.selective_scan, scan_arrays, scan_ops.SELECTIVE_SCAN.table),
  'ssd': (ssd_ops.ssd, ssd_arrays, ssd_ops.SSD.table),
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
  monkeypatch.setattr(scan_ops, 'CHUNK', CHUNK)
  monkeypatch.setattr(ssd_ops, 'CHUNK', dict.fromkeys(ssd_ops.CHUNK, CHUNK))


def close(got, want, rtol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= rtol * np.abs(b).max()


def run(operation, chosen, arrays, begins):
  """(output, state), and the gradients of a number that every output and the last state bear on."""

  def value(arrays):
    y, h = operation(*arrays, begins)
    return jnp.sum(jnp.sin(y) * normal(7, *y.shape)) + jnp.sum(jnp.cos(h)), (y, h)

  with implementation(every=chosen):
    (_, results), gradients = jax.jit(jax.value_and_grad(value, has_aux=True))(arrays)
  return results, gradients


@pytest.mark.parametrize('name', OPERATIONS)
def test_fast_equals_naive(name):
  """Outputs, last states, and the gradients of all arrays, the first state among them, over several
  chunks with a remainder."""
  operation, arrays, table = OPERATIONS[name]
  want = run(operation, 'naive', arrays(), starts())
  for chosen in set(table) - {'naive'}:
    got = run(operation, chosen, arrays(), starts())
    close(got[0], want[0], 1e-5)
    close(got[1], want[1], 1e-4)
  assert all(np.abs(g).max() > 1e-3 for g in want[1])


@pytest.mark.parametrize('name', OPERATIONS)
def test_a_border_hides_what_was_before(name):
  """After a border nothing depends on the state or on earlier tokens."""
  operation, arrays, _ = OPERATIONS[name]
  begins = jnp.zeros((BATCH, LENGTH), bool).at[:, 20].set(True)
  y, h = operation(*arrays(), begins)
  cut = [a[:, 20:] if a.ndim > 1 and a.shape[1] == LENGTH else a for a in arrays()[:-1]]
  close((y[:, 20:], h), operation(*cut, None, jnp.zeros((BATCH, LENGTH - 20), bool)), 1e-5)


@pytest.mark.parametrize('name', OPERATIONS)
def test_gradients_keep_few_states(name):
  """What the forward pass keeps: the inputs and the states between chunks, not those of all
  tokens."""
  operation, arrays, _ = OPERATIONS[name]
  arrays = arrays()
  state, chunks = arrays[-1].size, -(-LENGTH // CHUNK)
  kept = jax.eval_shape(lambda *a: jax.vjp(lambda *a: operation(*a, starts()), *a)[1], *arrays)
  assert max(a.size for a in jax.tree.leaves(kept)) <= max(
    chunks * state, 2 * max(a.size for a in arrays)
  )
  with implementation(every='naive'):
    kept = jax.eval_shape(lambda *a: jax.vjp(lambda *a: operation(*a, starts()), *a)[1], *arrays)
  assert max(a.size for a in jax.tree.leaves(kept)) >= LENGTH * state


@pytest.mark.parametrize('name', OPERATIONS)
def test_half_precision_inputs(name):
  """Results in the type of the input and near those in fp32, the state in fp32."""
  operation, arrays, _ = OPERATIONS[name]
  u, dt, A, B, C, D, h = arrays()
  want, _ = operation(u, dt, A, B, C, D, h, starts())
  low = [a.astype(jnp.bfloat16) for a in (u, B, C)]
  y, state = operation(low[0], dt, A, *low[1:], D, h, starts())
  assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  assert np.abs(np.asarray(y, np.float32) - want).max() < 0.03 * np.abs(want).max()


@pytest.mark.parametrize('name', OPERATIONS)
def test_unknown_implementations_are_named(name):
  operation, arrays, _ = OPERATIONS[name]
  with (
    implementation(**{name: 'fastest'}),
    pytest.raises(ValueError, match=f"{name} = 'fastest': must be one of naive, chunked"),
  ):
    operation(*arrays(), starts())


def test_heads_must_fill_the_groups():
  with pytest.raises(ValueError, match='4 heads are no multiple of 3 groups'):
    ssd_ops.ssd(*ssd_arrays(G=3), starts())


# ---- the short convolution ---------------------------------------------------------------------


def convolved(x, w, b, before, begins):
  """The sum, weight by weight."""
  K, y = len(w), np.zeros_like(x)
  for row in range(x.shape[0]):
    seen = [np.asarray(v) for v in before[row]]
    for t in range(x.shape[1]):
      if begins[row, t]:
        seen = [np.zeros_like(v) for v in seen]
      seen.append(x[row, t])
      y[row, t] = b + sum(w[k] * seen[len(seen) - K + k] for k in range(K))
  return y


@pytest.mark.parametrize('d_conv', [1, 2, 4])
def test_convolution_is_the_sum(d_conv):
  x, w, b, before = (
    np.asarray(normal(i, *s))
    for i, s in enumerate(((BATCH, LENGTH, 3), (d_conv, 3), (3,), (BATCH, d_conv - 1, 3)))
  )
  y, after = short_convolution(*map(jnp.asarray, (x, w, b, before)), starts())
  close(y, jnp.asarray(convolved(x, w, b, before, np.asarray(starts()))), 1e-5)
  close(after, jnp.asarray(x[:, LENGTH - d_conv + 1 :]), 1e-5) if d_conv > 1 else None
  without = short_convolution(jnp.asarray(x), jnp.asarray(w), None, None, starts())[0]
  close(without, jnp.asarray(convolved(x, w, 0 * b, 0 * before, np.asarray(starts()))), 1e-5)


@pytest.mark.parametrize('cut', [1, 2, 9, 17, 31])
def test_convolution_continues_exactly(cut):
  """In two calls as in one, with a border right before the cut, at it, and shortly before it; calls
  shorter than the kernel too."""
  x, w, b, before = (
    normal(0, BATCH, LENGTH, 3),
    normal(1, 4, 3),
    normal(2, 3),
    normal(3, BATCH, 3, 3),
  )
  y, after = short_convolution(x, w, b, before, starts())
  first, between = short_convolution(x[:, :cut], w, b, before, starts()[:, :cut])
  second, last = short_convolution(x[:, cut:], w, b, between, starts()[:, cut:])
  np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), y)
  np.testing.assert_array_equal(last, after)
