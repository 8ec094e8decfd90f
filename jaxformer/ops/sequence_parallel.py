"""Sequence parallelism: recurrences over sequences whose time axis is sharded over devices.

Each shard runs its own part of the sequence, and only states travel. A linear recurrence takes the
state before a part to the state after it by a map that can be summarized: for x -> a x + s by (a,
s), the transition of the part and the state in which it ends when it starts from zeros. Each shard
summarizes its part, the summaries (never the sequence) are all-gathered, and each shard composes
those before its own into the state from which it starts. So n shards take the time of T / n
positions, twice that where a summary needs a run of its own.

A recurrence that is not linear in its state (LSTM, GRU) has no summary: its state passes from shard
to shard, and the rows of the batch go through the shards as a pipeline.

`over_time` does both. The functions from `scan_shards` on are called inside `sharding.per_shard`,
with the mesh axes over which time is sharded (`time_axes`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxformer.ops.documents import count_starts
from jaxformer.sharding import mesh_axes, per_shard, shards

Axes = tuple[str, ...]
State = Any
Run = Callable[..., tuple[Any, State]]
Logical = Sequence[Any]


def time_axes(length: int) -> Axes:
  """The mesh axes over which sequences of this length are sharded; none without a mesh."""
  return mesh_axes('time', length)


def local_length(length: int) -> int:
  """Positions of a sequence on each shard."""
  return length // shards('time', length)


def sharded(f: Callable[..., Any], in_axes: Logical, *out_axes: Any) -> Callable[..., Any]:
  """`sharding.per_shard` for arguments that are pytrees: the logical axes of an argument are a
  tuple for each of its leaves, a list with a tuple per leaf, or None (replicated). Complex arrays
  cross the border as two real ones, which every network can sum."""

  def call(*args: Any):
    leaves, tree = jax.tree.flatten(args)
    axes: list[Any] = []
    for arg, a in zip(args, in_axes, strict=True):
      axes += a if isinstance(a, list) else [a] * len(jax.tree.leaves(arg))
    is_complex = [jnp.iscomplexobj(x) for x in leaves]
    pairs = [(x.real, x.imag) if c else (x,) for x, c in zip(leaves, is_complex, strict=True)]

    def shard(*reals: Array):
      rest = iter(reals)
      parts = [lax.complex(next(rest), next(rest)) if c else next(rest) for c in is_complex]
      return f(*jax.tree.unflatten(tree, parts))

    flat_axes = [a for a, pair in zip(axes, pairs, strict=True) for _ in pair]
    return per_shard(shard, flat_axes, *out_axes)(*(x for pair in pairs for x in pair))

  return call


def over_time(
  run: Run,
  state_axes: Any,
  in_axes: Logical,
  out_axes: tuple[str | None, ...],
  summarize: Callable[..., tuple[Any, ...]] | None = None,
  *,
  mapped: bool = False,
  reverse: bool = False,
) -> Run:
  """`run(state, *inputs) -> (y, last state)` on the active mesh, whatever is sharded.

  Args:
    state_axes: logical axes of the state, of all its leaves, 'batch' first.
    in_axes: of each input, as in `sharded`.
    out_axes: of y.
    summarize: from the inputs of a part, a summary of it; `join`, which takes the state before a
      part and its summary to the state after it; and, where that is cheaper than `run`, the
      function from the state before the part to y. None where states cannot be summarized: shards
      then form a pipeline.
    mapped: map over shards of batch and channels also where time is not sharded, as kernels need.
    reverse: read the sequence from its end.
  """
  timed = [a.index('time') if isinstance(a, tuple) and 'time' in a else None for a in in_axes]

  def flipped(x, axis: int | None):
    return jnp.flip(x, axis) if reverse and axis is not None and x is not None else x

  def call(state, *inputs: Any):
    length = next(x.shape[t] for x, t in zip(inputs, timed, strict=True) if t is not None)
    axes = time_axes(length)

    def shard(state, *inputs: Any):
      inputs = tuple(flipped(x, t) for x, t in zip(inputs, timed, strict=True))
      if not axes:
        y, last = run(state, *inputs)
      elif summarize is None:
        y, last = pipelined(run, state, inputs, in_axes, out_axes, axes)
      else:
        summary, join, *outputs = summarize(*inputs)
        first, last = scan_shards(summary, state, join, axes, reverse=reverse)
        y = outputs[0](first) if outputs else run(first, *inputs)[0]
      return flipped(y, out_axes.index('time')), last

    if not (axes or mapped):
      return shard(state, *inputs)
    return sharded(shard, (state_axes, *in_axes), out_axes, state_axes)(state, *inputs)

  return call


def scan_shards(
  summary: Any,
  state: State,
  join: Callable[[State, Any], State],
  axes: Axes,
  *,
  reverse: bool = False,
) -> tuple[State, State]:
  """The state before this shard's part, and that after the complete sequence, the same on all
  shards.

  Args:
    summary: of this shard's part, a pytree of arrays.
    state: before the sequence.
    join: from the state before a part and the summary of the part, the state after it.
    reverse: the sequence is read from its end.
  """
  parts = jax.tree.map(lambda a: _all_gather(a, axes), summary)
  last, before = lax.scan(lambda s, part: (join(s, part), s), state, parts, reverse=reverse)
  here = lax.axis_index(axes)
  return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, here, keepdims=False), before), last


def _all_gather(a, axes: Axes):
  if jnp.iscomplexobj(a):
    return lax.complex(lax.all_gather(a.real, axes), lax.all_gather(a.imag, axes))
  return lax.all_gather(a, axes)


def pipelined(
  run: Run,
  state: State,
  inputs: tuple[Any, ...],
  in_axes: Logical,
  out_axes: tuple[str | None, ...],
  axes: Axes,
) -> tuple[Array, State]:
  """`run(state, *inputs) -> (y, last state)` with states that pass from shard to shard.

  The rows of the batch go through the shards in m groups, so that a shard runs one group while the
  next shard runs the group before it: n shards take n + m - 1 pipeline steps, of which each shard
  uses m. Memory is divided by n, time by n m / (n + m - 1). Inputs and y are sliced along 'batch',
  states along their first axis."""
  n, here, rows = lax.axis_size(axes), lax.axis_index(axes), jax.tree.leaves(state)[0].shape[0]
  m = next(m for m in range(min(n, rows), 0, -1) if rows % m == 0)

  def step(passed, i):
    # In the steps before and after its own m a shard's results are discarded.
    group = jnp.clip(i - here, 0, m - 1) * (rows // m)

    def rows_of(x, logical):
      if logical is None or 'batch' not in logical:
        return x
      return lax.dynamic_slice_in_dim(x, group, rows // m, logical.index('batch'))

    first = jax.tree.map(
      lambda s, p: jnp.where(here == 0, rows_of(s, ('batch',)), p), state, passed
    )
    y, last = run(first, *map(rows_of, inputs, in_axes))
    return jax.tree.map(
      lambda s: lax.ppermute(s, axes, [(j, j + 1) for j in range(n - 1)]), last
    ), (y, last)

  zeros = jax.tree.map(lambda s: jnp.zeros_like(s[: rows // m]), state)
  _, results = lax.scan(step, zeros, jnp.arange(n + m - 1))
  y, last = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, here, m, 0), results)
  batch = out_axes.index('batch')
  y = jnp.moveaxis(y, 0, batch)
  y = y.reshape(*y.shape[:batch], rows, *y.shape[batch + 2 :])
  return y, jax.tree.map(lambda s: from_last_shard(s.reshape(rows, *s.shape[2:]), axes), last)


def multiply_add(state: Array, part: tuple[Array, Array]) -> Array:
  """`join` of recurrences whose transition multiplies each number of the state: the summary of a
  part is (factor, state from zeros)."""
  return part[0] * state + part[1]


def reset_masks(starts_BT: Bool[Array, 'B T']) -> tuple[Bool[Array, ' B'], Bool[Array, 'B T']]:
  """Whether the state before a part survives it, as no document starts within it; and which
  positions contribute to the state after it, as no document starts later in it."""
  later = jnp.flip(count_starts(jnp.flip(starts_BT, 1)), 1) - starts_BT
  return ~jnp.any(starts_BT, axis=1), later == 0


def sums_after(x: Array, axis: int = 1) -> Array:
  """For each position the sum over the later ones."""
  later = lax.slice_in_dim(x, 1, None, axis=axis)
  zero = jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis))
  return jnp.concatenate([lax.cumsum(later, axis=axis, reverse=True), zero], axis)


def from_previous_shard(x: Array, first: Array, axes: Axes) -> Array:
  """`x` of the previous shard; `first` on the first one."""
  n = lax.axis_size(axes)
  received = lax.ppermute(x, axes, [(i, i + 1) for i in range(n - 1)])
  return jnp.where(lax.axis_index(axes) == 0, first.astype(x.dtype), received)


def from_next_shard(x: Array, axes: Axes) -> Array:
  """`x` of the next shard; zeros on the last one."""
  return lax.ppermute(x, axes, [(i + 1, i) for i in range(lax.axis_size(axes) - 1)])


def from_first_shard(x: Array, axes: Axes) -> Array:
  """`x` of the first shard, on all."""
  return lax.psum(jnp.where(lax.axis_index(axes) == 0, x, jnp.zeros((), x.dtype)), axes)


def from_last_shard(x: Array, axes: Axes) -> Array:
  """`x` of the last shard, on all."""
  is_last = lax.axis_index(axes) == lax.axis_size(axes) - 1
  return lax.psum(jnp.where(is_last, x, jnp.zeros((), x.dtype)), axes)
