"""Projections: a kernel, an optional bias, and how both are sharded and initialized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.layers.init import Init
from jaxformer.layers.layer import LayerPosition
from jaxformer.ops.linear import linear
from jaxformer.sharding import param, shard


class Dense(nnx.Module):
  """y = x kernel + bias over the last axis (`ops.linear`).

  The kernel is drawn first. The bias has no weight decay; its logical axis is that of the kernel's
  outputs, or `norm` (replicated) where these are the residual stream."""

  def __init__(
    self,
    init: Init,
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    position: LayerPosition,
    bias: bool | Init = False,
    **metadata: Any,
  ):
    """
    Args:
      init: initialization of the kernel.
      shape: of the kernel: inputs, outputs.
      axes: logical axes of the kernel.
      bias: False for none, True for one that starts at 0, or its initialization, with the kernel's
        fan-in.
      metadata: of the kernel (`sharding.param`).
    """
    drawn = init(rngs.params(), shape, shape[0], position)
    self.kernel = param(drawn, axes, **metadata)
    size, axis = shape[1:], 'norm' if axes[1] in ('embed', None) else axes[1]
    start = None
    if bias is not False:
      start = jnp.zeros(size) if bias is True else bias(rngs.params(), size, shape[0], position)
    self.bias = None if start is None else param(start, (axis,), decay=False)

  @property
  def dtype(self) -> jnp.dtype:
    """The compute dtype: that of the kernel."""
    return self.kernel[...].dtype

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B F']:
    return linear(x, self.kernel[...], None if self.bias is None else self.bias[...])


def by_head(
  x_BTD: Float[Array, 'B T D'], head_dim: int, axis: str = 'heads', time: str | None = 'time'
) -> Float[Array, 'B T H K']:
  """Channels as heads, sharded over these (`axis`) and over `time`."""
  if x_BTD.shape[1] == 1:
    # For one position XLA reshapes the weights in place of the product, and a TPU then holds a copy
    # of them in another layout.
    x_BTD = jax.lax.optimization_barrier(x_BTD)
  return shard(x_BTD.reshape(*x_BTD.shape[:2], -1, head_dim), 'batch', time, axis, None)


class BlockDense(nnx.Module):
  """y_h = x_h kernel_h + bias_h for each block of channels: a block-diagonal projection."""

  def __init__(
    self,
    init: Init,
    shape: tuple[int, int, int],
    *,
    rngs: nnx.Rngs,
    position: LayerPosition,
    bias: bool = False,
    fan_in: int | None = None,
    **metadata: Any,
  ):
    """
    Args:
      init: initialization of the kernels.
      shape: blocks, their inputs, their outputs.
      bias: whether there is one, which starts at 0.
      fan_in: of `init`; None for the channels of a block.
      metadata: of the kernel and the bias (`sharding.param`).
    """
    blocks, inputs, outputs = shape
    drawn = init(rngs.params(), shape, fan_in or inputs, position)
    self.kernel = param(drawn, ('heads', None, None), **metadata)
    start = jnp.zeros((blocks, outputs))
    self.bias = (
      param(start, ('heads', None), decay=False, matmul=False, **metadata) if bias else None
    )

  def __call__(self, x_BTHK: Float[Array, 'B T H K']) -> Float[Array, 'B T H F']:
    y = jnp.einsum('BTHK,HKF->BTHF', x_BTHK, self.kernel[...])
    return y if self.bias is None else y + self.bias[...][None, None]


class EmbeddingTable(nnx.Module):
  """A table with one vector per row. An index outside it reads the nearest row.

  Args:
    init: initialization, with the number of rows as fan-in.
    shape: rows, width.
    axes: logical axes.
    matmul: whether it is also the matrix of a product per token, as that of a tied head.
  """

  def __init__(
    self,
    init: Init,
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    *,
    rngs: nnx.Rngs,
    matmul: bool = False,
  ):
    self.table = param(init(rngs.params(), shape, shape[0], LayerPosition()), axes, matmul=matmul)

  def __call__(self, index: Int[Array, '*B']) -> Float[Array, '*B D']:
    return jnp.take(self.table[...], index, axis=0, mode='clip')


class ExpertDense(nnx.Module):
  """The kernels of one projection in each of E experts, `[E, D, F]`, and perhaps biases `[E, F]`,
  which start at 0. Each expert's kernel is drawn independently; `ops.moe` multiplies them with the
  tokens that are routed there."""

  def __init__(
    self,
    init: Init,
    shape: tuple[int, int, int],
    axes: tuple[str, str],
    *,
    rngs: nnx.Rngs,
    position: LayerPosition,
    active: float,
    bias: bool = False,
  ):
    """
    Args:
      shape: experts, inputs, outputs.
      axes: logical axes of one expert's kernel; the bias has that of the outputs, or `norm` as in
        `Dense`.
      active: the fraction of experts that one token is sent to.
    """
    experts, matrix = shape[0], shape[1:]
    drawn = jax.vmap(lambda key: init(key, matrix, matrix[0], position))(
      jax.random.split(rngs.params(), experts)
    )
    self.kernel = param(drawn, ('experts', *axes), active=active)
    axis = 'norm' if axes[1] == 'embed' else axes[1]
    start = jnp.zeros((experts, shape[2])) if bias else None
    self.bias = (
      None if start is None else param(start, ('experts', axis), decay=False, active=active)
    )
