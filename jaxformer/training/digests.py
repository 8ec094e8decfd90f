"""Digests of arrays, which do not depend on how they are sharded: by a compiled program or, for
small arrays on a CPU, by NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# A program takes as long to compile as NumPy to hash this many numbers.
_SMALL = 1 << 22


def _mix(h: Any) -> Any:
  """Apply the finalizer of MurmurHash3: a bijection, so that a change of one word is always
  detected."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
  return h ^ (h >> np.uint32(16))


def _mixed(bits: Any, index: Any) -> Any:
  """What every element adds to the digest."""
  return _mix(bits ^ _mix(index + np.uint32(0x9E3779B9)))


@jax.jit
def _examined(x: Array) -> tuple[Array, Array]:
  """Return the digest of an array, and whether all its numbers are finite."""
  bits = x
  if x.dtype != jnp.bool_:
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  digest = jnp.sum(_mixed(bits.astype(jnp.uint32), index), dtype=jnp.uint32)
  inexact = jnp.issubdtype(x.dtype, jnp.inexact)
  return digest, jnp.all(jnp.isfinite(x)) if inexact else jnp.bool_(True)


def _examined_on_host(x: np.ndarray) -> tuple[np.uint32, bool]:
  """The same by NumPy."""
  bits = x.reshape(-1)
  bits = bits if x.dtype == np.bool_ else bits.view(f'uint{8 * x.dtype.itemsize}')
  mixed = _mixed(bits.astype(np.uint32), np.arange(x.size, dtype=np.uint32))
  inexact = jnp.issubdtype(x.dtype, jnp.inexact)
  return mixed.sum(dtype=np.uint32), bool(np.isfinite(x).all()) if inexact else True


def digests(arrays: Mapping[str, Array]) -> tuple[dict[str, int], str]:
  """Return a digest of every array, and which arrays are not finite, in words; '' if all are.

  The digest is the sum over the elements of mix(bits XOR mix(index)), modulo 2^32. It is the same
  on every mesh.

  Small arrays on a CPU are hashed by NumPy. For others there is a small program per shape, since
  one for all arrays would take longer to compile (moments have the shapes of parameters). They run
  one after another: on a CPU with several processes, collectives that wait for each other can
  occupy all threads."""

  def examined(x: Array | np.ndarray) -> tuple[Any, Any]:
    devices = [] if isinstance(x, np.ndarray) else [d.platform for d in x.devices()]
    if x.size <= _SMALL and devices in ([], ['cpu']):
      return _examined_on_host(np.asarray(x))
    return jax.device_get(_examined(x))

  found = {name: examined(x) for name, x in arrays.items()}
  wrong = [name for name, (_, finite) in found.items() if not finite]
  return {name: int(digest) for name, (digest, _) in found.items()}, (
    f'{len(wrong)} of {len(found)} arrays are not finite: {first_names(wrong)}' if wrong else ''
  )


def first_names(names: Sequence[str]) -> str:
  """Return the first three names of a list."""
  return ', '.join([*names[:3], *['...'] * (len(names) > 3)])
