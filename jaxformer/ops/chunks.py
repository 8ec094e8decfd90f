"""Recurrences that go through a sequence step by step or chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def reset(starts_B: Array, state: Any, empty: Any = None) -> Any:
  """`state`, a pytree, with `empty` (None: zeros) in the rows where a document starts."""

  def choose(s: Array, e: Array):
    return jnp.where(starts_B.reshape(-1, *(1,) * (s.ndim - 1)), e, s)

  empty = jax.tree.map(jnp.zeros_like, state) if empty is None else empty
  return jax.tree.map(choose, state, empty)


def scan_steps(
  step: Callable[..., tuple[Any, Array]],
  state: Any,
  inputs: tuple[Array, ...],
  starts_BT: Array,
  empty: Any = None,
) -> tuple[Array, Any]:
  """y of all positions `[B, T, ...]` and the last state, for `step(state, *inputs of one position)`
  -> (state, y). The state is `empty` (None: zeros) before a position where `starts_BT`."""

  def body(state, now):
    starts_B, *inputs = now
    return step(reset(starts_B, state, empty), *inputs)

  by_time = [jnp.swapaxes(x, 0, 1) for x in (starts_BT, *inputs)]
  state, y = jax.lax.scan(body, state, by_time)
  return jnp.swapaxes(y, 0, 1), state


def to_chunks(x: Array, size: int, axis: int = 1, fill: float = 0) -> Array:
  """`[..., T, ...]` -> `[n, ..., size, ...]`: `axis` in chunks, which lead; the last one is padded
  with `fill`."""
  n = -(-x.shape[axis] // size)
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, n * size - x.shape[axis])
  x = jnp.pad(x, pad, constant_values=fill)
  return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :]), axis, 0)


def from_chunks(x: Array, length: int, axis: int = 1) -> Array:
  """The inverse of `to_chunks`, without the padding."""
  x = jnp.moveaxis(x, 0, axis)
  x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
  return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def scan_chunks(
  body: Callable[..., tuple[Any, Array]],
  state: Any,
  inputs: tuple[Array, ...],
  size: int,
  padded: Callable[[int], int] = lambda rest: rest,
) -> tuple[Array, Any]:
  """y of all positions `[B, T, ...]` and the last state, for `body(state, *inputs of one chunk)` ->
  (state, y).

  All complete chunks are one scan, which keeps only the states between chunks for the backward pass
  and recomputes the rest; the remaining positions follow, padded with zeros to `padded(number)`."""
  n, rest = divmod(inputs[0].shape[1], size)
  body, ys = jax.checkpoint(body, prevent_cse=False), []
  if n:
    chunks = tuple(to_chunks(x[:, : n * size], size) for x in inputs)
    state, y = jax.lax.scan(lambda state, now: body(state, *now), state, chunks)
    ys.append(from_chunks(y, n * size))
  if rest:
    last = tuple(to_chunks(x[:, n * size :], padded(rest))[0] for x in inputs)
    state, y = body(state, *last)
    ys.append(y[:, :rest])
  return ys[0] if len(ys) == 1 else jnp.concatenate(ys, axis=1), state
