"""Causal convolution with a kernel as long as the sequence, by fast Fourier transform in fp32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.sharding import per_shard


def fft_convolution(
  u_BTD: Float[Array, 'B T D'], k_DT: Float[Array, 'D T']
) -> Float[Array, 'B T D']:
  """y_t = sum_{s <= t} k_{t-s} u_s in each channel: products of spectra, padded with zeros so that
  nothing wraps around.

  O(T log T) per channel. The arithmetic is fp32, the result has the dtype of `u_BTD`.
  """
  # The partitioner would all-gather the input of a Fourier transform, though channels and rows are
  # independent.
  return per_shard(
    _convolve, (('batch', None, 'inner'), ('inner', None)), ('batch', None, 'inner')
  )(u_BTD, k_DT)


def _convolve(u_BTD, k_DT):
  T = u_BTD.shape[1]
  size = fast_length(2 * T - 1)
  u_f = jnp.fft.rfft(u_BTD.astype(jnp.float32), size, axis=1)
  k_f = jnp.fft.rfft(k_DT.astype(jnp.float32), size, axis=1)
  return jnp.fft.irfft(u_f * k_f.T[None], size, axis=1)[:, :T].astype(u_BTD.dtype)


def fast_length(least: int) -> int:
  """The smallest 2^n or 3 * 2^n that is at least `least`."""
  power = 1 << max(least - 1, 0).bit_length()
  return 3 * power // 4 if power >= 4 and 3 * power // 4 >= least else power
