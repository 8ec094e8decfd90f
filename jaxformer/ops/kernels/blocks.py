"""Calls of Pallas kernels on TPUs that walk over arrays block by block, in a grid of three axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Block = tuple[tuple[int, ...], pl.BlockSpec]  # the shape of the array, and how it is read


def blocks(grid: dict[str, int], backwards: str | None = None) -> Callable[..., Block]:
  """Return `block(index, *sizes)`: an array of complete blocks of these sizes (None: 1, and no axis
  in the kernel), where `index` names for each dimension the axis of the grid along which the blocks
  lie, 0 for a single one. The axis `backwards` is walked from its end."""

  def block(index: str, *sizes: int | None, **options: Any) -> Block:
    def at(*step):
      where = {'0': 0, **dict(zip(grid, step, strict=True))}
      if backwards:
        where[backwards] = grid[backwards] - 1 - where[backwards]
      return tuple(where[i] for i in index)

    shape = tuple(grid.get(i, 1) * (size or 1) for i, size in zip(index, sizes, strict=True))
    return shape, pl.BlockSpec(sizes, at, **options)

  return block


def call(
  kernel: Callable[..., None],
  name: str,
  grid: dict[str, int],
  inputs: Sequence[tuple[Block, Any]],
  outputs: Sequence[tuple[Block, Any]],
  scratch: Sequence[tuple[int, ...]],
  *,
  parallel: int,
  flops: int,
  transcendentals: int,
  interpret: bool,
) -> Sequence[Any]:
  """`pl.pallas_call` of a kernel.

  Args:
    inputs: blocks and arrays. outputs: blocks and dtypes.
    scratch: shapes of fp32 arrays in VMEM.
    parallel: how many axes of the grid, the first ones, may be walked in any order.
  """
  results = [jax.ShapeDtypeStruct(shape, dtype) for (shape, _), dtype in outputs]
  arrays = [array for _, array in inputs]
  return pl.pallas_call(
    kernel,
    name=name,
    grid=tuple(grid.values()),
    in_specs=[spec for (_, spec), _ in inputs],
    out_specs=[spec for (_, spec), _ in outputs],
    out_shape=results,
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=['parallel'] * parallel + ['arbitrary'] * (len(grid) - parallel)
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      transcendentals=transcendentals,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
    ),
    interpret=interpret,
  )(*arrays)


def differentiable(
  forward: Callable[..., Sequence[Any]], backward: Callable[..., Any]
) -> Callable[..., Any]:
  """Return `run(options, *arrays)` -> (y, last state) of a recurrence whose last array is the state
  before.

  Args:
    forward: (options, save, *arrays) -> y, the last state and, with `save`, what the gradient
      needs, such as states.
    backward: (options, (*arrays but the last, *what was saved), gradients of y and of the last
      state) -> gradients of the arrays.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def run(options, *arrays):
    return tuple(forward(options, False, *arrays))

  def save(options, *arrays):
    y, last, *saved = forward(options, True, *arrays)
    return (y, last), (*arrays[:-1], *saved)

  run.defvjp(save, backward)
  return run
