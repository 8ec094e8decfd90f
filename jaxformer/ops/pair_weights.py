"""Weights between the tokens of a chunk that decay channel by channel.

What token i contributes to a later token t is the product of a query and a key over K channels, of
which each has decayed by exp of the sum of its log decays between them. A chunk is halved again and
again: across the middle of a block, that sum is (middle to t) + (i to middle), so the weights of a
level are one matrix product of queries and keys scaled by exp of sums that are never positive and
never differences. No decay overflows, and none cancels the digits of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def pair_weights(
  queries: Sequence[Float[Array, '*B C K']],
  keys: Float[Array, '*B C K'],
  log_decay: Float[Array, '*B C K'],
  dot: Callable[..., Array],
) -> tuple[list[Array], Array, Array, Array]:
  """Return for each of `queries` the weight of each earlier token in each token of a chunk, without
  the decays of both, `[*B, C, C]`; and for each token and channel the sums of the log decays before
  it, after it, and in total: `[*B, C, K]` twice and `[*B, 1, K]`.

  `dot` is `einsum` with the precision of the products. Blocks grow from 1 token to C, a power of
  2."""
  C, K = keys.shape[-2:]
  # blocks: [*B, C / m, m, K], here and below
  total = log_decay[..., None, :]
  before = after = jnp.zeros_like(total)
  weights = [jnp.zeros((*keys.shape[:-1], 1, 1), keys.dtype)] * len(queries)
  m = 1
  while m < C:
    (before1, before2), (after1, after2), (total1, total2) = map(_halves, (before, after, total))
    late = [_halves(q.reshape(*q.shape[:-2], -1, m, K))[1] for q in queries]
    early = _halves(keys.reshape(*keys.shape[:-2], -1, m, K))[0]
    rows = jnp.concatenate([q * jnp.exp(before2) for q in late], axis=-2)
    columns = early * jnp.exp(after1)
    corners = jnp.split(dot('...tK,...cK->...tc', rows, columns), len(queries), axis=-2)
    weights = [
      _lower(*_halves(inside), corner) for inside, corner in zip(weights, corners, strict=True)
    ]
    before = jnp.concatenate([before1, before2 + total1], axis=-2)
    after = jnp.concatenate([after1 + total2, after2], axis=-2)
    total, m = total1 + total2, 2 * m
  before, after, total = (x[..., 0, :, :] for x in (before, after, total))
  return [w[..., 0, :, :] for w in weights], before, after, total


def _lower(first: Array, second: Array, corner: Array) -> Array:
  """[[first, 0], [corner, second]]."""
  return jnp.concatenate(
    [
      jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1),
      jnp.concatenate([corner, second], axis=-1),
    ],
    axis=-2,
  )


def _halves(x: Array) -> tuple[Array, Array]:
  """The first and the second block of each pair, of `[*B, blocks, m, _]`."""
  pairs = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
  return pairs[..., 0, :, :], pairs[..., 1, :, :]
