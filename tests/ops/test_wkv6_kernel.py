"""The kernel of WKV-6 in interpret mode against the recurrence: outputs, last state and all
gradients; and its shards on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.kernels.wkv6 import wkv6_pallas
from jaxformer.ops.wkv6 import wkv6
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.helpers import forced

NAMES = ('y', 'state', 'dr', 'dk', 'dv', 'dlog_decay', 'du', 'dstate')


def recurrence(r, k, v, log_decay, u, state, starts):
  def step(S, x):
    r, k, v, w, start = x
    S = jnp.where(start[:, None, None, None], 0.0, S)
    kv = k[..., :, None] * v[..., None, :]
    y = jnp.einsum('bhk,bhkv->bhv', r, S + u[None, :, :, None] * kv, precision='highest')
    return jnp.exp(w)[..., None] * S + kv, y

  time_first = [jnp.moveaxis(x, 1, 0) for x in (r, k, v, log_decay, starts)]
  state, y = jax.lax.scan(step, state, tuple(time_first))
  return jnp.moveaxis(y, 0, 1), state


def kernel(r, k, v, log_decay, u, state, starts, **options):
  if state is None:
    state = jnp.zeros((*r.shape[:1], *r.shape[2:], v.shape[-1]))
  return wkv6_pallas(state, r, k, v, log_decay, u, starts, **options)


def inputs(B, T, H, K, V, *, strong=False, seed=0):
  """Log decays around -0.4, or between about -1e-3 and -1e4 with some of -inf and of 0; document
  starts at 0.1 of the tokens."""
  keys = jax.random.split(jax.random.key(seed), 9)
  r, k, v, x, u, state, dy, dstate = (
    jax.random.normal(key, shape)
    for key, shape in zip(
      keys[:8],
      (
        (B, T, H, K),
        (B, T, H, K),
        (B, T, H, V),
        (B, T, H, K),
        (H, K),
        (B, H, K, V),
        (B, T, H, V),
        (B, H, K, V),
      ),
      strict=True,
    )
  )
  w = -jnp.exp(3 * x + 1) if strong else -jnp.exp(x - 1)
  if strong:
    w = w.at[:, 1::7, :, 1].set(-jnp.inf).at[:, ::5, :, 0].set(0.0)
  starts = jax.random.bernoulli(keys[8], 0.1, (B, T)).at[:, -3:].set(False)
  return (r, k, v, w, u, state), starts, (dy, dstate)


def everything(f, arguments, starts, cotangents):
  """Outputs and gradients."""

  def run(arguments, cotangents):
    out, pull = jax.vjp(lambda *a: f(*a, starts), *arguments)
    return *out, *pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, out, strict=True)))

  return dict(zip(NAMES, jax.jit(run)(arguments, cotangents), strict=True))


def assert_near(got, want, tolerance):
  for name in NAMES:
    error, size = (
      jnp.abs(got[name].astype(jnp.float32) - want[name]).max(),
      jnp.abs(want[name]).max(),
    )
    assert got[name].shape == want[name].shape, name
    # false where not finite
    assert error <= tolerance[name[0] == 'd'] * size, f'{name}: {error} of {size}'


@pytest.mark.parametrize(
  ('shape', 'strong', 'chunk', 'span'),
  [
    ((2, 40, 2, 16, 16), False, 16, 2),  # a padded block of tokens
    ((1, 37, 3, 64, 64), True, 8, 2),  # an odd head beside blocks of two
    ((1, 24, 1, 20, 12), True, 8, 4),  # sizes that fill no lanes
  ],
  ids=str,
)
def test_kernel_is_the_recurrence(shape, strong, chunk, span):
  case = inputs(*shape, strong=strong)
  got = everything(lambda *a: kernel(*a, chunk=chunk, span=span), *case)
  assert_near(got, everything(recurrence, *case), (1e-5, 1e-4))


def test_one_decay_for_all_tokens():
  """That of RWKV-5, [1, 1, H, K]: its gradient is the sum over batch and time."""
  (r, k, v, w, *rest), *others = inputs(2, 20, 2, 16, 16)
  case = (r, k, v, w[:1, :1], *rest), *others
  want = everything(
    lambda r, k, v, w, *rest: recurrence(r, k, v, jnp.broadcast_to(w, r.shape), *rest), *case
  )
  got = everything(lambda *a: forced(wkv6, wkv6='pallas')(*a, chunk=8), *case)
  assert_near(got, want, (1e-5, 1e-4))


def test_kernel_starts_from_zeros_and_continues():
  """Two calls, the first without a state, the second from the state of the first, as one from
  zeros."""
  (*tokens, u, state), starts, _ = inputs(1, 40, 2, 16, 16)
  run = jax.jit(lambda tokens, state, starts: kernel(*tokens, u, state, starts, chunk=8))
  first, middle = run([x[:, :20] for x in tokens], None, starts[:, :20])
  second, last = run([x[:, 20:] for x in tokens], middle, starts[:, 20:])
  want, want_last = jax.jit(recurrence)(*tokens, u, jnp.zeros_like(state), starts)
  assert (
    jnp.abs(jnp.concatenate([first, second], axis=1) - want).max() <= 1e-5 * jnp.abs(want).max()
  )
  assert jnp.abs(last - want_last).max() <= 1e-5 * jnp.abs(want_last).max()


def test_documents_do_not_see_each_other():
  """Changing the first document and the state before it leaves the second as it was, to the bit."""
  (*tokens, u, state), _, _ = inputs(1, 40, 2, 16, 16)
  starts = jnp.zeros((1, 40), bool).at[:, 21].set(True)
  run = jax.jit(lambda tokens, state: kernel(*tokens, u, state, starts, chunk=16))
  y, last = run(tokens, state)
  changed, changed_last = run([x.at[:, :21].multiply(2.0) for x in tokens], -state)
  assert (y[:, 21:] == changed[:, 21:]).all()
  assert (last == changed_last).all()
  assert (y[:, :21] != changed[:, :21]).all()


def test_bf16_is_near():
  """Rounded operands, summed in fp32: a few roundings of bf16 (0.4 %) of the largest number."""
  arguments, starts, cotangents = inputs(2, 20, 2, 16, 16)
  rounded = (*(x.astype(jnp.bfloat16) for x in arguments[:3]), *arguments[3:])
  got = everything(lambda *a: kernel(*a, chunk=8), rounded, starts, cotangents)
  assert got['y'].dtype == got['dr'].dtype == jnp.bfloat16
  assert got['state'].dtype == got['dlog_decay'].dtype == jnp.float32
  same = (*(x.astype(jnp.float32) for x in rounded[:3]), *arguments[3:])
  assert_near(got, everything(recurrence, same, starts, cotangents), (0.012, 0.012))


def test_the_kernel_can_be_forced():
  arguments, starts, _ = inputs(1, 20, 2, 16, 16)
  with implementation(wkv6='pallas'):
    jaxpr = jax.make_jaxpr(lambda *a: wkv6(*a, starts))(*arguments)
  assert 'pallas_call' in str(jaxpr)
  assert 'pallas_call' not in str(jax.make_jaxpr(lambda *a: wkv6(*a, starts))(*arguments))


def test_shards_equal_one_device():
  """Batch over four, heads over two: as on one device; the gradient of u is summed over the
  batch."""
  case = inputs(4, 16, 2, 16, 16)
  want = everything(recurrence, *case)
  with use_mesh(make_parallel(MeshConfig(data=2, fsdp=2, tensor=2))):
    got = everything(forced(wkv6, wkv6='pallas'), *case)
  assert len(got['y'].sharding.device_set) == 8
  assert_near(got, want, (1e-5, 1e-4))
