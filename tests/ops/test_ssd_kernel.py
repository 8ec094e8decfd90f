"""The kernel of state-space duality in interpret mode against the recurrence in fp64: outputs, last
state and all gradients; and its shards on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.kernels.ssd import ssd_pallas
from jaxformer.ops.ssd import ssd
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.helpers import forced

NAMES = ('y', 'state', 'dx', 'ddt', 'dA', 'dB', 'dC', 'dD', 'dstate')


def recurrence(x, dt, A, B, C, D, state, starts):
  def step(h, now):
    x, dt, B, C, start = now
    B, C = (jnp.repeat(a, x.shape[1] // a.shape[1], axis=1) for a in (B, C))
    h = jnp.where(start[:, None, None, None], 0.0, h)
    h = jnp.exp(dt * A[None])[..., None, None] * h + (dt[..., None] * x)[..., None] * B[:, :, None]
    return h, jnp.sum(h * C[:, :, None], axis=-1) + D[None, :, None] * x

  time_first = [jnp.moveaxis(x, 1, 0) for x in (x, dt, B, C, starts)]
  state, y = jax.lax.scan(step, state, tuple(time_first))
  return jnp.moveaxis(y, 0, 1), state


def kernel(x, dt, A, B, C, D, state, starts, **options):
  if state is None:
    state = jnp.zeros((x.shape[0], *x.shape[2:], B.shape[-1]))
  return ssd_pallas(state, x, dt, A, B, C, D, starts, **options)


def inputs(B, T, H, P, G, N, *, strong=False, seed=0):
  """Log decays around -0.3, or between about -1e-3 and -1e4; starts of documents at 0.1 of the
  tokens."""
  random = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  dt = jnp.exp((3 if strong else 1) * normal(B, T, H) - 1)
  A = -jnp.exp((2 if strong else 0.5) * normal(H))
  arguments = (
    normal(B, T, H, P),
    dt,
    A,
    normal(B, T, G, N),
    normal(B, T, G, N),
    normal(H),
    normal(B, H, P, N),
  )
  starts = random.random((B, T)) < 0.1
  starts[:, -3:] = False
  return arguments, jnp.asarray(starts), (normal(B, T, H, P), normal(B, H, P, N))


def everything(f, arguments, starts, cotangents):
  """Outputs and gradients."""

  def run(arguments, cotangents):
    out, pull = jax.vjp(lambda *a: f(*a, starts), *arguments)
    return *out, *pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))

  return dict(zip(NAMES, jax.jit(run)(arguments, cotangents), strict=True))


def exact(arguments, starts, cotangents):
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
    found = everything(recurrence, wide[0], starts, wide[1])
    return {name: np.asarray(x) for name, x in found.items()}


def assert_near(got, want, tolerance):
  """Relative to the largest number: of outputs and states, and of gradients."""
  for name in NAMES:
    error, size = np.abs(np.asarray(got[name], np.float64) - want[name]).max(), np.abs(want[name])
    assert got[name].shape == want[name].shape, name
    # false where not finite
    assert error <= tolerance[name[0] == 'd'] * size.max(), f'{name}: {error} of {size.max()}'


@pytest.mark.parametrize(
  ('shape', 'strong', 'options'),
  [
    ((2, 40, 4, 16, 2, 16), False, {'chunk': 16}),  # two groups; a padded chunk
    ((1, 37, 5, 64, 1, 24), True, {'chunk': 8, 'unroll': (1, 1)}),  # an odd head in blocks of two
    ((1, 20, 2, 128, 1, 8), True, {'chunk': 8}),  # heads of complete vectors of lanes
    ((1, 24, 1, 20, 1, 12), False, {'chunk': 64}),  # one chunk
  ],
  ids=str,
)
def test_kernel_is_the_recurrence(shape, strong, options):
  case = inputs(*shape, strong=strong)
  got = everything(lambda *a: kernel(*a, **options), *case)
  assert_near(got, exact(*case), (1e-5, 1e-4))


def test_small_decays_after_large_ones_keep_their_digits():
  """Decays of 0.99 after one of exp(-100) in every fourth token: sums of logs from the start of the
  chunk are around -400, and their differences wrong from the fifth digit on."""
  (x, dt, A, *rest), starts, cotangents = inputs(1, 32, 2, 64, 1, 16)
  dt = jnp.full_like(dt, 0.01).at[:, ::4].set(100.0)
  case = (x, dt, -jnp.ones_like(A), *rest), jnp.zeros_like(starts), cotangents
  got, want = everything(lambda *a: kernel(*a, chunk=16), *case), exact(*case)
  # after the last large one, where all that is read was written with small steps
  assert np.abs(got['state'] - want['state']).max() <= 1e-5 * np.abs(want['state']).max()
  for name in ('y', 'dx'):
    assert np.abs(got[name] - want[name])[:, 1::4].max() <= 1e-5 * np.abs(want[name][:, 1::4]).max()
  error = np.abs(got['ddt'] - want['ddt'])[:, 1::4]
  assert error.max() <= 1e-4 * np.abs(want['ddt'][:, 1::4]).max()


def test_kernel_starts_from_zeros_and_continues():
  """Two calls, the first without a state, the second from the state of the first, as one from
  zeros."""
  (x, dt, A, B, C, D, state), starts, _ = inputs(1, 40, 4, 16, 2, 16)
  run = jax.jit(
    lambda x, dt, B, C, state, starts: kernel(x, dt, A, B, C, D, state, starts, chunk=16)
  )
  first, middle = run(*(a[:, :20] for a in (x, dt, B, C)), None, starts[:, :20])
  second, last = run(*(a[:, 20:] for a in (x, dt, B, C)), middle, starts[:, 20:])
  want, want_last = jax.jit(recurrence)(x, dt, A, B, C, D, jnp.zeros_like(state), starts)
  assert (
    jnp.abs(jnp.concatenate([first, second], axis=1) - want).max() <= 1e-5 * jnp.abs(want).max()
  )
  assert jnp.abs(last - want_last).max() <= 1e-5 * jnp.abs(want_last).max()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_documents_do_not_see_each_other(dtype):
  """Changing the first document and the state before it leaves the second as it was, to the bit."""
  (x, dt, A, B, C, D, state), _, _ = inputs(1, 40, 2, 16, 1, 16)
  x, B, C = (a.astype(dtype) for a in (x, B, C))
  starts = jnp.zeros((1, 40), bool).at[:, 21].set(True)
  run = jax.jit(lambda x, B, C, state: kernel(x, dt, A, B, C, D, state, starts, chunk=16))
  y, last = run(x, B, C, state)
  doubled = (a.at[:, :21].multiply(2.0) for a in (x, B, C))
  changed, changed_last = run(*doubled, -state)
  assert (y[:, 21:] == changed[:, 21:]).all()
  assert (last == changed_last).all()
  assert (y[:, :21] != changed[:, :21]).mean() > 0.9


@pytest.mark.parametrize('strong', [False, True])
def test_bf16_is_near(strong):
  """Rounded operands, summed in fp32: a few roundings of bf16 (0.4 %) of the largest number."""
  (x, dt, A, B, C, *rest), starts, cotangents = inputs(2, 40, 4, 16, 2, 16, strong=strong)
  rounded = tuple(a.astype(jnp.bfloat16) for a in (x, B, C))
  case = (rounded[0], dt, A, *rounded[1:], *rest)
  got = everything(lambda *a: kernel(*a, chunk=16), case, starts, cotangents)
  assert got['y'].dtype == got['dx'].dtype == got['dB'].dtype == jnp.bfloat16
  assert got['state'].dtype == got['ddt'].dtype == jnp.float32
  x, B, C = (a.astype(jnp.float32) for a in rounded)
  dy = cotangents[0].astype(jnp.bfloat16).astype(jnp.float32)
  want = exact((x, dt, A, B, C, *rest), starts, (dy, cotangents[1]))
  assert_near(got, want, (0.012, 0.012))


def test_the_kernel_can_be_forced():
  arguments, starts, _ = inputs(1, 20, 2, 16, 1, 16)
  with implementation(ssd='pallas'):
    jaxpr = jax.make_jaxpr(lambda *a: ssd(*a, starts))(*arguments)
  assert 'pallas_call' in str(jaxpr)
  assert 'pallas_call' not in str(jax.make_jaxpr(lambda *a: ssd(*a, starts))(*arguments))


@pytest.mark.parametrize('groups', [1, 2])
def test_shards_equal_one_device(groups):
  """Batch over four, heads over two: as on one device; gradients of rates are summed over the
  batch, those of maps that shards share over the shards."""
  case = inputs(4, 16, 4, 16, groups, 16)
  want = exact(*case)
  with use_mesh(make_parallel(MeshConfig(data=2, fsdp=2, tensor=2))):
    got = everything(forced(ssd, ssd='pallas'), *case)
  assert len(got['y'].sharding.device_set) == 8
  assert_near(got, want, (1e-5, 1e-4))


def test_shards_of_time_equal_one_device():
  case = inputs(2, 32, 2, 16, 1, 16)
  want = exact(*case)
  with use_mesh(make_parallel(MeshConfig(data=2, context=4))):
    got = everything(forced(ssd, ssd='pallas'), *case)
  assert len(got['y'].sharding.device_set) == 8
  assert_near(got, want, (1e-5, 1e-4))
