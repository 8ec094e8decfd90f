"""Causal convolution with a kernel as long as the sequence, by fast Fourier transform in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.sharding import per_shard


def convolution_naive(
  u_BTD: Float[Array, 'B T D'], k_DT: Float[Array, 'D T']
) -> Float[Array, 'B T D']:
  """y_t = sum_{s <= t} k_{t-s} u_s for each channel, one position after the other."""

  def at(t):
    lagged_DT = jnp.where(
      (jnp.arange(u_BTD.shape[1]) <= t)[None], jnp.roll(k_DT[:, ::-1], t + 1, axis=1), 0.0
    )
    return jnp.einsum('bsd,ds->bd', u_BTD.astype(jnp.float32), lagged_DT, precision='highest')

  return jnp.swapaxes(jax.lax.map(at, jnp.arange(u_BTD.shape[1])), 0, 1).astype(u_BTD.dtype)


def fft_convolution(
  u_BTD: Float[Array, 'B T D'], k_DT: Float[Array, 'D T']
) -> Float[Array, 'B T D']:
  """y_t = sum_{s <= t} k_{t-s} u_s for each channel: products of spectra, padded with zeros so that
  nothing wraps around.

  O(T log T) for each channel. The arithmetic is fp32, the result has the dtype of `u_BTD`.
  """
  # The partitioner gathers what it Fourier transforms; channels and rows do not depend on each
  # other.
  return per_shard(
    _convolve, (('batch', None, 'inner'), ('inner', None)), ('batch', None, 'inner')
  )(u_BTD, k_DT)


def _convolve(u_BTD: Array, k_DT: Array) -> Array:
  T = u_BTD.shape[1]
  size = fast_length(2 * T - 1)
  u_f = jnp.fft.rfft(u_BTD.astype(jnp.float32), size, axis=1)
  k_f = jnp.fft.rfft(k_DT.astype(jnp.float32), size, axis=1)
  return jnp.fft.irfft(u_f * k_f.T[None], size, axis=1)[:, :T].astype(u_BTD.dtype)


def fast_length(least: int) -> int:
  """The smallest 2^n or 3 * 2^n that is at least `least`."""
  power = 1 << max(least - 1, 0).bit_length()
  return 3 * power // 4 if power >= 4 and 3 * power // 4 >= least else power
