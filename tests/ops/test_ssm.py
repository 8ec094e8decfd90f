"""Linear time-invariant systems: chunks and Fourier transforms against the recurrence, and that
against dense matrices in complex128."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.long_convolution import fast_length, fft_convolution
from jaxformer.ops.ssm import ssm, ssm_chunked, ssm_naive, toeplitz
from jaxformer.ops.ssm_systems import (
  DenseSystem,
  DiagonalSystem,
  ShiftSystem,
  bilinear,
  krylov,
  power_less_one,
  zoh,
)

B, H, M, P, N = 3, 4, 2, 5, 6


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def complexes(seed, *shape):
  return jax.lax.complex(normal(seed, *shape), normal(seed + 1, *shape))


def continuous():
  """Decays and frequencies of S4D-Lin, slow and fast."""
  a = jnp.broadcast_to((-0.5 + 1j * np.pi * jnp.arange(P))[None], (H, P)).astype(jnp.complex64)
  return a, complexes(1, H, P), jnp.geomspace(0.001, 0.5, H)


def parameters(kind):
  """What a system of the kind is made of, and how."""
  if kind == 'dense':
    d = 0.95 * jnp.linalg.qr(normal(3, H, N, N))[0] - jnp.eye(N)[None]
    return (d, normal(4, H, N), normal(5, M, H, N)), DenseSystem
  if kind == 'shift':
    return (normal(6, M, H, N),), ShiftSystem
  rule = {'zoh': zoh, 'bilinear': bilinear}[kind]
  return (*continuous(), complexes(7, M, H, P)), lambda a, b, dt, c: DiagonalSystem(
    *rule(a, b, dt), c
  )


KINDS = ('zoh', 'bilinear', 'dense', 'shift')


def close(a, b, rtol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    assert np.abs(x - y).max() <= rtol * max(np.abs(y).max(), 1e-3), (
      np.abs(x - y).max() / np.abs(y).max()
    )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('length', 'packed'), [(19, True), (16, False), (5, True)])
def test_chunks_equal_the_recurrence(kind, length, packed):
  """Outputs, states and gradients, where documents begin anywhere: at a chunk's border, two in a
  chunk, at the first token."""
  given, build = parameters(kind)
  starts = (
    jnp.zeros((B, length), bool)
    .at[0, 3]
    .set(True)
    .at[0, 5]
    .set(True)
    .at[1, 0]
    .set(True)
    .at[2, 8:10]
    .set(True)
  )
  u, x, w = (
    normal(8, B, length, H),
    normal(9, B, H, build(*given).sizes[2]),
    normal(10, B, length, M, H),
  )

  def loss(chosen, given, u, x):
    y, last = chosen(x, u, build(*given), starts if packed else None)
    return jnp.sum(y * w) + jnp.sum(jnp.sin(last)), (y, last)

  results = [
    jax.jit(jax.grad(lambda *a, chosen=chosen: loss(chosen, *a), (0, 1, 2), has_aux=True))(
      given, u, x
    )
    for chosen in (lambda *a: ssm_chunked(*a, chunk=8), ssm_naive)
  ]
  (fast, values), (slow, naive_values) = results
  close(values, naive_values, 1e-5)
  close(fast, slow, 1e-4)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('length', [1, 37])
def test_fourier_transform_equals_the_recurrence(kind, length):
  given, build = parameters(kind)
  u, w = normal(8, B, length, H), normal(10, B, length, M, H)

  def loss(given, u):
    y, last = ssm(u, build(*given))
    assert last is None
    return jnp.sum(y * w), y

  results = []
  for chosen in ('fft', 'naive'):
    with implementation(ssm=chosen):
      results.append(jax.jit(lambda *a: jax.grad(loss, (0, 1), has_aux=True)(*a))(given, u))
  (fast, y), (slow, naive_y) = results
  close(y, naive_y, 1e-5)
  close(fast, slow, 1e-4)


@pytest.mark.parametrize('rule', [zoh, bilinear])
def test_discretisation(rule):
  """In double precision: the matrix exponential of a diagonal matrix, and Tustin's rule."""
  a, b, dt = continuous()
  a64, b64, z = (
    np.asarray(a, np.complex128),
    np.asarray(b, np.complex128),
    np.asarray(dt, np.float64)[:, None],
  )
  if rule is zoh:
    abar, bbar = np.exp(z * a64), (np.exp(z * a64) - 1) / a64 * b64
  else:
    abar, bbar = (1 + z * a64 / 2) / (1 - z * a64 / 2), z * b64 / (1 - z * a64 / 2)
  log_a, b_found = rule(a, b, dt)
  close(jnp.exp(log_a), abar, 1e-6)
  close(b_found, bbar, 1e-6)
  assert np.abs(np.asarray(log_a.imag)).max() <= np.pi + 1e-5


def test_bilinear_of_a_real_system():
  """dt a = -2 gives Abar = 0, and below it turns negative: logarithms must survive both."""
  a = jnp.asarray([[-0.5, -1.0, -1.9999, -2.0, -2.1, -10.0]], jnp.complex64)
  log_a, _ = bilinear(a, jnp.ones_like(a), jnp.ones(1))
  close(jnp.exp(log_a).real, (1 + np.asarray(a).real / 2) / (1 - np.asarray(a).real / 2), 1e-6)


