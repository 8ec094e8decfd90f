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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.ops.documents import count_starts
from jaxformer.ops.kernels.blocks import blocks, call, differentiable
from jaxformer.ops.kernels.heads import LANES, lanes, pad, repeated
from jaxformer.ops.kernels.wkv6_chunk import KernelPlan, sum_matrix
from jaxformer.sharding import platform


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
  matrix, u, level, diagonal = matrix_ref[...], u_ref[...], plan.levels(), plan.diagonal()

  def body(c, S_YX):
    r, k, v, w = plan.load(c, r_ref, k_ref, v_ref, w_ref)
    chunk = plan.decays(matrix, level, w, segment_ref[c])
    y = plan.unstack(plan.dot(plan.pair_weights(chunk, r, k), v, 'nn'), plan.V)
    y += plan.dot(r * chunk[1], S_YX, 'nt') + plan.dot(r * u * k, diagonal, 'nt') * v
    plan.store(c, y_ref, y)
    return plan.next_state(chunk, k, v, S_YX)

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

  @pl.when(n == 0)
  def _():
    dS_ref[...] = plan.expand(dlast_ref[...])
    du_ref[...] = jnp.zeros_like(du_ref)

  matrix, level = matrix_ref[...], plan.levels()

  def chunk_of(c):
    return plan.decays(matrix, level, *plan.load(c, w_ref), segment_ref[c])

  def recompute(c, S_YX):
    states_ref[c] = S_YX
    return plan.next_state(chunk_of(c), *plan.load(c, k_ref, v_ref), S_YX)

  states_ref[plan.span - 1] = jax.lax.fori_loop(
    0, plan.span - 1, recompute, plan.expand(saved_ref[...])
  )

  def body(step, dS):
    c = plan.span - 1 - step
    r, k, v, dy = plan.load(c, r_ref, k_ref, v_ref, dy_ref)
    dr, dk, dv, dw, du, dS = plan.chunk_gradients(
      chunk_of(c), transposed_ref[...], u_ref[...], r, k, v, states_ref[c], dy, dS
    )
    for ref, x in ((dr_ref, dr), (dk_ref, dk), (dv_ref, dv), (dw_ref, dw)):
      plan.store(c, ref, x)
    du_ref[...] += du
    return dS

  dS_ref[...] = jax.lax.fori_loop(0, plan.span, body, dS_ref[...])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    dfirst_ref[...] = plan.compact(dS_ref[...])


# ---- calls -------------------------------------------------------------------------------------


# Names of the blocks of inputs and outputs.
_INPUTS = ('X', 'X', 'Y', 'X', 'u', 'segment')  # r, k, v, w, u, segment
_FORWARD_BLOCKS = (*_INPUTS, 'state'), ('Y', 'state', 'saved')
_BACKWARD_BLOCKS = (*_INPUTS, 'saved', 'Y', 'state'), ('X', 'X', 'Y', 'X', 'du', 'state')


