"""The kernel of the generalized delta rule in interpret mode against the recurrence: outputs, last
state and all gradients; and its shards on a mesh.

Tolerances are relative to the largest magnitude: 1e-5 for outputs and states, 1e-4 for gradients
(fp32), those of the chunked implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.kernels.wkv7 import longest_chunk, wkv7_pallas
from jaxformer.ops.wkv7 import wkv7, wkv7_naive
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.helpers import forced

NAMES = ('y', 'state', 'dr', 'dw', 'dk', 'dv', 'da', 'db', 'dstate')
EXACT = jax.lax.Precision.HIGHEST
BOUND = -0.60653066  # of the log decay of RWKV-7


def inputs(B, T, H, K, V, *, kind='plain', seed=0):
  """Removal keys of length 1 and learning rates below 1, as the layer gives them; document starts
  at 0.1 of the tokens, none among the last three. `kind`: 'slow', hardly any decay and almost one
  key for all positions, where the triangular matrix is as far from the identity as it comes;
  'strong', the strongest decay everywhere."""
  keys = jax.random.split(jax.random.key(seed), 11)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)  # noqa: E731
  r, k, v = normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V)
  kappa = normal(3, B, T, H, K)
  rate, w = (jax.random.uniform(keys[i], (B, T, H, K)) for i in (4, 5))
  if kind == 'slow':
    kappa, rate, w = normal(10, 1, 1, H, K) + 0.01 * kappa, 1 - 0.01 * rate, 0.001 * w
  if kind == 'strong':
    w = jnp.ones_like(w)
  kappa /= jnp.linalg.norm(kappa, axis=-1, keepdims=True)
  starts = jax.random.bernoulli(keys[9], 0.1, (B, T)).at[:, -3:].set(False)
  return (
    (r, BOUND * w, k, v, -kappa, rate * kappa, normal(6, B, H, V, K)),
    starts & (kind == 'plain'),
    (normal(7, B, T, H, V), normal(8, B, H, V, K)),
  )


def recurrence(*arguments):
  *tokens, state, starts = arguments
  return wkv7_naive(state, *tokens, starts)


def kernel(*arguments, precision=EXACT, **options):
  *tokens, state, starts = arguments
  options = {'lowest_log_decay': BOUND, **options}
  return wkv7_pallas(state, *tokens, starts, precision=precision, **options)


def everything(f, arguments, starts, cotangents):
  """Outputs and gradients."""

  def run(arguments, cotangents):
    out, pull = jax.vjp(lambda *a: f(*a, starts), *arguments)
    return *out, *pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))

  return dict(zip(NAMES, jax.jit(run)(arguments, cotangents), strict=True))


def assert_near(got, want, tolerance):
  for name in NAMES:
    x, y = got[name].astype(jnp.float32), want[name].astype(jnp.float32)
    error, size = jnp.abs(x - y).max(), jnp.abs(y).max()
    assert x.shape == y.shape, name
    # false where not finite
    assert error <= tolerance[name[0] == 'd'] * size, f'{name}: {error} of {size}'


@pytest.mark.parametrize(
  ('shape', 'kind', 'chunk', 'span'),
  [
    ((2, 40, 2, 8, 6), 'plain', 16, 2),  # a padded block of tokens; sizes that fill no lanes
    ((1, 70, 3, 64, 64), 'plain', 32, 1),  # an odd head beside blocks of two; padded tokens
    ((1, 40, 5, 64, 64), 'plain', 16, 2),  # several groups of heads, of which the last is padded
    ((1, 64, 1, 16, 8), 'slow', 64, 1),
    ((1, 64, 1, 16, 16), 'strong', 64, 1),  # the longest chunk: factors of exp(19.4) on both sides
    ((1, 32, 1, 16, 128), 'plain', 16, 1),  # a state whose values fill the lanes
  ],
  ids=str,
)
def test_kernel_is_the_recurrence(shape, kind, chunk, span):
  case = inputs(*shape, kind=kind)
  got = everything(lambda *a: kernel(*a, chunk=chunk, span=span), *case)
  assert_near(got, everything(recurrence, *case), (1e-5, 1e-4))


def test_other_delta_rules():
  """Kimi Delta Attention, S_{t-1} (diag(exp(w)) - beta (exp(w) k) k^T), here with keys that fill
  the lanes, and decays as strong as the length of a chunk, which follows from them, allows."""
  lowest = -5.0
  assert longest_chunk(lowest) == 16
  (r, w, _, v, a, b, state), starts, cotangents = inputs(1, 40, 1, 128, 16)
  w, k, beta = lowest * jnp.abs(jnp.sin(jnp.arange(40.0)))[None, :, None, None] * r**0, -a, b / -a
  case = r, w, beta * k, v, -beta * jnp.exp(w) * k, k, state
  got = everything(lambda *x: kernel(*x, lowest_log_decay=lowest), case, starts, cotangents)
  assert_near(got, everything(recurrence, case, starts, cotangents), (1e-5, 1e-4))


def test_strongest_decay_of_a_chunk():
  with pytest.raises(ValueError, match='must be at least -10'):
    longest_chunk(-10.1)


def test_kernel_continues():
  """Two calls, the second from the state of the first, as one."""
  (*tokens, state), starts, _ = inputs(1, 40, 2, 16, 16)
  run = jax.jit(lambda tokens, state, starts: kernel(*tokens, state, starts, chunk=8))
  first, middle = run([x[:, :20] for x in tokens], state, starts[:, :20])
  second, last = run([x[:, 20:] for x in tokens], middle, starts[:, 20:])
  want, want_last = jax.jit(recurrence)(*tokens, state, starts)
  y = jnp.concatenate([first, second], axis=1)
  assert jnp.abs(y - want).max() <= 1e-5 * jnp.abs(want).max()
  assert jnp.abs(last - want_last).max() <= 1e-5 * jnp.abs(want_last).max()


def test_documents_do_not_see_each_other():
  """Changing the first document and the state before it leaves the second as it was, to the bit."""
  (*tokens, state), _, _ = inputs(1, 40, 2, 16, 16)
  starts = jnp.zeros((1, 40), bool).at[:, 21].set(True)
  run = jax.jit(lambda tokens, state: kernel(*tokens, state, starts, chunk=16))
  y, last = run(tokens, state)
  changed, changed_last = run([x.at[:, :21].multiply(0.5) for x in tokens], -state)
  assert (y[:, 21:] == changed[:, 21:]).all()
  assert (last == changed_last).all()
  assert (y[:, :21] != changed[:, :21]).all()


@pytest.mark.parametrize('kind', ['plain', 'slow'])
def test_bf16_is_near(kind):
  """Rounded operands, summed in fp32: a few roundings of bf16 (0.4 %) of the largest number. Each
  gradient has the dtype of its input."""
  (r, w, k, v, a, b, state), *rest = inputs(1, 64, 2, 64, 64, kind=kind)
  rounded = r.astype(jnp.bfloat16), w, k, v.astype(jnp.bfloat16), a, b, state
  got = everything(lambda *x: kernel(*x, precision=None), rounded, *rest)
  assert got['y'].dtype == got['dr'].dtype == got['dv'].dtype == jnp.bfloat16
  assert got['state'].dtype == got['dw'].dtype == got['dk'].dtype == jnp.float32
  same = tuple(x.astype(jnp.float32) for x in rounded)
  assert_near(got, everything(recurrence, same, *rest), (0.012, 0.012))


def test_the_kernel_can_be_forced():
  (*tokens, state), starts, _ = inputs(1, 20, 2, 16, 16)
  with implementation(wkv7='pallas'):
    jaxpr = jax.make_jaxpr(lambda *a: wkv7(*a, state, starts))(*tokens)
  assert 'pallas_call' in str(jaxpr)
  assert 'pallas_call' not in str(jax.make_jaxpr(lambda *a: wkv7(*a, state, starts))(*tokens))


@pytest.mark.parametrize(
  'mesh',
  [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, context=4)],
  ids=['batch and heads', 'batch and time'],
)
def test_shards_equal_one_device(mesh):
  """Also where the state travels between parts of a sequence."""
  case = inputs(4, 32, 2, 16, 16)
  want = everything(recurrence, *case)
  with use_mesh(make_parallel(mesh)):
    got = everything(forced(wkv7, wkv7='pallas'), *case)
  assert len(got['y'].sharding.device_set) == 8
  assert_near(got, want, (1e-5, 1e-4))
