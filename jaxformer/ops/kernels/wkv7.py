"""A generalized delta rule with a decay per channel (RWKV-7; the formulas are those of
`ops/wkv7.py`) as a TPU kernel whose state stays in VMEM, forward and backward.

The forward pass reads the inputs once and writes y; for a gradient it also saves, per chunk, the
state, the values U read under the removal keys and the inverse of the triangular matrix. The
backward pass walks the chunks in reverse and carries the gradient of the state. Blocks are slices
of [B, T, H K], as projections write it, so nothing is transposed; tokens are padded to complete
blocks, heads to complete vectors of lanes (heads of 64 come in pairs).

By the TPU compiler, for B8 T4096 H32 K64 in bf16 with decays, keys and removals in fp32, one layer
forward, forward again (recomputation) and backward, on a v5e: 11 ms by the scheduled cycles
(`experiments/kernel_bundles.py`) and 388 MiB of temporaries, which are what is saved; the portable
implementation takes 373 ms (`planning/step_clock.py`) and 6,246 MiB. Speed on a TPU was not
measured.

Dims: B batch, T time, H heads, K key, V value dim of a head; C tokens of a chunk, X and Y as in
`kernels/wkv7_chunk.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.config import InputError
from jaxformer.ops.documents import count_starts
from jaxformer.ops.kernels.blocks import blocks, call, differentiable
from jaxformer.ops.kernels.heads import LANES, lanes, pad, repeated
from jaxformer.ops.kernels.wkv7_chunk import ChunkPlan, sum_matrices
from jaxformer.sharding import platform


def in_turn(*groups: Iterator[None]) -> None:
  """Write the instructions of groups of heads in turn, those of each up to its next `yield`, which
  stands where it waits for a product: so the compiler, which does not look far, finds those of the
  others to go on with."""
  waiting = object()
  while groups:
    groups = tuple(group for group in groups if next(group, waiting) is not waiting)


def _forward_kernel(plan: ChunkPlan, *refs):
  """One block of tokens and heads. `saved` are the outputs for the gradient, where they are saved;
  `S_ref` has the states, in scratch."""
  matrix_ref, *input_refs, segment_ref, first_ref, y_ref, last_ref = refs[:11]
  *saved, S_ref = refs[11:]
  n, matrix = pl.program_id(2), matrix_ref[...]

  @pl.when(n == 0)
  def _():
    for g in range(plan.groups):
      S_ref[g] = plan.expand(first_ref[g])

  def group(g, c, documents):
    r, w, k, v, a, b = plan.load(c, g, *input_refs)
    S = S_ref[g]
    x = plan.scaled(documents, matrix, r, w, k, a, b)
    y, S_ref[g], U, inverse = yield from plan.outputs(documents, x, v, S)
    plan.store(c, g, y_ref, y)
    if saved:
      U_ref, inverse_ref, states_ref = saved
      plan.store(c, g, U_ref, U)
      plan.store(c, g, inverse_ref, inverse)
      states_ref[c, g] = plan.compact(S).astype(states_ref.dtype)

  def chunk(c, _):
    documents = plan.documents(segment_ref[c])
    in_turn(*(group(g, c, documents) for g in range(plan.groups)))

  jax.lax.fori_loop(0, plan.span, chunk, None)

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    for g in range(plan.groups):
      last_ref[g] = plan.compact(S_ref[g])


def _backward_kernel(plan: ChunkPlan, *refs):
  """One block, the last first; its chunks go backwards with dS, the gradient of the state after
  them."""
  matrix_ref, upward_ref, *input_refs, segment_ref, U_ref, inverse_ref, states_ref = refs[:12]
  dy_ref, dlast_ref, *gradient_refs, dfirst_ref, dS_ref = refs[12:]
  n, matrix, upward = pl.program_id(2), matrix_ref[...], upward_ref[...]

  @pl.when(n == 0)
  def _():
    for g in range(plan.groups):
      dS_ref[g] = plan.expand(dlast_ref[g])

  def group(g, c, documents):
    r, w, k, v, a, b, U, inverse, dy = plan.load(c, g, *input_refs, U_ref, inverse_ref, dy_ref)
    x = plan.scaled(documents, matrix, r, w, k, a, b)
    saved = U, inverse, plan.expand(states_ref[c, g].astype(jnp.float32))
    *gradients, dS_ref[g] = yield from plan.gradients(
      documents, upward, x, (r, k, v, a, b), saved, dy, dS_ref[g]
    )
    for ref, gradient in zip(gradient_refs, gradients, strict=True):
      plan.store(c, g, ref, gradient)

  def chunk(step, _):
    c = plan.span - 1 - step
    documents = plan.documents(segment_ref[c])
    in_turn(*(group(g, c, documents) for g in range(plan.groups)))

  jax.lax.fori_loop(0, plan.span, chunk, None)

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    for g in range(plan.groups):
      dfirst_ref[g] = plan.compact(dS_ref[g])


# ---- calls -------------------------------------------------------------------------------------


# Lanes of a block: of eight groups of 128, the blocks of one chunk of the backward kernel, each in
# two copies, take 6 MiB of the 16 MiB of VMEM that a program has by default, and its intermediate
# values 4; so the forward kernel may take two chunks. Of fp32 arrays half as many lanes fit.
_LANES_OF_BLOCK = 1024
# Names of the blocks of inputs and outputs.
_TOKENS = ('X', 'X', 'X', 'Y', 'X', 'X')  # r, w, k, v, a, b
_INPUTS, _SAVED = (*_TOKENS, 'segment'), ('Y', 'inverse', 'states')
_FORWARD_BLOCKS = (*_INPUTS, 'state'), ('Y', 'state', *_SAVED)
_BACKWARD_BLOCKS = (*_INPUTS, *_SAVED, 'Y', 'state'), (*_TOKENS, 'state')


def _call(plan: ChunkPlan, backward: bool, arrays, dtypes):
  """Run a kernel on the matrices that sum the decays and on `arrays`. `dtypes` has those of the
  outputs; the forward kernel writes what the gradient needs only if it has dtypes for that."""
  P, G, C, span = plan.heads, plan.groups, plan.chunk, plan.span
  X, Y, PC, tokens = P * plan.K, P * plan.V, P * C, C * span
  batch, T, width = arrays[0].shape
  grid = {'b': batch, 'h': width // (G * X), 'n': T // tokens}
  block = blocks(grid, backwards='n' if backward else None)
  named = {
    'X': block('bnh', None, tokens, G * X),
    'Y': block('bnh', None, tokens, G * Y),
    'segment': block('bn00', None, span, 1, C),
    'state': block('bh000', None, None, G, plan.V, X),
    'inverse': block('bnh', None, tokens, G * PC),
    'states': block('bhn000', None, None, span, G, plan.V, X),
  }
  inputs, outputs = _BACKWARD_BLOCKS if backward else _FORWARD_BLOCKS
  matrices = sum_matrices(C)[: 2 if backward else 1]
  parts = 3 if plan.exact else 2
  # Products of a chunk of a group, as the matrix units compute them, with the zeros of stacked
  # operands. Rows of the products that invert: 16 up to blocks of 16, then the size of the blocks.
  pairs, states = C * PC, X * Y
  if backward:
    products = pairs * (11 * X + 8 * Y) + 8 * C * states + 2 * parts * C * C * X
  else:
    rows = 2 * sum(max(min(16, C), 2**i) for i in range(2, int(math.log2(C)) + 1))
    products = pairs * (4 * X + 4 * Y) + rows * PC**2 + 4 * C * states + parts * C * C * X
  steps = math.prod(grid.values())
  return call(
    functools.partial(_backward_kernel if backward else _forward_kernel, plan),
    'wkv7_backward' if backward else 'wkv7_forward',
    grid,
    [
      *((block('00', C, parts * C), repeated(m, parts)) for m in matrices),
      *((named[name], x) for name, x in zip(inputs, arrays, strict=True)),
    ],
    [(named[name], dtype) for name, dtype in zip(outputs, dtypes, strict=False)],
    [(G, Y, X)],
    parallel=2,
    flops=2 * steps * span * G * products,
    transcendentals=3 * steps * tokens * G * X,
    interpret=plan.interpret,
  )


def _forward(plan: ChunkPlan, save: bool, *arrays):
  v = arrays[3]
  dtypes = [v.dtype, jnp.float32]
  if save:
    dtypes += [v.dtype] * 3
  return _call(plan, False, arrays, dtypes)


def _backward(plan: ChunkPlan, saved, cotangents):
  dtypes = (*(x.dtype for x in saved[:6]), jnp.float32)
  plan = dataclasses.replace(plan, span=1)
  *dtokens, dfirst = _call(plan, True, (*saved, *cotangents), dtypes)
  return *dtokens, None, dfirst


# y and the last state, for arrays (r, w, k, v, a, b, segment, first state)
_wkv7 = differentiable(_forward, _backward)


def _groups(groups: int, width: int, exact: bool) -> int:
  """Groups of a block, of `width` lanes each. They are independent of one another, so that the
  products of one go on while another waits for its own."""
  most = max(_LANES_OF_BLOCK // (2 if exact else 1) // width, 1)
  return max(g for g in range(1, most + 1) if groups % g == 0)


def longest_chunk(lowest_log_decay: float) -> int:
  """Tokens of a chunk, a power of 2 up to 64, such that decays over half of it stay above exp(-40).

  Raises:
    InputError: a chunk of 8 does not do so.
  """
  chunk = 64
  while -lowest_log_decay * chunk / 2 > 40.0:
    chunk //= 2
  if chunk < 8:
    raise InputError('lowest_log_decay', lowest_log_decay, 'at least -10')
  return chunk


def wkv7_pallas(
  state_BHVK,
  r_BTHK,
  log_decay_BTHK,
  k_BTHK,
  v_BTHV,
  a_BTHK,
  b_BTHK,
  starts_BT,
  *,
  lowest_log_decay: float,
  chunk: int | None = None,
  span: int = 2,
  precision=None,
):
  """S_t = S_{t-1} (diag(exp(log_decay_t)) + a_t b_t^T) + v_t k_t^T, y_t = S_t r_t, where S_{t-1} =
  0 if `starts_BT`, differentiable in all but `starts_BT`. Returns y [B, T, H, V] in v's dtype and
  the state [B, H, V, K] after the last token in fp32.

  Decays and states are fp32. Products of matrices are fp32 where `precision` is HIGHEST, else their
  operands are rounded to bf16 and their sums stay fp32. So is the inverse of the triangular matrix:
  its entries are as inaccurate by the rounded operands that the matrix is made of.

  Args:
    log_decay_BTHK: from `lowest_log_decay` to 0.
    a_BTHK, b_BTHK: such that transitions do not grow, else neither the state nor the inverse is
      bounded.
    state_BHVK: the state before the first token.
    lowest_log_decay: of one token. Decays between two tokens of a chunk are products of two factors
      about its middle, one above 1, of which those of half a chunk must stay below exp(40): their
      products are finite for every pair, also for those that are masked.
    chunk: tokens whose pairs become products of matrices, a power of 2 from 8; None for
      `longest_chunk`. Fewer where T is less.
    span: chunks of a block of the forward kernel.
  """
  (B, T, H, K), V = r_BTHK.shape, v_BTHV.shape[-1]
  chunk = min(chunk or longest_chunk(lowest_log_decay), max(16, pl.next_power_of_2(T)))
  X, Y = lanes(K), lanes(V)
  heads = min(H, max(1, LANES // min(X, Y)))
  exact = precision == jax.lax.Precision.HIGHEST
  groups = _groups(pl.cdiv(H, heads), heads * max(X, Y), exact)
  plan = ChunkPlan(
    heads=heads,
    K=X,
    V=Y,
    chunk=chunk,
    span=min(span, pl.cdiv(T, chunk)),
    exact=exact,
    interpret=platform() != 'tpu',
    groups=groups,
  )
  blocks_H = pl.cdiv(H, heads * groups)
  all_T, all_H = pl.cdiv(T, chunk * plan.span) * chunk * plan.span, blocks_H * heads * groups

  def flat(x, size):
    return pad(x, B, all_T, all_H, size).reshape(B, all_T, all_H * size)

  def flat_state(S):
    S = pad(S.astype(jnp.float32), B, all_H, Y, X).reshape(B, blocks_H, groups, heads, Y, X)
    return S.transpose(0, 1, 2, 4, 3, 5).reshape(B, blocks_H, groups, Y, heads * X)

  starts = pad(starts_BT, B, all_T).reshape(B, -1, 1, chunk)
  segment = count_starts(starts, axis=-1, dtype=jnp.float32)
  w = log_decay_BTHK.astype(jnp.float32)
  y, last = _wkv7(
    plan,
    *(flat(x, X) for x in (r_BTHK, w, k_BTHK)),
    flat(v_BTHV, Y),
    *(flat(x, X) for x in (a_BTHK, b_BTHK)),
    segment,
    flat_state(state_BHVK),
  )
  last = last.reshape(B, blocks_H, groups, Y, heads, X).transpose(0, 1, 2, 4, 3, 5)
  last = last.reshape(B, all_H, Y, X)
  return y.reshape(B, all_T, all_H, Y)[:, :T, :H, :V], last[:, :H, :V, :K]
