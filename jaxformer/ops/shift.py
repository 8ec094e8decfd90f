"""The sequence one step back: what RWKV mixes with the present token."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def token_shift(
  x_BTD: Float[Array, 'B T D'], last_BD: Float[Array, 'B D'] | None, starts_BT: Bool[Array, 'B T'],
) -> Float[Array, 'B T D']:
  """x_{t-1} at position t (Peng et al. 2023, section 3.1.1): `last_BD` at the first position (None: zeros), zeros where a packed
  document begins. The next call's `last_BD` is `x_BTD[:, -1]`."""
  first = jnp.zeros_like(x_BTD[:, 0]) if last_BD is None else last_BD.astype(x_BTD.dtype)
  before = jnp.concatenate([first[:, None], x_BTD[:, :-1]], axis=1)
  return jnp.where(starts_BT[..., None], jnp.zeros((), x_BTD.dtype), before)