def _call(plan: KernelPlan, backward: bool, arrays, dtypes):
  """Run a kernel on the matrices that sum the decays and on `arrays`. `dtypes` has those of the
  outputs; the forward kernel writes its last output, the states for the gradient, only if it has a
  dtype."""
  X, Y, C = plan.heads * plan.K, plan.heads * plan.V, plan.chunk
  (batch, T, width), tokens, depth = arrays[0].shape, C * plan.span, int(math.log2(C))
  grid = {'b': batch, 'h': width // X, 'n': T // tokens}
  block = blocks(grid, backwards='n' if backward else None)
  named = {
    'X': block('bnh', None, tokens, X),
    'Y': block('bnh', None, tokens, Y),
    'u': block('h00', None, 1, X),
    'du': block('bh00', None, None, 1, X),
    'segment': block('bn00', None, plan.span, 1, C),
    'state': block('bh00', None, None, plan.V, X),
    'saved': block('bhn00', None, None, None, plan.V, X),
  }
  inputs, outputs = _BACKWARD_BLOCKS if backward else _FORWARD_BLOCKS
  matrices, scratch = [sum_matrix(C)], [(Y, X)]
  products = (
    plan.heads * C * (depth * X + Y) + 4 * X * Y
  )  # of every pair of tokens, and with states
  if backward:
    matrices.append(sum_matrix(C).T)
    scratch = [*scratch, (plan.span, Y, X)]
    products *= 3
  return call(
    functools.partial(_backward_kernel if backward else _forward_kernel, plan),
    'wkv6_backward' if backward else 'wkv6_forward',
    grid,
    [
      *((block('00', *m.shape), m) for m in (repeated(m, 3) for m in matrices)),
      *((named[name], x) for name, x in zip(inputs, arrays, strict=True)),
    ],
    [(named[name], dtype) for name, dtype in zip(outputs, dtypes, strict=False)],
    scratch,
    parallel=2,
    flops=2 * math.prod(grid.values()) * tokens * (products + (depth + 1) * C * X),
    transcendentals=math.prod(grid.values()) * tokens * (depth + 1) * X,
    interpret=plan.interpret,
  )


def _forward(plan: KernelPlan, save: bool, r, k, v, *arrays):
  dtypes = [v.dtype, jnp.float32]
  if save:
    dtypes.append(jnp.float32)
  return _call(plan, False, (r, k, v, *arrays), dtypes)


def _backward(plan: KernelPlan, saved, cotangents):
  dtypes = (*(x.dtype for x in saved[:3]), *(jnp.float32,) * 3)
  *dtokens, du, dfirst = _call(plan, True, (*saved, *cotangents), dtypes)
  return *dtokens, jnp.sum(du, axis=0), None, dfirst


# y and the last state, for arrays (r, k, v, w, u, segment, first state)
_wkv6 = differentiable(_forward, _backward)


def wkv6_pallas(
  state_BHKV,
  r_BTHK,
  k_BTHK,
  v_BTHV,
  log_decay_BTHK,
  u_HK,
  starts_BT,
  *,
  chunk: int = 64,
  span: int = 4,
):
  """y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,
  where S_{t-1} = 0 if `starts_BT`, differentiable in all but `starts_BT`. Returns y [B, T, H, V] in
  v's dtype and the state [B, H, K, V] after the last token in fp32.

  Decays and states are fp32. Products of matrices are fp32 unless r, k and v are bf16; then their
  operands are rounded to bf16, as r, k and v were, and their sums stay fp32.

  Args:
    log_decay_BTHK: at most 0 and as low as -inf.
    state_BHKV: the state before the first token.
    chunk: tokens whose pairs become products of matrices, a power of 2 from 8; fewer where T is
      less.
    span: chunks between two saved states.
  """
  (B, T, H, K), V, dtype = r_BTHK.shape, v_BTHV.shape[-1], jnp.result_type(r_BTHK, k_BTHK, v_BTHV)
  chunk = min(chunk, max(16, pl.next_power_of_2(T)))
  X, Y = lanes(K), lanes(V)
  heads = min(H, max(1, LANES // min(X, Y)))
  plan = KernelPlan(
    heads, X, Y, chunk, min(span, pl.cdiv(T, chunk)), dtype != jnp.bfloat16, platform() != 'tpu'
  )
  H_blocks = pl.cdiv(H, heads)
  all_T, all_H = pl.cdiv(T, chunk * plan.span) * chunk * plan.span, H_blocks * heads

  def flat(x, size, dtype=dtype):
    return pad(x.astype(dtype), B, all_T, all_H, size).reshape(B, all_T, all_H * size)

  w = flat(log_decay_BTHK, X, jnp.float32)
  u = pad(u_HK.astype(jnp.float32), all_H, X).reshape(H_blocks, 1, heads * X)
  first = pad(state_BHKV.astype(jnp.float32), B, all_H, X, Y).reshape(B, H_blocks, heads, X, Y)
  first = first.transpose(0, 1, 4, 2, 3).reshape(B, H_blocks, Y, heads * X)
  starts = pad(starts_BT, B, all_T).reshape(B, -1, 1, chunk)
  segment = count_starts(starts, axis=-1, dtype=jnp.float32)
  y, last = _wkv6(plan, flat(r_BTHK, X), flat(k_BTHK, X), flat(v_BTHV, Y), w, u, segment, first)
  last = last.reshape(B, H_blocks, Y, heads, X).transpose(0, 1, 3, 4, 2).reshape(B, all_H, X, Y)
  return y.reshape(B, all_T, all_H, Y)[:, :T, :H, :V].astype(v_BTHV.dtype), last[:, :H, :K, :V]
