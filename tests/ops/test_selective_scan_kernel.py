"""The Pallas kernel of the selective scan, interpreted, against the recurrence step by step:
outputs, states and all gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.implementation import implementation
from jaxformer.ops.kernels.selective_scan import selective_scan_pallas
from jaxformer.ops.selective_scan import selective_scan, selective_scan_naive
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh

NAMES = ('y', 'h', 'du', 'ddt', 'dA', 'dB', 'dC', 'dD', 'dh')


def examples(B, T, D, N, dtype=jnp.float32):
  """Arguments, borders of documents, and the cotangents of y and of the last state."""
  random = np.random.default_rng(T)

  def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(random.normal(size=shape), dtype)

  arguments = (
    normal(B, T, D, dtype=dtype),
    jax.nn.softplus(normal(B, T, D) - 3).astype(dtype),
    -jnp.exp(normal(D, N)),
    normal(B, T, N, dtype=dtype),
    normal(B, T, N, dtype=dtype),
    normal(D),
    normal(B, D, N),
  )
  # Documents begin in the middle, at the last position and, in a second row, at the first; in the
  # first row's second chunk none.
  starts = np.zeros((B, T), bool)
  starts[0, [5, 13]] = starts[-1, [T // 2, T - 1]] = True
  starts[1:, 0] = True
  return arguments, jnp.asarray(starts), (normal(B, T, D, dtype=dtype), normal(B, D, N))


def with_gradients(scan, arguments, starts, cotangents):
  @jax.jit
  def run(arguments, cotangents):
    out, pull = jax.vjp(lambda *a: scan(*a, starts), *arguments)
    return *out, *pull(cotangents)

  return run(arguments, cotangents)


def state_first(f, **options):
  return lambda *a: f(a[6], *a[:6], a[7], **options)


interpreted = state_first(selective_scan_pallas)
naive = state_first(selective_scan_naive)


def compare(got, expected):
  """Relative to the largest number: 1e-5 for y and h, 1e-4 for gradients; what is bfloat16 may
  round to a neighbour."""
  for name, a, b in zip(NAMES, got, expected, strict=True):
    assert a.shape == b.shape, name
    assert a.dtype == b.dtype, name
    tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-5 if name in ('y', 'h') else 1e-4
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(b).max() > 1e-3, name
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


@pytest.mark.parametrize(
  ('B', 'T', 'D', 'N', 'dtype'),
  # blocks hang over the end of the channels and of time; rows of state are padded
  [
    (2, 40, 200, 4, jnp.float32),
    # two chunks, two blocks of channels forwards and three backwards
    (2, 136, 640, 16, jnp.float32),
    # a wide state in shorter chunks; fp32 inside, so that state and dA are as exact as ever
    (1, 100, 128, 64, jnp.bfloat16),
  ],
  ids=['overhang', 'blocks', 'wide-bf16'],
)
def test_kernel_is_the_recurrence(B, T, D, N, dtype):
  arguments, starts, cotangents = examples(B, T, D, N, dtype)
  got, expected = (with_gradients(f, arguments, starts, cotangents) for f in (interpreted, naive))
  compare(got, expected)


@pytest.mark.parametrize('sizes', [{'fsdp': 2, 'tensor': 4}], ids=str)
def test_on_a_mesh(sizes):
  """Batch over fsdp, channels over tensor: the gradients of B and C, which every shard of the
  channels reads completely, are summed over the channels, and those of A and D over the batch."""
  arguments, starts, cotangents = examples(2, 16, 512, 4)
  expected = with_gradients(naive, arguments, starts, cotangents)
  with (
    use_mesh(make_parallel(MeshConfig(data=1, **sizes))),
    implementation(selective_scan='pallas'),
  ):
    got = with_gradients(selective_scan, arguments, starts, cotangents)
  assert len(got[0].sharding.device_set) == 8
  assert got[0].addressable_shards[0].data.shape == (1, 16, 128)
  compare(got, expected)
