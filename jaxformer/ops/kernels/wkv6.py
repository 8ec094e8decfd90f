"""WKV-6, the recurrence of RWKV-6 (Finch; Peng et al. 2024, arXiv 2404.05892), as a TPU kernel
whose state stays in VMEM, forward and backward.

The forward pass reads r, k, v and the decays once and writes y; for a gradient it also saves the
state once per `span` chunks. The backward pass walks the blocks in reverse: it recomputes a block's
states and carries the gradient of the state. Blocks are slices of [B, T, H K], as projections write
it, so nothing is transposed; tokens are padded to complete blocks, heads to complete vectors of
lanes (heads of 64 come in pairs).

Temporaries according to the TPU compiler for B8 T2048 H24 K64 in bf16 (inputs 246 MiB) on a v5e:
forward 0 MiB; with all gradients 25 MiB, the saved states 4 B H K V T / 256 bytes, where the
portable implementation takes 2553. Speed on a TPU was not measured.

Dims: B batch, T time, H heads, K key, V value dim of a head; C tokens of a chunk, X and Y as in
`kernels/wkv6_chunk.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.kernels.wkv6_chunk import (
  KernelPlan,
  chunk_gradients,
  decays,
  levels,
  load,
  log_decays,
  next_state,
  pair_weights,
  store,
  sum_matrix,
  thrice,
  time,
)
from jaxformer.sharding import platform

_LANES = 128


def _forward_kernel(plan: KernelPlan, *refs):
  """One block of tokens and heads. `saved` is the output for the state before the block, where that
  is saved; `S_ref` is the state, in scratch."""
  matrix_ref, r_ref, k_ref, v_ref, w_ref, u_ref, segment_ref, first_ref, y_ref, last_ref = refs[:10]
  *saved, S_ref = refs[10:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    S_ref[...] = plan.expand(first_ref[...])

  for ref in saved:
    ref[...] = plan.compact(S_ref[...])
  matrix, u, level, diagonal = matrix_ref[...], u_ref[...], levels(plan), plan.diagonal()

  def body(c, S_YX):
    r, k, v = load(plan, c, r_ref, k_ref, v_ref)
    chunk = decays(plan, matrix, level, log_decays(plan, n, c, w_ref), segment_ref[c])
    y = plan.unstack(plan.dot(pair_weights(plan, chunk, r, k), v, 'nn'), plan.V)
    y += plan.dot(r * chunk[1], S_YX, 'nt') + plan.dot(r * u * k, diagonal, 'nt') * v
    store(plan, c, y_ref, y)
    return next_state(plan, chunk, k, v, S_YX)

  S_ref[...] = jax.lax.fori_loop(0, plan.span, body, S_ref[...])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    last_ref[...] = plan.compact(S_ref[...])


def _backward_kernel(plan: KernelPlan, *refs):
  """One block, the last first: its states are recomputed, then its chunks go backwards with dS, the
  gradient of the state after them."""
  matrix_ref, transposed_ref, r_ref, k_ref, v_ref, w_ref, u_ref, segment_ref, saved_ref = refs[:9]
  dy_ref, dlast_ref, dr_ref, dk_ref, dv_ref, dw_ref, du_ref, dfirst_ref = refs[9:17]
  dS_ref, states_ref = refs[17:]
  n = pl.program_id(2)
  block = pl.num_programs(2) - 1 - n

  @pl.when(n == 0)
  def _():
    dS_ref[...] = plan.expand(dlast_ref[...])
    du_ref[...] = jnp.zeros_like(du_ref)
    if plan.T is not None:
      dw_ref[...] = jnp.zeros_like(dw_ref)

  matrix, level = matrix_ref[...], levels(plan)

  def chunk_of(c):
    return decays(plan, matrix, level, log_decays(plan, block, c, w_ref), segment_ref[c])

  def recompute(c, S_YX):
    states_ref[c] = S_YX
    return next_state(plan, chunk_of(c), *load(plan, c, k_ref, v_ref), S_YX)

  states_ref[plan.span - 1] = jax.lax.fori_loop(
    0, plan.span - 1, recompute, plan.expand(saved_ref[...])
  )

  def body(step, dS):
    c = plan.span - 1 - step
    r, k, v, dy = load(plan, c, r_ref, k_ref, v_ref, dy_ref)
    dr, dk, dv, dw, du, dS = chunk_gradients(
      plan, chunk_of(c), transposed_ref[...], u_ref[...], r, k, v, states_ref[c], dy, dS
    )
    for ref, x in ((dr_ref, dr), (dk_ref, dk), (dv_ref, dv)):
      store(plan, c, ref, x)
    du_ref[...] += du
    if plan.T is None:
      store(plan, c, dw_ref, dw)
    else:
      dw_ref[...] += jnp.sum(
        jnp.where(time(plan, block, c, dw.shape) < plan.T, dw, 0.0), axis=0, keepdims=True
      )
    return dS

  dS_ref[...] = jax.lax.fori_loop(0, plan.span, body, dS_ref[...])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    dfirst_ref[...] = plan.compact(dS_ref[...])


# ---- calls -------------------------------------------------------------------------------------


def _specs(plan: KernelPlan, backwards: int = 0):
  """The block of each kind of argument at step (b, h, n) of the grid; with `backwards` blocks of
  tokens, from the last to the first."""
  tokens, X, Y = plan.chunk * plan.span, plan.heads * plan.K, plan.heads * plan.V

  def spec(index: str, *shape):
    """`index`: for each dimension of the array b, h, n or 0."""

    def at(b, h, n):
      n = backwards - 1 - n if backwards and 'n' in index else n
      return tuple({'b': b, 'h': h, 'n': n, '0': 0}[i] for i in index)

    return pl.BlockSpec(shape, at)

  per_token = spec('bnh', None, tokens, X)
  return {
    'X': per_token,
    'Y': spec('bnh', None, tokens, Y),
    'w': per_token if plan.T is None else spec('00h', None, 1, X),
    'dw': per_token if plan.T is None else spec('b0h', None, 1, X),
    'u': spec('h00', None, 1, X),
    'du': spec('bh00', None, None, 1, X),
    'segment': spec('bn00', None, plan.span, 1, plan.chunk),
    'state': spec('bh00', None, None, plan.V, X),
    'saved': spec('bhn00', None, None, None, plan.V, X),
  }


def _constant(matrix: np.ndarray) -> pl.BlockSpec:
  return pl.BlockSpec((matrix.shape[0], 3 * matrix.shape[1]), lambda b, h, n: (0, 0))


def _call(
  plan: KernelPlan,
  kernel,
  name: str,
  grid: tuple[int, int, int],
  in_specs,
  out,
  scratch: int,
  pair_products: int,
):
  """`pl.pallas_call` with the options that both directions share. `out`: (spec, shape, dtype) of
  each result."""
  X, Y, C = plan.heads * plan.K, plan.heads * plan.V, plan.chunk
  tokens = math.prod(grid) * plan.span * C
  depth = int(math.log2(C))
  products = (
    plan.heads * C * (depth * X + Y) * pair_products
    + (depth + 1) * C * X
    + 4 * pair_products * X * Y
  )
  scratches: list[Any] = [
    pltpu.VMEM((Y, X), jnp.float32),
    pltpu.VMEM((plan.span, Y, X), jnp.float32),
  ]
  return pl.pallas_call(
    functools.partial(kernel, plan),
    name=name,
    grid=grid,
    in_specs=in_specs,
    out_specs=[o[0] for o in out],
    out_shape=[jax.ShapeDtypeStruct(o[1], o[2]) for o in out],
    scratch_shapes=scratches[:scratch],
    interpret=plan.interpret,
    cost_estimate=pl.CostEstimate(
      flops=2 * tokens * products,
      transcendentals=tokens * (depth + 1) * X,
      bytes_accessed=tokens * pair_products * (4 * X + 6 * (X + Y)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )


def _forward(plan: KernelPlan, save: bool, r_BTX, k_BTX, v_BTY, w_BTX, u_X, first, segment):
  B, T = r_BTX.shape[:2]
  blocks = first.shape[1]
  grid = (B, blocks, T // (plan.chunk * plan.span))
  s, matrix = _specs(plan), sum_matrix(plan.chunk)
  out = [(s['Y'], v_BTY.shape, v_BTY.dtype), (s['state'], first.shape, jnp.float32)]
  if save:
    out.append((s['saved'], (*first.shape[:2], grid[2], *first.shape[2:]), jnp.float32))
  arguments = [s[kind] for kind in ('X', 'X', 'Y', 'w', 'u', 'segment', 'state')]
  call = _call(
    plan, _forward_kernel, 'wkv6_forward', grid, [_constant(matrix), *arguments], out, 1, 1
  )
  return call(thrice(matrix), r_BTX, k_BTX, v_BTY, w_BTX, u_X, segment, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv6(plan: KernelPlan, *arguments):
  return tuple(_forward(plan, False, *arguments))


def _wkv6_fwd(plan: KernelPlan, *arguments):
  y, last, saved = _forward(plan, True, *arguments)
  return (y, last), (arguments, saved)


def _wkv6_bwd(plan: KernelPlan, residuals, gradients):
  (r, k, v, w, u, first, segment), saved = residuals
  dy, dlast = gradients
  grid = (r.shape[0], first.shape[1], saved.shape[2])
  s, matrix = _specs(plan, grid[2]), sum_matrix(plan.chunk)
  out = [(s[kind], x.shape, x.dtype) for kind, x in (('X', r), ('X', k), ('Y', v))]
  out += [(s['dw'], (r.shape[0], *w.shape[1:]), jnp.float32)]
  out += [(s['du'], (r.shape[0], *u.shape), jnp.float32), (s['state'], first.shape, jnp.float32)]
  arguments = [s[kind] for kind in ('X', 'X', 'Y', 'w', 'u', 'segment', 'saved', 'Y', 'state')]
  call = _call(
    plan,
    _backward_kernel,
    'wkv6_backward',
    grid,
    [_constant(matrix), _constant(matrix.T), *arguments],
    out,
    2,
    3,
  )
  dr, dk, dv, dw, du, dfirst = call(
    thrice(matrix), thrice(matrix.T), r, k, v, w, u, segment, saved, dy, dlast
  )
  return (
    dr,
    dk,
    dv,
    dw if plan.T is None else jnp.sum(dw, axis=0, keepdims=True),
    jnp.sum(du, axis=0),
    dfirst,
    None,
  )


_wkv6.defvjp(_wkv6_fwd, _wkv6_bwd)


def _lanes(size: int) -> int:
  """The lanes of one head: sizes that share or fill vectors of lanes."""
  return 2 ** max(3, math.ceil(math.log2(size))) if size < _LANES else -(-size // _LANES) * _LANES


def _pad(x, *sizes: int):
  return jnp.pad(x, [(0, size - old) for old, size in zip(x.shape, sizes, strict=True)])


def wkv6_pallas(
  state_BHKV,
  r_BTHK,
  k_BTHK,
  v_BTHV,
  log_decay_BTHK,
  u_HK,
  starts_BT,
  *,
  interpret: bool | None = None,
  chunk: int = 64,
  span: int = 4,
):
  """y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,
  where S_{t-1} = 0 if `starts_BT`, differentiable in all but `starts_BT`. Returns y [B, T, H, V] in
  v's dtype and the state [B, H, K, V] after the last token in fp32.

  Decays and states are fp32. Products of matrices are fp32 unless r, k and v are bf16; then their
  operands are rounded to bf16, as r, k and v were, and their sums stay fp32.

  Args:
    log_decay_BTHK: at most 0 and as low as -inf; of size 1 in B and T where all are the same
      (RWKV-5).
    state_BHKV: the state before the first token.
    interpret: run on any device, slowly; None: everywhere but on a TPU.
    chunk: tokens whose pairs become products of matrices, a power of 2 from 8; fewer where T is
      less.
    span: chunks between two saved states.
  """
  (B, T, H, K), V, dtype = r_BTHK.shape, v_BTHV.shape[-1], jnp.result_type(r_BTHK, k_BTHK, v_BTHV)
  chunk = min(chunk, max(16, 2 ** math.ceil(math.log2(T))))
  X, Y = _lanes(K), _lanes(V)
  heads = min(H, max(1, _LANES // min(X, Y)))
  static = log_decay_BTHK.shape[:2] == (1, 1)
  plan = KernelPlan(
    heads,
    X,
    Y,
    chunk,
    min(span, -(-T // chunk)),
    T if static else None,
    dtype != jnp.bfloat16,
    platform() != 'tpu' if interpret is None else interpret,
  )
  blocks = -(-H // heads)
  all_T, all_H = -(-T // (chunk * plan.span)) * chunk * plan.span, blocks * heads

  def flat(x, size, times=all_T, dtype=dtype):
    return _pad(x.astype(dtype), x.shape[0], times, all_H, size).reshape(
      x.shape[0], times, all_H * size
    )

  w = log_decay_BTHK if static else jnp.broadcast_to(log_decay_BTHK, (B, T, H, K))
  w = flat(w, X, 1 if static else all_T, jnp.float32)
  u = _pad(u_HK.astype(jnp.float32), all_H, X).reshape(blocks, 1, heads * X)
  first = _pad(state_BHKV.astype(jnp.float32), B, all_H, X, Y).reshape(B, blocks, heads, X, Y)
  first = first.transpose(0, 1, 4, 2, 3).reshape(B, blocks, Y, heads * X)
  segment = jnp.cumsum(
    _pad(starts_BT.astype(jnp.float32), B, all_T).reshape(B, -1, 1, chunk), axis=-1
  )
  y, last = _wkv6(plan, flat(r_BTHK, X), flat(k_BTHK, X), flat(v_BTHV, Y), w, u, first, segment)
  last = last.reshape(B, blocks, Y, heads, X).transpose(0, 1, 3, 4, 2).reshape(B, all_H, X, Y)
  return y.reshape(B, all_T, all_H, Y)[:, :T, :H, :V].astype(v_BTHV.dtype), last[:, :H, :K, :V]
