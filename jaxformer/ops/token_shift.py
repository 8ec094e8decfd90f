"""Token shift: the sequence one step back, which RWKV mixes with the present token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.sequence_parallel import (
  from_first_shard,
  from_last_shard,
  from_next_shard,
  from_previous_shard,
  time_axes,
)
from jaxformer.sharding import per_shard


def token_shift(
  x_BTD: Float[Array, 'B T D'], last_BD: Float[Array, 'B D'] | None, starts_BT: Bool[Array, 'B T']
) -> Float[Array, 'B T D']:
  """x_{t-1} at position t (Peng et al. 2023, section 3.1.1): `last_BD` at the first position (None:
  zeros), zeros where a packed document starts. The next call's `last_BD` is `last_token(x_BTD)`."""
  first = jnp.zeros_like(x_BTD[:, 0]) if last_BD is None else last_BD.astype(x_BTD.dtype)
  return (_across_shards if time_axes(x_BTD.shape[1]) else _shifted)(x_BTD, first, starts_BT)


def _shifted(x_BTD, first_BD, starts_BT):
  before = jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1)
  return jnp.where(starts_BT[..., None], jnp.zeros((), x_BTD.dtype), before)


_TOKEN, _ROW = ('batch', 'time', None), ('batch', None)


@jax.custom_vjp
def _across_shards(x_BTD, first_BD, starts_BT):
  """On shards of time, each of which receives one token from the previous shard. The gradient of a
  mapped function is summed over the mesh axes that do not shard its input (`tensor`), so the
  gradient is mapped by itself."""
  axes = time_axes(x_BTD.shape[1])

  def shard(x_BTD, first_BD, starts_BT):
    return _shifted(x_BTD, from_previous_shard(x_BTD[:, -1], first_BD, axes), starts_BT)

  return per_shard(shard, (_TOKEN, _ROW, _TOKEN[:2]), _TOKEN)(x_BTD, first_BD, starts_BT)


def _across_shards_backward(starts_BT, g_BTD):
  axes = time_axes(g_BTD.shape[1])
  g = jnp.where(starts_BT[..., None], jnp.zeros((), g_BTD.dtype), g_BTD)
  dx = per_shard(lambda g: _ahead(g, from_next_shard(g[:, 0], axes)), (_TOKEN,), _TOKEN)(g)
  dfirst = per_shard(lambda g: from_first_shard(g[:, 0], axes), (_TOKEN,), _ROW)(g)
  return dx, dfirst, None


_across_shards.defvjp(
  lambda x, first, starts: (_across_shards(x, first, starts), starts), _across_shards_backward
)


def _ahead(x, beyond):
  return jnp.concatenate([x[:, 1:], beyond[:, None]], axis=1)


def token_ahead(x: Float[Array, 'B T M H']) -> Float[Array, 'B T M H']:
  """x_{t+1} at position t, zeros at the last."""
  if not (axes := time_axes(x.shape[1])):
    return _ahead(x, jnp.zeros_like(x[:, 0]))
  token = ('batch', 'time', None, 'inner')
  return per_shard(lambda x: _ahead(x, from_next_shard(x[:, 0], axes)), (token,), token)(x)


def last_token(x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B D']:
  """x at the last position, without all-gathering the sequence."""
  if not (axes := time_axes(x_BTD.shape[1])):
    return x_BTD[:, -1]
  return per_shard(lambda x: from_last_shard(x[:, -1], axes), (_TOKEN,), _ROW)(x_BTD)
