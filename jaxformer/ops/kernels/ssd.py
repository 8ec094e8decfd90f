"""State-space duality, the recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6), as
a TPU kernel whose state stays in VMEM, forward and backward.

With L_t the sum of the log decays up to token t of a chunk, S the state before the chunk and x' =
dt x,

  y_t = sum over s <= t of exp(L_t - L_s) (C_t . B_s) x'_s + exp(L_t) C_t S + D x_t
  S'  = exp(L_end) S + sum over s of exp(L_end - L_s) B_s x'_s^T

The grid is (batch, heads, chunks), the chunks in order. The heads of a block share B and C, so that
the products C_t . B_s are computed once per chunk and block. Channels of heads lie side by side
along lanes, as projections write them, and nothing is transposed in memory but step sizes and
decays, a number per token and head. For a gradient the forward pass saves the state before every
chunk in the dtype of the products; the backward pass walks the chunks in reverse and carries the
gradient of the state.

L_t - L_s would lose the digits of small log decays after large ones. Where products are fp32, L is
the pair of a sum of multiples of 1/16, which is exact, and a sum of remainders; where operands are
rounded to bf16, whose error is larger, one number. A start of a document is a log decay so low that
exp of it is 0; no other one is lower, so that every sum across a start is a decay of 0 too.

Gradients of log decays are sums of the weights of the pairs of tokens that a decay lies between,
never differences of larger sums.

Temporaries according to the TPU compiler for one layer of mamba2-1.3b, B8 T2048 H64 P64 N128 in
bf16 on a v5e, with all gradients and a recomputed forward pass: 145 MiB, of them 128 of saved
states; of the portable implementation 1,215. Time by its scheduled instructions: 0.78 ms forward
and 1.78 backward; of the portable implementation, forward twice and backward, 60 ms. Speed on a TPU
was not measured.

Dims: B batch, T time, H heads, P channels of a head, G groups, N state, R heads of a block, C
  tokens of a chunk; X lanes of the heads that share a vector of lanes (a tile).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.ops.kernels.blocks import blocks, call, differentiable
from jaxformer.ops.kernels.heads import LANES, dot, lanes, pad
from jaxformer.sharding import platform

_SUBLANES = 8
_GRID = 16.0  # sums of multiples of 1 / 16 are exact in fp32 up to 2^20
_UNDERFLOW = -160.0  # 2^-160 is 0 in fp32; a multiple of 1 / 16
_LOG2E = math.log2(math.e)
_BLOCK_BYTES = 4096  # of the channels of one token in a block, of a state of 128 per channel


class _Plan(NamedTuple):
  """Static sizes and options of a call."""

  heads: int  # of a block: R
  P: int
  N: int
  chunk: int
  unroll: tuple[int, int]  # tiles whose instructions are scheduled together, and backward
  exact: bool  # products in fp32, not with operands rounded to bf16
  interpret: bool

  @property
  def together(self) -> int:
    """Heads of a tile."""
    return max(1, LANES // self.P)

  @property
  def X(self) -> int:
    return self.together * self.P

  def dot(self, a, b, form: str):
    """`heads.dot` in the precision of the plan."""
    return dot(a, b, form, self.exact)

  def ordered(self, relation):
    """[C, C] in fp32: 1 where `relation` holds of the indices of row and column."""
    row, column = (
      jax.lax.broadcasted_iota(jnp.int32, (self.chunk, self.chunk), axis) for axis in (0, 1)
    )
    return relation(row, column).astype(jnp.float32)

  def sum_rows(self, *terms):
    """For every token j the sum of x [R, C] over the tokens i with relation(i, j), of all terms
    (x, relation), to fp32 precision by one product in bf16: of the highest, the middle and the
    lowest 8 bits of the significands."""
    parts, matrices = [], []
    for x, relation in terms:
      for _ in range(3):
        high = jax.lax.bitcast_convert_type(
          jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
        )
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
      matrices += [self.ordered(relation).astype(jnp.bfloat16)] * 3
    return jnp.dot(
      jnp.concatenate(parts, axis=1),
      jnp.concatenate(matrices, axis=0),
      preferred_element_type=jnp.float32,
    )

  def sum_logs(self, log_ref, sums_ref):
    """Write L [parts, R, C]; its parts are to be subtracted one by one."""
    parts = [log_ref[...]]
    if self.exact:
      high = jnp.round(parts[0] * _GRID) / _GRID
      parts = [high, parts[0] - high]
    for i, part in enumerate(parts):
      sums_ref[i] = self.sum_rows((part, lambda i, j: i <= j))

  def heads_of(self, tile):
    return [tile * self.together + j for j in range(self.together)]

  def lanes_of(self, tile):
    return pl.ds(pl.multiple_of(tile * self.X, self.X), self.X)

  def own(self, x_CX):
    """Per head of a tile x with zeros in the lanes of the other heads."""
    if self.together == 1:
      return [x_CX]
    head = jax.lax.broadcasted_iota(jnp.int32, x_CX.shape, 1) // self.P
    return [jnp.where(head == j, x_CX, 0.0) for j in range(self.together)]

  def by_lane(self, rows):
    """[1, C] per head of a tile -> [C, X]: the number of each token in all lanes of its head."""
    wide = [jnp.broadcast_to(row, (self.P, row.shape[1])) for row in rows]
    return jnp.concatenate(wide, axis=0).T

  def by_head(self, x_CX):
    """[C, X] -> [1, C] per head of a tile: the sum over its lanes."""
    shape = (max(_SUBLANES, self.together), self.X)
    head, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    sums = self.dot((lane // self.P == head).astype(jnp.float32), x_CX, 'nt')
    return [sums[j : j + 1] for j in range(self.together)]

  def decays(self, sums_ref, tile, form: str):
    """Decays of a tile of heads.

    Returns:
      between: per head [C, C], from s to t, 1 where t < s. `form` is 'ts' or 'st', the order of
        rows and columns.
      since: [C, X], from the start of the chunk to each token.
      until: [C, X], from each token to the end of the chunk.
    """
    C, width = self.chunk, max(self.chunk, self.X)
    heads, parts = self.heads_of(tile), range(sums_ref.shape[0])
    rows = [[sums_ref[p, pl.ds(h, 1), :] for p in parts] for h in heads]
    columns = [[jnp.broadcast_to(row, (width, C)).T for row in head] for head in rows]
    sign = 1.0 if form == 'ts' else -1.0
    between = [
      jnp.exp2(
        jnp.minimum(sum(sign * (c[:, :C] - r) for c, r in zip(column, row, strict=True)), 0.0)
      )
      for column, row in zip(columns, rows, strict=True)
    ]
    lane = jax.lax.broadcasted_iota(jnp.int32, (C, self.X), 1) // self.P
    sums = []
    for p in parts:
      L = columns[0][p][:, : self.X]
      for j in range(1, self.together):
        L = jnp.where(lane == j, columns[j][p][:, : self.X], L)
      sums.append(L)
    since = jnp.exp2(sum(sums))
    until = jnp.exp2(sum(L[C - 1 :] - L for L in sums))
    return between, since, until

  def over_tiles(self, body, most: int):
    """`body(tile)` for every tile, up to `most` of them in one iteration of a loop."""
    tiles = self.heads // self.together
    unroll = next(u for u in range(min(most, tiles), 0, -1) if tiles % u == 0)

    def some(i, _):
      for j in range(unroll):
        body(i * unroll + j)
      return 0

    if tiles == unroll:
      some(0, 0)
    else:
      jax.lax.fori_loop(0, tiles // unroll, some, 0)


def _forward_kernel(plan: _Plan, *refs):
  """One chunk of one block of heads. `saved` is the output for the state before the chunk, where
  that is saved; `S_ref` [N, R P] is the state, in scratch."""
  x_ref, dt_ref, log_ref, B_ref, C_ref, D_ref, first_ref, y_ref, last_ref = refs[:9]
  *saved, S_ref, sums_ref, scores_ref = refs[9:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    S_ref[...] = first_ref[...]

  plan.sum_logs(log_ref, sums_ref)
  B, C = B_ref[...], C_ref[...]
  scores_ref[...] = plan.dot(C, B, 'nt') * plan.ordered(lambda t, s: t >= s)
  transposed = B.astype(jnp.float32).T

  def body(tile):
    lanes, scores = plan.lanes_of(tile), scores_ref[...]
    between, since, until = plan.decays(sums_ref, tile, 'ts')
    x, S = x_ref[:, lanes].astype(jnp.float32), S_ref[:, lanes]
    for ref in saved:
      ref[:, lanes] = S.astype(ref.dtype)
    scaled = x * plan.by_lane([dt_ref[pl.ds(h, 1), :] for h in plan.heads_of(tile)])
    weights = jnp.concatenate([scores * decay for decay in between], axis=1)
    y = plan.dot(weights, jnp.concatenate(plan.own(scaled), axis=0), 'nn')
    y += plan.dot(C, S, 'nn') * since + D_ref[:, lanes] * x
    y_ref[:, lanes] = y.astype(y_ref.dtype)
    S_ref[:, lanes] = S * since[plan.chunk - 1 :] + plan.dot(transposed, scaled * until, 'nn')

  plan.over_tiles(body, plan.unroll[0])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    last_ref[...] = S_ref[...]


def _backward_kernel(plan: _Plan, *refs):
  """One chunk, the last first, with `dS_ref`, the gradient of the state after it, in scratch. Pairs
  of tokens are rows s and columns t."""
  x_ref, dt_ref, log_ref, B_ref, C_ref, D_ref, saved_ref, dy_ref, dlast_ref = refs[:9]
  dx_ref, ddt_ref, dlog_ref, dB_ref, dC_ref, dD_ref, dfirst_ref = refs[9:16]
  dS_ref, sums_ref, scores_ref, dscores_ref, before_ref, after_ref = refs[16:]
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    dS_ref[...] = dlast_ref[...]
    dD_ref[...] = jnp.zeros_like(dD_ref)

  plan.sum_logs(log_ref, sums_ref)
  B, C = B_ref[...], C_ref[...]
  scores_ref[...] = plan.dot(B, C, 'nt') * plan.ordered(lambda s, t: t >= s)
  transposed = C.astype(jnp.float32).T
  for ref in (dB_ref, dC_ref, dscores_ref):
    ref[...] = jnp.zeros_like(ref)

  def body(tile):
    lanes, heads, scores = plan.lanes_of(tile), plan.heads_of(tile), scores_ref[...]
    between, since, until = plan.decays(sums_ref, tile, 'st')
    x, dy = x_ref[:, lanes].astype(jnp.float32), dy_ref[:, lanes].astype(jnp.float32)
    S, dS, total = saved_ref[:, lanes], dS_ref[:, lanes], since[plan.chunk - 1 :]
    dt = plan.by_lane([dt_ref[pl.ds(h, 1), :] for h in heads])
    scaled, dys = x * dt, jnp.concatenate(plan.own(dy), axis=0)

    # pairs of tokens
    dweights = jnp.split(plan.dot(scaled, dys, 'nt'), plan.together, axis=1)
    weights = [scores * decay for decay in between]
    dscores_ref[...] += sum(d * decay for d, decay in zip(dweights, between, strict=True))
    pairs = jnp.concatenate([d * w for d, w in zip(dweights, weights, strict=True)], axis=0)
    # per head and token j the pairs s < j <= t
    across = jnp.split(plan.dot(pairs, plan.ordered(lambda t, j: t >= j), 'nn'), plan.together)
    across = [a * plan.ordered(lambda s, j: s < j) for a in across]
    dscaled = plan.dot(jnp.concatenate(weights, axis=1), dys, 'nn')

    # the states before and after
    kept, read = scaled * until, dy * since
    dkept = plan.dot(B, dS, 'nn') * until
    dscaled += dkept
    dB_ref[...] += plan.dot(kept, dS, 'nt')
    dC_ref[...] += plan.dot(read, S, 'nt')
    from_state = plan.dot(C, S, 'nn') * read
    through = total * jnp.sum(S.astype(jnp.float32) * dS, axis=0, keepdims=True)
    dS_ref[:, lanes] = dS * total + plan.dot(transposed, read, 'nn')

    dx_ref[:, lanes] = (dscaled * dt + D_ref[:, lanes] * dy).astype(dx_ref.dtype)
    dD_ref[:, lanes] += jnp.sum(dy * x, axis=0, keepdims=True)
    sums = [across, *map(plan.by_head, (x * dscaled, from_state, scaled * dkept))]
    through = [jnp.sum(own, axis=1, keepdims=True) for own in plan.own(through)]
    for j, h in enumerate(heads):
      row, (a, d, f, k) = pl.ds(h, 1), (x[j] for x in sums)
      dlog_ref[row, :] = jnp.sum(a, axis=0, keepdims=True) + through[j]
      ddt_ref[row, :], before_ref[row, :], after_ref[row, :] = d, f, k

  plan.over_tiles(body, plan.unroll[1])
  dscores = dscores_ref[...] * plan.ordered(lambda s, t: t >= s)
  dB_ref[...] += plan.dot(dscores, C, 'nn')
  dC_ref[...] += plan.dot(dscores.T, B, 'nn')
  dlog_ref[...] += plan.sum_rows(
    (before_ref[...], lambda t, j: t >= j), (after_ref[...], lambda s, j: s < j)
  )

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    dfirst_ref[...] = dS_ref[...]


# ---- calls -------------------------------------------------------------------------------------


# Names of the blocks of inputs and outputs.
_INPUTS = ('X', 'row', 'row', 'map', 'map', 'D')  # x, dt, log, B, C, D
_FORWARD_BLOCKS = (*_INPUTS, 'state'), ('X', 'state', 'saved')
_BACKWARD_BLOCKS = (
  (*_INPUTS, 'saved', 'X', 'state'),
  ('X', 'row', 'row', 'dmap', 'dmap', 'dD', 'state'),
)


def _call(plan: _Plan, backward: bool, arrays, dtypes):
  """Run a kernel on `arrays`. `dtypes` has those of the outputs; the forward kernel writes its last
  output, the states for the gradient, only if it has a dtype."""
  R, C, N, X = plan.heads, plan.chunk, plan.N, plan.heads * plan.P
  (batch, T, width), groups = arrays[0].shape, arrays[3].shape[2] // N
  grid = {'b': batch, 'h': width // X, 'n': T // C}
  block, per_group = blocks(grid, backwards='n' if backward else None), width // X // groups

  def group(b, h, n):
    return b, grid['n'] - 1 - n if backward else n, h // per_group

  named = {
    'X': block('bnh', None, C, X),
    'row': block('bh0n', None, None, R, C),
    'map': ((batch, T, groups * N), pl.BlockSpec((None, C, N), group)),
    'dmap': block('bhn0', None, None, C, N),
    'D': block('0h', 1, X),
    'dD': block('bh00', None, None, 1, X),
    'state': block('bh00', None, None, N, X),
    'saved': block('bhn00', None, None, None, N, X),
  }
  inputs, outputs = _BACKWARD_BLOCKS if backward else _FORWARD_BLOCKS
  parts = 2 if plan.exact else 1
  scratch = [(N, X), (parts, R, C), (C, C)]
  if backward:
    scratch += [(C, C), (R, C), (R, C)]
  # Products that are needed, of pairs of tokens in order and with states; backward twice as many.
  products = (C + 1) // 2 * (N + X) + 2 * N * X
  tokens = math.prod(grid.values()) * C
  return call(
    functools.partial(_backward_kernel if backward else _forward_kernel, plan),
    'ssd_backward' if backward else 'ssd_forward',
    grid,
    [(named[name], x) for name, x in zip(inputs, arrays, strict=True)],
    [(named[name], dtype) for name, dtype in zip(outputs, dtypes, strict=False)],
    scratch,
    parallel=2,
    flops=(4 if backward else 2) * tokens * products,
    transcendentals=tokens * (C * R + 2 * X),
    interpret=plan.interpret,
  )


def _forward(plan: _Plan, save: bool, x, *arrays):
  dtypes = [x.dtype, jnp.float32]
  if save:
    dtypes.append(jnp.float32 if plan.exact else jnp.bfloat16)
  return _call(plan, False, (x, *arrays), dtypes)


def _backward(plan: _Plan, saved, cotangents):
  x, _, _, B = saved[:4]
  outputs = _call(plan, True, (*saved, *cotangents), (x.dtype, *(jnp.float32,) * 6))
  dx, ddt, dlog, dB, dC, dD, dfirst = outputs
  # of the blocks of one group
  (batch, blocks_, T, N), groups = dB.shape, B.shape[2] // plan.N
  dB, dC = (
    jnp.moveaxis(d.reshape(batch, groups, blocks_ // groups, T, N).sum(2), 1, 2)
    .reshape(B.shape)
    .astype(B.dtype)
    for d in (dB, dC)
  )
  return dx, ddt, dlog * math.log(2), dB, dC, dD.sum(0).reshape(1, -1), dfirst


# y and the last state, for arrays (x, dt, log decay to the base 2, B, C, D, first state)
_ssd = differentiable(_forward, _backward)


def _heads(R: int, P: int, N: int, itemsize: int) -> int:
  """Heads of a block, of R that share their maps: complete tiles, blocks of nearly equal size."""
  together = max(1, LANES // P)
  tiles = pl.cdiv(R, together)
  most = max(1, _BLOCK_BYTES * LANES // (itemsize * together * P * max(N, LANES)))
  return pl.cdiv(tiles, pl.cdiv(tiles, most)) * together


def ssd_pallas(
  h_BHPN,
  x_BTHP,
  dt_BTH,
  A_H,
  B_BTGN,
  C_BTGN,
  D_H,
  starts_BT,
  *,
  chunk: int = 128,
  unroll: tuple[int, int] = (8, 4),
):
  """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t in every head, where h_{t-1}
  = 0 if `starts_BT`, differentiable in all but `starts_BT`. Returns y [B, T, H, P] in the dtype of
  x and the state [B, H, P, N] after the last token in fp32.

  Step sizes, decays and states are fp32. Products of matrices are fp32 unless x, B and C are bf16;
  then their operands are rounded to bf16, and their sums stay fp32.

  Args:
    chunk: tokens whose pairs become products of matrices, 128 or 256 on a TPU.
    unroll: tiles of heads whose instructions are scheduled together, at most; and backward.
  """
  (batch, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
  dtype = jnp.result_type(x_BTHP, B_BTGN, C_BTGN)
  exact, tpu = dtype != jnp.bfloat16, platform() == 'tpu'
  width, depth, R = lanes(P), pl.cdiv(N, LANES) * LANES if tpu or N > LANES else N, H // G
  heads = _heads(R, width, depth, 4 if exact else 2)
  blocks_ = pl.cdiv(R, heads)
  plan = _Plan(heads, width, depth, chunk, unroll, exact, not tpu)
  all_T, all_R = pl.cdiv(T, chunk) * chunk, blocks_ * heads

  def rows(x_BTH):
    """[B, blocks, heads of a block, T]."""
    x = pad(x_BTH.reshape(batch, T, G, R), batch, all_T, G, all_R)
    return x.transpose(0, 2, 3, 1).reshape(batch, G * blocks_, heads, all_T)

  def maps(x_BTGN):
    x = pad(x_BTGN.astype(dtype), batch, all_T, G, depth)
    return x.reshape(batch, all_T, G * depth)

  dt, A = dt_BTH.astype(jnp.float32), A_H.astype(jnp.float32) * _LOG2E
  log2 = jnp.where(starts_BT[..., None], _UNDERFLOW, jnp.maximum(dt * A[None, None], _UNDERFLOW))
  D = jnp.broadcast_to(D_H.astype(jnp.float32)[:, None], (H, P)).reshape(G, R, P)
  x = x_BTHP.astype(dtype).reshape(batch, T, G, R, P)
  x = pad(x, batch, all_T, G, all_R, width)
  # [B, H, P, N] <-> [B, blocks, N, channels of a block]
  first = pad(h_BHPN.astype(jnp.float32).reshape(batch, G, R, P, N), batch, G, all_R, width, depth)
  first = jnp.moveaxis(first.reshape(batch, G * blocks_, heads * width, depth), 3, 2)
  y, last = _ssd(
    plan,
    x.reshape(batch, all_T, -1),
    rows(dt),
    rows(log2),
    maps(B_BTGN),
    maps(C_BTGN),
    pad(D, G, all_R, width).reshape(1, -1),
    first,
  )
  y = y.reshape(batch, all_T, G, all_R, width)[:, :T, :, :R, :P].reshape(x_BTHP.shape)
  last = jnp.moveaxis(last, 2, 3).reshape(batch, G, all_R, width, depth)[:, :, :R, :P, :N]
  return y.astype(x_BTHP.dtype), last.reshape(h_BHPN.shape)
