"""Products of sorted rows with one matrix per group: the matmuls of a mixture's experts.

Row i of x belongs to group e where sizes_0 + ... + sizes_(e-1) <= i < sizes_0 + ... + sizes_e. Rows
after the last group belong to none, give zeros and cost nothing. FLOPs are those of the rows,
whatever the number of groups; `jax.lax.ragged_dot` is not used, as compilers may turn it into a
dense product of every row with every group's matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.ops.implementation import Operation
from jaxformer.sharding import platform

# Rows of a tile. On a CPU a tile must outweigh fetching a group's matrix; half a tile per group is
# wasted.
_ROWS = {'cpu': 128, 'gpu': 512}


def grouped_matmul(
  x_MK: Float[Array, 'M K'], w_EKN: Float[Array, 'E K N'], sizes_E: Int[Array, ' E']
) -> Float[Array, 'M N']:
  """y_i = x_i W_e for each row i of group e, in the dtype of x, accumulated in fp32; zeros for rows
  of no group.

  Implementations: `megablox`, the grouped matmul kernel of JAX, on a TPU; `tiles`, a loop over
  groups and over tiles of each group's rows, whose length depends on `sizes_E`, elsewhere; `naive`,
  every row with every matrix.

  Args:
    sizes_E: rows of each group; they add up to at most M.
  """
  return GROUPED_MATMUL[GROUPED_MATMUL.choose()](x_MK, w_EKN, sizes_E.astype(jnp.int32))


def grouped_matmul_naive(x_MK, w_EKN, sizes_E):
  """Every row with every group's matrix; that of its own group is selected."""
  # E for the rows of no group
  group_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MK.shape[0]), side='right')
  all_MEN = jnp.einsum('mk,ekn->men', x_MK, w_EKN, preferred_element_type=jnp.float32)
  mine_ME = group_M[:, None] == jnp.arange(w_EKN.shape[0])[None]
  return jnp.sum(jnp.where(mine_ME[:, :, None], all_MEN, 0.0), axis=1).astype(x_MK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(times, outer, x_MK, w_EKN, sizes_E):
  """`times(x, w, sizes, transposed)`, the product of rows with matrices, whose gradients are the
  same with transposed matrices and `outer(x, dy, sizes, dtype)`, the sums of outer products.
  `times` may leave anything in the rows of no group."""
  return _zeros_beyond(sizes_E, times(x_MK, w_EKN, sizes_E, False))


def _zeros_beyond(sizes_E, y_MN):
  """y with zeros in the rows of no group."""
  return jnp.where(
    (jnp.arange(len(y_MN)) < jnp.sum(sizes_E))[:, None], y_MN, jnp.zeros((), y_MN.dtype)
  )


def _forward(times, outer, *arrays):
  return _differentiable(times, outer, *arrays), arrays


def _backward(times, outer, saved, dy_MN):
  x_MK, w_EKN, sizes_E = saved
  dx_MK = _zeros_beyond(sizes_E, times(dy_MN, w_EKN, sizes_E, True))
  return dx_MK, outer(x_MK, dy_MN, sizes_E, w_EKN.dtype), None


_differentiable.defvjp(_forward, _backward)


# ---- tiles -------------------------------------------------------------------------------------


def grouped_matmul_tiles(x_MK, w_EKN, sizes_E):
  """Group by group, in tiles of each group's rows."""
  return _differentiable(_rows_by_matrices, _outer_products, x_MK, w_EKN, sizes_E)


def _tile_rows(M: int) -> int:
  return min(_ROWS.get(platform(), 512), -(-M // 8) * 8)


def _over_groups(sizes_E, rows: int, first, group):
  """`group(e, first row, tiles, carry)` for each group that has rows, in order."""
  starts_E = jnp.cumsum(sizes_E) - sizes_E

  def each(e, carry):
    # A group without rows does not fetch its matrix: most groups in decoding.
    tiles = (sizes_E[e] + rows - 1) // rows
    return jax.lax.cond(tiles > 0, lambda c: group(e, starts_E[e], tiles, c), lambda c: c, carry)

  return jax.lax.fori_loop(0, sizes_E.shape[0], each, first)


def _rows_by_matrices(x_MK, w_EKN, sizes_E, transposed):
  (M, K), rows = x_MK.shape, _tile_rows(x_MK.shape[0])
  N = w_EKN.shape[1 if transposed else 2]
  # the last tile of a group may reach into the next ones, which come later
  x = jnp.pad(x_MK, ((0, rows), (0, 0)))

  def group(e, start, tiles, y):
    w = w_EKN[e].T if transposed else w_EKN[e]

    def tile(i, y):
      at = start + i * rows
      part = jnp.matmul(
        jax.lax.dynamic_slice(x, (at, 0), (rows, K)), w, preferred_element_type=jnp.float32
      )
      return jax.lax.dynamic_update_slice(y, part.astype(y.dtype), (at, 0))

    return jax.lax.fori_loop(0, tiles, tile, y)

  return _over_groups(sizes_E, rows, jnp.zeros((M + rows, N), x_MK.dtype), group)[:M]


def _outer_products(x_MK, dy_MN, sizes_E, dtype):
  """dW_e = sum over the rows of group e of x_i^T dy_i, fp32."""
  rows = _tile_rows(x_MK.shape[0])
  x, dy = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_MK, dy_MN))
  (_, K), (_, N) = x_MK.shape, dy_MN.shape

  def group(e, start, tiles, dw):
    def tile(i, total):
      at = start + i * rows
      mine = (jnp.arange(rows) + i * rows < sizes_E[e])[:, None]
      x_tile = jnp.where(mine, jax.lax.dynamic_slice(x, (at, 0), (rows, K)), jnp.zeros((), x.dtype))
      dy_tile = jax.lax.dynamic_slice(dy, (at, 0), (rows, N))
      return total + jnp.matmul(x_tile.T, dy_tile, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, tiles, tile, jnp.zeros((K, N), jnp.float32))
    return jax.lax.dynamic_update_index_in_dim(dw, total, e, 0)

  dw = jnp.zeros((sizes_E.shape[0], K, N), jnp.float32)
  return _over_groups(sizes_E, rows, dw, group).astype(dtype)


# ---- megablox ----------------------------------------------------------------------------------

# rows and the two sides of a group's matrix, of the product; in bf16 9 MiB of the 16 of a v5e's
# VMEM
_TILE = 512, 1024, 1024
_TILE_OUTER = 512, 512, 1024  # of the sum of outer products, which holds its tile of dW in fp32


def megablox(x_MK, w_EKN, sizes_E, *, interpret: bool = False):
  """The grouped matmul of MegaBlocks (Gale et al. 2022) as a Pallas kernel for TPUs, from
  `jax.experimental`; its gradients are the same kernel with W transposed, and the one for sums of
  outer products."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

  def times(x_MK, w_EKN, sizes_E, transposed):
    M, x, w = x_MK.shape[0], _padded(x_MK), w_EKN.astype(x_MK.dtype)
    tiling = _tiling(x.shape[0], x.shape[1], w.shape[1 if transposed else 2], x.dtype, _TILE)
    dtype = jnp.dtype(x.dtype)
    return gmm(x, w, sizes_E, dtype, tiling, transpose_rhs=transposed, interpret=interpret)[:M]

  def outer(x_MK, dy_MN, sizes_E, dtype):
    x, dy = _padded(x_MK), _padded(dy_MN)
    tiling = _tiling(x.shape[0], x.shape[1], dy.shape[1], x.dtype, _TILE_OUTER)
    return tgmm(x.T, dy, sizes_E, jnp.dtype(dtype), tiling, interpret=interpret)

  return _differentiable(times, outer, x_MK, w_EKN, sizes_E.astype(jnp.int32))


def _padded(x_MK):
  """With rows of zeros up to complete tiles."""
  M = x_MK.shape[0]
  return jnp.pad(x_MK, ((0, -M % _kernel_rows(M)), (0, 0)))


def _kernel_rows(M: int) -> int:
  """The rows of a tile: at most `_TILE[0]`, in multiples of the rows of a register in bf16."""
  return min(_TILE[0], -(-M // 16) * 16)


def _tiling(M, K, N, dtype, largest):
  """Tiles of at most `largest`; half of each side of the matrix in fp32, whose numbers take twice
  the space."""
  wide = 2 if jnp.dtype(dtype).itemsize > 2 else 1
  return _kernel_rows(M), *(
    min(-(-side // 128) * 128, most // wide) for side, most in zip((K, N), largest[1:], strict=True)
  )


GROUPED_MATMUL = Operation(
  'grouped_matmul',
  {'naive': grouped_matmul_naive, 'tiles': grouped_matmul_tiles, 'megablox': megablox},
  lambda: ('megablox',) if platform() == 'tpu' else ('tiles',),
)
