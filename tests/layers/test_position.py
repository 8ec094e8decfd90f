"""Positions: published frequencies and slopes, and what rotation must leave alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Alibi, Llama3Scaling, LogTemperature, Rotary

pytestmark = pytest.mark.quick

PLAIN = Rotary()
LLAMA3_1 = Rotary(theta=500_000.0, scaling=Llama3Scaling(factor=8.0))

# Head dim 128, theta 5e5, factor 8, from the reference implementation in fp32.
GOLDEN = {
  1: 8.146172166e-01,
  16: 3.760603070e-02,
  28: 3.211446106e-03,
  29: 2.166570630e-03,
  30: 1.371893683e-03,
  31: 8.567514597e-04,
  32: 5.248460220e-04,
  33: 3.126936499e-04,
  34: 1.785077911e-04,
  35: 9.556212171e-05,
  63: 3.068925878e-07,
}


def test_llama_3_1_frequencies():
  f = LLAMA3_1.frequencies(128)
  np.testing.assert_allclose(f[list(GOLDEN)], list(GOLDEN.values()), rtol=1e-6)


def test_llama_3_1_scaling_has_three_parts():
  plain = Rotary(theta=500_000.0).frequencies(128)
  ratio = LLAMA3_1.frequencies(128) / plain
  np.testing.assert_array_equal(ratio[:29], 1.0)
  np.testing.assert_allclose(ratio[[29, 30, 32]], [0.828168, 0.643743, 0.371122], atol=1e-6)
  np.testing.assert_allclose(ratio[35:], 1 / 8, rtol=1e-12)
  assert (np.diff(LLAMA3_1.frequencies(128)) < 0).all()


def test_llama_3_1_scaling_is_the_published_cases():
  """The three cases of the paper's code, one frequency at a time."""
  scaling = Llama3Scaling(factor=32.0, low=1.0, high=4.0, original_context=8192)
  plain, expected = Rotary(theta=500_000.0).frequencies(64), []
  for f in plain:
    wavelength = 2 * np.pi / f
    if wavelength < 8192 / 4:
      expected.append(f)
    elif wavelength > 8192:
      expected.append(f / 32)
    else:
      s = (8192 / wavelength - 1) / (4 - 1)
      expected.append((1 - s) * f / 32 + s * f)
  np.testing.assert_allclose(scaling.apply(plain, 500_000.0), expected, rtol=1e-12)


def rotated(x_K, position, rotary=PLAIN):
  x = jnp.asarray(x_K, jnp.float32)[None, None, None]
  return np.asarray(rotary.rotate(x, jnp.full((1, 1), position, jnp.int32)))[0, 0, 0]


def test_rotation_by_hand():
  """Pair (i, i + K/2) turns by position x theta^(-2i/K): with K = 4 and theta = 100, by p and p /
  10."""
  x, p = np.array([1.0, 2.0, 3.0, 4.0]), 3
  a, b = p * 1.0, p * 0.1
  expected = [
    np.cos(a) - 3 * np.sin(a),
    2 * np.cos(b) - 4 * np.sin(b),
    3 * np.cos(a) + np.sin(a),
    4 * np.cos(b) + 2 * np.sin(b),
  ]
  np.testing.assert_allclose(rotated(x, p, Rotary(theta=100.0)), expected, atol=1e-6)
  np.testing.assert_array_equal(rotated(x, 0), x.astype(np.float32))


@pytest.mark.parametrize('rotary', [PLAIN, LLAMA3_1], ids=['plain', 'llama3.1'])
def test_scores_depend_on_distance_alone(rotary):
  q, k = np.random.default_rng(0).normal(size=(2, 64))
  for distance in (0, 1, 7, 500):
    scores = [rotated(q, p + distance, rotary) @ rotated(k, p, rotary) for p in (0, 1, 13, 1000)]
    # an fp32 angle of 1500 rad is exact to 6e-5, times 64 numbers
    np.testing.assert_allclose(scores, scores[0], atol=1e-3)
  assert abs(rotated(q, 3, rotary) @ rotated(k, 0, rotary) - q @ k) > 0.1


def test_rotation_keeps_lengths_and_types():
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 16)), jnp.bfloat16)
  positions = jnp.asarray(np.random.default_rng(2).integers(0, 4096, (2, 5)), jnp.int32)
  y = Rotary().rotate(x, positions)
  assert y.dtype == jnp.bfloat16
  before, after = (jnp.linalg.norm(a.astype('float32'), axis=-1) for a in (x, y))
  np.testing.assert_allclose(after, before, rtol=2e-2)


def test_interleaved_pairs_are_the_same_up_to_a_permutation():
  """Meta pairs neighbours (2i, 2i+1); scores agree once each head's rows are put evens first."""
  q, k = np.random.default_rng(3).normal(size=(2, 8))
  order = [0, 2, 4, 6, 1, 3, 5, 7]

  def neighbours(x, position):
    turn = np.exp(1j * position * Rotary().frequencies(8))
    z = (x[0::2] + 1j * x[1::2]) * turn
    return np.stack([z.real, z.imag], axis=-1).reshape(-1)

  ours = rotated(q[order], 9) @ rotated(k[order], 4)
  np.testing.assert_allclose(ours, neighbours(q, 9) @ neighbours(k, 4), atol=1e-5)


def test_alibi_slopes_of_a_power_of_two():
  """Press et al. 2022, section 3: for 8 heads 1/2, 1/4, ..., 1/256."""
  np.testing.assert_array_equal(Alibi().slopes(8), np.float32(2.0) ** -np.arange(1, 9))


def test_alibi_slopes_of_twelve_heads():
  """As the authors' code: those of 8 heads, then 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5 from those of
  16."""
  expected = [
    0.5,
    0.25,
    0.125,
    0.0625,
    0.03125,
    0.015625,
    0.0078125,
    0.00390625,
    0.70710678,
    0.35355339,
    0.17677670,
    0.08838835,
  ]
  np.testing.assert_allclose(Alibi().slopes(12), expected, rtol=1e-7)


def test_a_norm_without_scale_commutes_with_rotation():
  """Llama 4 normalizes queries and keys after rotary positions, this package before."""
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 3, 16)), jnp.float32)
  positions, norm = jnp.arange(10).reshape(2, 5), RMSNorm(scale=False).build(16)
  after = norm(Rotary().rotate(x, positions))
  np.testing.assert_allclose(Rotary().rotate(norm(x), positions), after, atol=1e-6)


def test_temperatures_of_llama_4():
  """1 + 0.1 log(1 + floor((p + 1) / 8192)), which first changes at position 8191."""
  positions = jnp.asarray([[0, 8190, 8191, 16383, 1_000_000]])
  factors = LogTemperature().scale_queries(jnp.ones((1, 5, 1, 1)), positions)[0, :, 0, 0]
  expected = [1.0, 1.0, *(1 + 0.1 * np.log(1 + n) for n in (1, 2, 122))]
  np.testing.assert_allclose(factors, expected, rtol=1e-6)
