"""The sequence one step back: what RWKV mixes with the present token."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.context import from_after, from_before, of_last, time_axes
from jaxformer.sharding import per_shard


def token_shift(
  x_BTD: Float[Array, 'B T D'], last_BD: Float[Array, 'B D'] | None, starts_BT: Bool[Array, 'B T'],
) -> Float[Array, 'B T D']:
  """x_{t-1} at position t (Peng et al. 2023, section 3.1.1): `last_BD` at the first position (None: zeros), zeros where a packed
  document begins. The next call's `last_BD` is `last_token(x_BTD)`."""
  first = jnp.zeros_like(x_BTD[:, 0]) if last_BD is None else last_BD.astype(x_BTD.dtype)
  if not (axes := time_axes(x_BTD.shape[1])):
    return _shifted(x_BTD, first, starts_BT)

  def shard(x_BTD: Array, first_BD: Array, starts_BT: Array) -> Array:
    return _shifted(x_BTD, from_before(x_BTD[:, -1], first_BD, axes), starts_BT)

  token = ('batch', 'time', None)
  return per_shard(shard, (token, ('batch', None), token[:2]), token)(x_BTD, first, starts_BT)


def _shifted(x_BTD: Array, first_BD: Array, starts_BT: Array) -> Array:
  before = jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1)
  return jnp.where(starts_BT[..., None], jnp.zeros((), x_BTD.dtype), before)


def token_ahead(x: Float[Array, 'B T M H']) -> Float[Array, 'B T M H']:
  """x_{t+1} at position t, zeros at the last."""
  def ahead(x: Array, beyond: Array) -> Array:
    return jnp.concatenate([x[:, 1:], beyond[:, None]], axis=1)

  if not (axes := time_axes(x.shape[1])):
    return ahead(x, jnp.zeros_like(x[:, 0]))
  token = ('batch', 'time', None, 'inner')
  return per_shard(lambda x: ahead(x, from_after(x[:, 0], axes)), (token,), token)(x)


def last_token(x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B D']:
  """x at the last position, without gathering what comes before."""
  if not (axes := time_axes(x_BTD.shape[1])):
    return x_BTD[:, -1]
  last = functools.partial(of_last, axes=axes)
  return per_shard(lambda x: last(x[:, -1]), (('batch', 'time', None),), ('batch', None))(x_BTD)