def tustin(a, dt):
  return (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)


def hold(a, dt):
  return np.exp(dt * a), dt if abs(dt * a) < 1e-9 else np.expm1(dt * a) / a


@pytest.mark.parametrize(
  ('rule', 'exact', 'a', 'dt'),
  [
    *((bilinear, tustin, a, dt) for a, dt in ((-2.0, 1.0), (-4.0, 0.5), (-2.0 + 1e-20j, 1.0))),
    *((zoh, hold, a, 0.25) for a in (0.0, -1e-38, -1e-30, 1e-32j, -1e-12 + 1e-12j, -1e-5, -3e-5)),
  ],
)
def test_gradients_where_a_quotient_or_a_logarithm_has_none(rule, exact, a, dt):
  """Tustin's rule at Abar = 0, and the zero-order hold at a = 0: values and gradients of the kernel
  with respect to both parts of a and to dt, against differences in double precision."""
  weights = np.array([0.7 - 0.2j, 1.3 + 0.4j, -0.5 + 0.9j])

  def kernel(re, im, dt):
    log_a, b = rule(jax.lax.complex(re, im)[None, None], jnp.ones((1, 1), jnp.complex64), dt[None])
    terms = weights * jnp.exp(jnp.arange(3) * log_a[0, 0]) * b[0, 0]
    return 2 * jnp.sum(terms.real)

  def slow(re, im, dt):
    abar, b = exact(complex(re, im), dt)
    return 2 * np.sum(weights * abar ** np.arange(3) * b).real

  at = np.array([np.real(a), np.imag(a), dt])
  value, gradient = jax.value_and_grad(kernel, argnums=(0, 1, 2))(*jnp.float32(at))
  steps = 1e-5 * np.eye(3)
  expected = [(slow(*(at + h)) - slow(*(at - h))) / 2e-5 for h in steps]
  np.testing.assert_allclose(value, slow(*at), rtol=1e-6)
  np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_steps_equal_the_recurrence(kind):
  given, build = parameters(kind)
  system, u = build(*given), normal(8, B, 4, H)
  x, ys = system.zeros(B), []
  for t in range(4):
    y, x = ssm(u[:, t : t + 1], system, x)
    ys.append(y)
  close((jnp.concatenate(ys, axis=1), x), ssm_naive(system.zeros(B), u, system), 1e-5)


def test_every_implementation_can_be_forced():
  """The recurrence is a loop over all positions, the chunks over one in `CHUNK`, the Fourier
  transform none."""
  given, build = parameters('zoh')
  u = normal(8, 1, 512, H)
  for chosen, loops, spectra in (('naive', 1, 0), ('chunked', 1, 0), ('fft', 0, 1)):
    with implementation(ssm=chosen):
      text = str(jax.make_jaxpr(lambda u: ssm(u, build(*given))[0])(u))
    assert ('length=512' in text) == (chosen == 'naive')
    assert ('scan[' in text) == bool(loops)
    assert ('fft[' in text) == bool(spectra)


def test_output_has_the_dtype_of_the_input():
  given, build = parameters('zoh')
  y, last = ssm(normal(8, B, 5, H).astype(jnp.bfloat16), build(*given), jnp.zeros((B, H, 2 * P)))
  assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize('length', [1, 2, 7, 33])
def test_long_convolution(length):
  u, k = normal(1, B, length, H), normal(2, H, length)
  expected = np.stack(
    [[np.convolve(u[b, :, h], k[h])[:length] for h in range(H)] for b in range(B)]
  ).transpose(0, 2, 1)
  close(fft_convolution(u, k), expected, 1e-5)
  square = np.asarray(toeplitz(k))
  close(np.einsum('bsh,hst->bth', u, square), expected, 1e-5)


def test_lengths_of_transforms():
  assert [fast_length(n) for n in (1, 2, 3, 4, 5, 7, 13, 17, 25, 511)] == [
    1,
    2,
    3,
    4,
    6,
    8,
    16,
    24,
    32,
    512,
  ]


def test_powers_of_matrices():
  a, v = 0.9 * jnp.linalg.qr(normal(3, H, N, N))[0], normal(4, H, 2, N)
  powers = [
    np.stack([np.linalg.matrix_power(np.asarray(m, np.float64), j) for m in a]) for j in range(9)
  ]
  d = a - jnp.eye(N)[None]
  for j in (0, 1, 5, 8):
    close(power_less_one(d, j) + jnp.eye(N)[None], powers[j], 1e-5)
  rows, turned = (
    np.asarray(krylov(d, v, 7, transposed=t)).reshape(H, 7, 2, N) for t in (False, True)
  )
  for j in range(7):
    close(rows[:, j], np.asarray(v) @ powers[j], 1e-5)
    close(turned[:, j], np.asarray(v) @ powers[j].transpose(0, 2, 1), 1e-5)
