"""Recurrences over sequences that a mesh divides in time: each shard runs its own part, and only
states travel.

A linear recurrence takes a part of a sequence from the state before it to the state after it by a
map that can be summed up: for x -> a x + s by (a, s), the transition and the state that the part
ends with when it begins with nothing. Each shard sums up its own part, the summaries of all shards
(never the sequence) are gathered, and each shard joins those before its own to the state that it
begins with. So the work of n shards is that of a sequence of T / n, twice where the summary needs a
run of its own.

All functions but `time_axes` are called inside `sharding.per_shard`, with the mesh axes that divide
time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxformer.sharding import mesh_axes

Axes = tuple[str, ...]
State = Any


def time_axes(length: int) -> Axes:
  """The mesh axes that divide sequences of this length; none without a mesh."""
  return mesh_axes('time', length)


def carried(
  summary: Any,
  state: State,
  join: Callable[[State, Any], State],
  axes: Axes,
  *,
  reverse: bool = False,
) -> tuple[State, State]:
  """The state before this shard's part, and that after the whole sequence, the same on all shards.

  Args:
    summary: of this shard's part, a tree of arrays.
    state: before the whole sequence.
    join: from the state before a part and the summary of the part, the state after it.
    reverse: the sequence is read from its end.
  """
  parts = jax.tree.map(lambda a: _gathered(a, axes), summary)
  last, before = lax.scan(lambda s, part: (join(s, part), s), state, parts, reverse=reverse)
  here = lax.axis_index(axes)
  return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, here, keepdims=False), before), last


def _gathered(a: Array, axes: Axes) -> Array:
  """From all shards, `[n, ...]`; complex numbers as two real ones, which all networks can send."""
  if jnp.iscomplexobj(a):
    return lax.complex(lax.all_gather(a.real, axes), lax.all_gather(a.imag, axes))
  return lax.all_gather(a, axes)


def over_time(
  run: Callable[..., tuple[Any, State]],
  summary: Callable[..., Any],
  join: Callable[[State, Any], State],
  axes: Axes,
  *,
  reverse: bool = False,
) -> Callable[..., tuple[Any, State]]:
  """`run(state, *inputs) -> (y, last state)` for inputs of which each shard has a part, and the
  state before the whole sequence, which each shard has whole. `summary(*inputs)` sums up a part for
  `join`. Without axes, `run` itself."""
  if not axes:
    return run

  def sharded(state: State, *inputs: Any) -> tuple[Any, State]:
    first, last = carried(summary(*inputs), state, join, axes, reverse=reverse)
    return run(first, *inputs)[0], last

  return sharded


def in_turn(
  run: Callable[..., tuple[Array, State]], state: State, inputs: tuple[Array, ...], axes: Axes
) -> tuple[Array, State]:
  """`run(state, *inputs) -> (y, last state)` where no summary is possible: the state goes from
  shard to shard.

  The rows of the batch go through the shards in groups, so that a shard runs one group while the
  next runs the one before: with m groups n shards take n + m - 1 turns, of which each shard has m
  of its own. Memory is divided by n, time by n m / (n + m - 1). Inputs and y are `[T, B, ...]`,
  states `[B, ...]`."""
  n, here, rows = lax.axis_size(axes), lax.axis_index(axes), jax.tree.leaves(state)[0].shape[0]
  m = next(m for m in range(min(n, rows), 0, -1) if rows % m == 0)

  def turn(passed: State, i: Array) -> tuple[State, Any]:
    # A shard's own turns are those of the groups 0 .. m - 1; what it makes of the rows in other
    # turns goes nowhere.
    group = jnp.clip(i - here, 0, m - 1) * (rows // m)

    def rows_of(a: Array, axis: int) -> Array:
      return lax.dynamic_slice_in_dim(a, group, rows // m, axis)

    first = jax.tree.map(lambda s, p: jnp.where(here == 0, rows_of(s, 0), p), state, passed)
    y, last = run(first, *(rows_of(x, 1) for x in inputs))
    return jax.tree.map(
      lambda s: lax.ppermute(s, axes, [(j, j + 1) for j in range(n - 1)]), last
    ), (y, last)

  nothing = jax.tree.map(lambda s: jnp.zeros_like(s[: rows // m]), state)
  _, made = lax.scan(turn, nothing, jnp.arange(n + m - 1))
  y, last = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, here, m, 0), made)
  y = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], rows, *y.shape[3:])
  return y, jax.tree.map(lambda s: of_last(s.reshape(rows, *s.shape[2:]), axes), last)


def scaled(state: Array, part: tuple[Array, Array]) -> Array:
  """`join` of recurrences whose transition multiplies each number of the state."""
  return part[0] * state + part[1]


def unbroken(starts_BT: Bool[Array, 'B T']) -> tuple[Bool[Array, ' B'], Bool[Array, 'B T']]:
  """Whether no document begins in this part, so that something of the state before it is left after
  it; and for each position whether none begins later in it, so that something of the position is
  left."""
  later = jnp.flip(jnp.cumsum(jnp.flip(starts_BT, 1), axis=1, dtype=jnp.int32), 1) - starts_BT
  return ~jnp.any(starts_BT, axis=1), later == 0


def sums_after(x: Array, axis: int = 1) -> Array:
  """For each position the sum over the later ones."""
  later = lax.slice_in_dim(x, 1, None, axis=axis)
  return jnp.concatenate(
    [
      lax.cumsum(later, axis=axis, reverse=True),
      jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis)),
    ],
    axis,
  )


def from_before(x: Array, first: Array, axes: Axes) -> Array:
  """`x` of the shard before; `first` on the first one."""
  n = lax.axis_size(axes)
  got = lax.ppermute(x, axes, [(i, i + 1) for i in range(n - 1)])
  return jnp.where(lax.axis_index(axes) == 0, first.astype(x.dtype), got)


def from_after(x: Array, axes: Axes) -> Array:
  """`x` of the shard after; zeros on the last one."""
  return lax.ppermute(x, axes, [(i + 1, i) for i in range(lax.axis_size(axes) - 1)])


def of_first(x: Array, axes: Axes) -> Array:
  """`x` of the first shard, on all."""
  return lax.psum(jnp.where(lax.axis_index(axes) == 0, x, jnp.zeros((), x.dtype)), axes)


def of_last(x: Array, axes: Axes) -> Array:
  """`x` of the last shard, on all."""
  mine = lax.axis_index(axes) == lax.axis_size(axes) - 1
  return lax.psum(jnp.where(mine, x, jnp.zeros((), x.dtype)), axes)
