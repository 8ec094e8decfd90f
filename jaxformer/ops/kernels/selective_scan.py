"""The selective scan of Mamba (Gu & Dao 2023, section 3.3 and algorithm 2) as a Pallas kernel for
TPUs, forward and backward.

Dims: B batch, T time of a chunk, D channels, K channels of a block, N state.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.ops.chunks import to_chunks
from jaxformer.ops.kernels.blocks import blocks, call, differentiable
from jaxformer.sharding import platform

_LANES, _ROWS = 128, 8  # of a vector register in fp32
# The largest state of a block in each direction: eight registers and four, beside as many of A, of
# decays and of inputs.
_FORWARD, _BACKWARD = 8192, 4096
_LOG2E = math.log2(math.e)


def _up(a: int, b: int) -> int:
  return pl.cdiv(a, b) * b


def _channels(D: int, N: int) -> int:
  """Channels of a block of the backward kernel: complete lanes, blocks of nearly equal width."""
  most = max(_BACKWARD // N // _LANES, 1) * _LANES
  return _up(pl.cdiv(D, pl.cdiv(D, most)), _LANES)


def _store(ref, x):
  """[T, K] into [K / 128, T, 128], where `_spread` finds its rows."""
  for j in range(ref.shape[0]):
    ref[j] = x[:, j * _LANES : (j + 1) * _LANES]


def _spread(ref, t, N: int, interpret: bool):
  """Row t of the array that `_store` stored, in each of N rows, [N, K]. A load with stride 0 does
  that where a TPU would need a permutation of every register to broadcast a loaded row; the
  interpreter does not support this stride."""
  if interpret:
    return jnp.broadcast_to(ref[:, pl.ds(t, 1)].reshape(1, -1), (N, ref.shape[0] * _LANES))
  row = jnp.concatenate([ref[j, pl.ds(t, _ROWS, stride=0)] for j in range(ref.shape[0])], 1)
  return jnp.concatenate([row] * (N // _ROWS), 0)


def _columns(ref, x_NT):
  """[N, T] into [T, N, 128]: each column in all lanes, so that the time loop loads them without
  permutations."""
  ref[...] = jnp.broadcast_to(x_NT.T[: ref.shape[0], :, None], ref.shape)


def _column_sums(ref, out):
  """[T, N, 128] into [N, T]: column t is the sum over the lanes of the t-th."""
  out[:, : ref.shape[0]] = jnp.sum(ref[...], 2).T


def _wide(x_NL, K: int):
  """[N, 128] -> [N, K], the same lanes repeated."""
  return jnp.concatenate([x_NL] * (K // _LANES), 1)


def _narrow(x_NK):
  """[N, K] -> [N, 128]: the sum over the groups of 128 lanes."""
  return sum(x_NK[:, j : j + _LANES] for j in range(0, x_NK.shape[1], _LANES))


def _fold(x):
  """[N, K] -> [8, K]: the sum over the groups of eight rows."""
  return x.reshape(-1, _ROWS, x.shape[-1]).sum(0)


def _row_sums(parts):
  """Eight arrays [8, K] -> [8, K]: row r is the sum over the rows of the r-th. Halving eight of
  them together takes 10 rotations of rows where one by one would take 24."""
  row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
  for m in (4, 2, 1):
    low = (row & m) == 0
    if m == 4:
      parts = [
        jnp.where(low, a, b) + pltpu.roll(jnp.where(low, b, a), 4, 0)
        for a, b in zip(parts[:4], parts[4:], strict=True)
      ]
    else:
      parts = [
        jnp.where(low, a + pltpu.roll(a, _ROWS - m, 0), b + pltpu.roll(b, m, 0))
        for a, b in zip(parts[:m], parts[m:], strict=True)
      ]
  return parts[0]


def _forward_kernel(keep, u, dt, A, B, C, D, h0, y, hT, *rest, interpret):
  """One chunk of time of one block of channels. Refs [T, K] with K channels, [N, T] and [N, K]. The
  channels are innermost in the grid, so that the maps of a chunk are spread over the lanes once;
  the states of all channels stay in VMEM over time. `borders`: the output for the state before the
  chunk, where that is saved."""
  *borders, dt_s, x_s, y_s, B_s, C_s, h_s = rest
  t, d, (T, K), N = pl.program_id(1), pl.program_id(2), u.shape, A.shape[0]

  @pl.when(t == 0)
  def _():
    h_s[d] = h0[...]

  @pl.when(d == 0)
  def _():
    _columns(B_s, B[...])
    _columns(C_s, C[...])

  for border in borders:
    border[...] = h_s[d]
  u_TK, dt_TK = (x[...].astype(jnp.float32) for x in (u, dt))
  _store(dt_s, dt_TK)
  _store(x_s, dt_TK * u_TK)
  A_NK = A[...] * _LOG2E

  def group(i, h, resets):
    at, parts = pl.multiple_of(i * _ROWS, _ROWS), []
    for r in range(_ROWS):
      decay = jnp.exp2(A_NK * _spread(dt_s, at + r, N, interpret))
      if resets:
        decay = decay * keep[0, at + r]
      h = decay * h + _wide(B_s[at + r], K) * _spread(x_s, at + r, N, interpret)
      parts.append(_fold(_wide(C_s[at + r], K) * h))
    y_s[pl.ds(at, _ROWS)] = _row_sums(parts)
    return h

  # most chunks lie inside a document and need no product of every decay with 0 or 1
  def run(resets):
    return lambda h: jax.lax.fori_loop(0, T // _ROWS, functools.partial(group, resets=resets), h)

  h_s[d] = jax.lax.cond(keep[0, T] > 0, run(False), run(True), h_s[d])
  y[...] = (y_s[...] + D[...] * u_TK).astype(y.dtype)

  @pl.when(t == pl.num_programs(1) - 1)
  def _():
    hT[...] = h_s[d]


def _backward_kernel(*refs, interpret):
  """One chunk, the last first: its states are recomputed from the border, then the adjoint state
  goes backwards. dB and dC accumulate over the channels and dA and dD over time in VMEM."""
  keep, u, dt, A, B, C, D, border, dy, dhT = refs[:10]
  du, ddt, dA, dB, dC, dD, dh0 = refs[10:17]
  dt_s, x_s, dy_s, s_s, q_s, B_s, C_s, dB_s, dC_s, h_s, decay_s, g_s, dA_s, dD_s = refs[17:]
  t, d, (T, K), N = pl.program_id(1), pl.program_id(2), u.shape, A.shape[0]

  @pl.when(t == 0)
  def _():
    g_s[d] = dhT[...]
    dA_s[d] = jnp.zeros_like(A)
    dD_s[d] = jnp.zeros_like(D)

  @pl.when(d == 0)
  def _():
    _columns(B_s, B[...])
    _columns(C_s, C[...])
    dB_s[...] = jnp.zeros_like(dB_s)
    dC_s[...] = jnp.zeros_like(dC_s)

  u_TK, dt_TK, dy_TK = (x[...].astype(jnp.float32) for x in (u, dt, dy))
  _store(dt_s, dt_TK)
  _store(x_s, dt_TK * u_TK)
  _store(dy_s, dy_TK)
  A_NK = A[...]
  log2_NK = A_NK * _LOG2E

  def recompute(i, h):
    at = pl.multiple_of(i * _ROWS, _ROWS)
    for r in range(_ROWS):
      decay = jnp.exp2(log2_NK * _spread(dt_s, at + r, N, interpret)) * keep[0, at + r]
      h_s[at + r], decay_s[at + r] = h, decay
      h = decay * h + _wide(B_s[at + r], K) * _spread(x_s, at + r, N, interpret)
    return h

  h = jax.lax.fori_loop(0, T // _ROWS, recompute, border[...])

  def group(i, carry):
    g, h, dA_NK = carry
    at, s, q = pl.multiple_of(T - _ROWS - i * _ROWS, _ROWS), [], []
    for r in reversed(range(_ROWS)):
      dt_NK, x_NK, dy_NK = (_spread(s, at + r, N, interpret) for s in (dt_s, x_s, dy_s))
      dC_s[at + r] += _narrow(dy_NK * h)
      g = g + _wide(C_s[at + r], K) * dy_NK
      dB_s[at + r] += _narrow(g * x_NK)
      s.append(_fold(g * _wide(B_s[at + r], K)))
      h = h_s[at + r]
      g = g * decay_s[at + r]
      e = g * h
      q.append(_fold(e * A_NK))
      dA_NK = dA_NK + e * dt_NK
    s_s[pl.ds(at, _ROWS)], q_s[pl.ds(at, _ROWS)] = _row_sums(s[::-1]), _row_sums(q[::-1])
    return g, h, dA_NK

  g_s[d], _, dA_s[d] = jax.lax.fori_loop(0, T // _ROWS, group, (g_s[d], h, dA_s[d]))
  dD_s[d] += jnp.sum(dy_TK * u_TK, 0, keepdims=True)
  du[...] = (D[...] * dy_TK + dt_TK * s_s[...]).astype(du.dtype)
  ddt[...] = (u_TK * s_s[...] + q_s[...]).astype(ddt.dtype)

  @pl.when(d == pl.num_programs(2) - 1)
  def _():
    _column_sums(dB_s, dB)
    _column_sums(dC_s, dC)

  @pl.when(t == pl.num_programs(1) - 1)
  def _():
    dh0[...], dA[...], dD[...] = g_s[d], dA_s[d], dD_s[d]


def _chunk(T: int, D: int, N: int) -> int:
  """Positions of a chunk: the lanes of one register, fewer for a short sequence (16 rows are a
  whole tile of bfloat16) and for a state so wide that the backward kernel would need more than 13
  of the 16 MiB of VMEM that a program has by default."""
  K = _channels(D, N)
  # spread maps and their gradients; states and decays; rows
  position = 4 * N * _LANES + 2 * N * K + 15 * K
  fits = (13 * 2**18 - N * (2 * D + 12 * K)) // position // 16 * 16
  return min(_up(T, 16), max(fits, 16), _LANES)


# Names of the blocks of inputs and outputs.
_INPUTS = ('keep', 'TD', 'TD', 'ND', 'NT', 'NT', 'D')  # keep, u, dt, A, B, C, D
_FORWARD_BLOCKS = (*_INPUTS, 'first'), ('TD', 'last', 'borders')
_BACKWARD_BLOCKS = (
  (*_INPUTS, 'borders', 'TD', 'first'),
  ('TD', 'TD', 'last', 'NT', 'NT', 'last D', 'last'),
)


def _call(backward: bool, interpret: bool, arrays, dtypes):
  """Run a kernel on `arrays`. `dtypes` has those of the outputs; the forward kernel writes its last
  output, the states for the gradient, only if it has a dtype."""
  keep, u, _, A = arrays[:4]
  (batch, T, D), N, chunk = u.shape, A.shape[0], keep.shape[3] - 1
  K = _channels(D, N)
  if not backward and D % (2 * K) == 0 and 2 * K * N <= _FORWARD:
    K *= 2
  grid = {'b': batch, 't': T // chunk, 'd': D // K}
  block = blocks(grid, backwards='t' if backward else None)

  def once(rows: int, round_: int, rest: int):
    """Fetched, or written, only in one round over the channels."""

    def at(b, t, d):
      return b, 0, jnp.where(t == round_, d, rest)

    return (batch, rows, D), pl.BlockSpec((None, rows, K), at)

  named = {
    'keep': block('bt00', None, None, 1, chunk + 1, memory_space=pltpu.SMEM),
    'TD': block('btd', None, chunk, K),
    'NT': block('bt00', None, None, N, _LANES),
    'ND': block('0d', N, K),
    'D': block('0d', 1, K),
    'borders': block('bt0d', None, None, N, K),
    'first': once(N, 0, grid['d'] - 1),
    'last': once(N, grid['t'] - 1, 0),
    'last D': once(1, grid['t'] - 1, 0),
  }
  inputs, outputs = _BACKWARD_BLOCKS if backward else _FORWARD_BLOCKS
  rows, spread, states = (K // _LANES, chunk, _LANES), (chunk, N, _LANES), (grid['d'], N, K)
  scratch = [rows] * 2 + [(chunk, K)] + [spread] * 2 + [states]
  if backward:
    scratch = [rows] * 3 + [(chunk, K)] * 2 + [spread] * 4 + [(chunk, N, K)] * 2
    scratch += [states] * 2 + [(grid['d'], 1, K)]
  return call(
    functools.partial(_backward_kernel if backward else _forward_kernel, interpret=interpret),
    'selective_scan_backward' if backward else 'selective_scan',
    grid,
    [(named[name], x) for name, x in zip(inputs, arrays, strict=True)],
    [(named[name], dtype) for name, dtype in zip(outputs, dtypes, strict=False)],
    scratch,
    parallel=1,
    flops=(24 if backward else 8) * u.size * N,
    transcendentals=u.size * N,
    interpret=interpret,
  )


def _forward(interpret: bool, save: bool, keep, u, *arrays):
  dtypes = [u.dtype, jnp.float32]
  if save:
    dtypes.append(jnp.float32)
  return _call(False, interpret, (keep, u, *arrays), dtypes)


def _backward(interpret: bool, saved, cotangents):
  """The batch, over which the gradients of A and D are summed here, may run on two cores."""
  dtypes = (saved[1].dtype, saved[2].dtype, *(jnp.float32,) * 5)
  du, ddt, dA, dB, dC, dD, dh = _call(True, interpret, (*saved, *cotangents), dtypes)
  return None, du, ddt, dA.sum(0), dB, dC, dD.sum(0), dh


# y and the last state, for arrays (keep, u, dt, A, B, C, D, h)
_scan = differentiable(_forward, _backward)


def selective_scan_pallas(h_BDN, u_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, starts_BT):
  """h_t = exp(dt_t A) (0 where a document starts, else h_{t-1}) + dt_t u_t B_t;  y_t = C_t h_t + D
  u_t  (section 3.3, with the simplified Euler rule for B of the authors' code), for h [B, D, N]
  before the first token, u and dt [B, T, D], A [D, N], B and C [B, T, N], D [D].

  Returns y, in the dtype of u, and the last state, in fp32. Where there is no TPU it is
  interpreted, which is slow."""
  f32 = jnp.float32
  (_, T, D), N = u_BTD.shape, A_DN.shape[1]
  rows = -N % _ROWS
  lanes = -D % _channels(D, N + rows)
  chunk = _chunk(T, D + lanes, N + rows)

  def wide(x_BTD):
    # A complete array stays as it is; a copy would be kept for the backward pass beside it.
    if not lanes and not T % chunk:
      return x_BTD
    return jnp.pad(x_BTD, ((0, 0), (0, -T % chunk), (0, lanes)))

  def columns(x_BTN):
    x = to_chunks(jnp.pad(x_BTN.astype(f32), ((0, 0), (0, 0), (0, rows))), chunk)
    return jnp.pad(x.transpose(1, 0, 3, 2), ((0, 0), (0, 0), (0, 0), (0, _LANES - chunk)))

  keep = 1 - jnp.swapaxes(to_chunks(starts_BT.astype(f32), chunk), 0, 1)[:, :, None]
  keep = jnp.concatenate([keep, keep.min(-1, keepdims=True)], -1)
  h = jnp.pad(h_BDN.astype(f32).transpose(0, 2, 1), ((0, 0), (0, rows), (0, lanes)))
  A = jnp.pad(A_DN.astype(f32).T, ((0, rows), (0, lanes)))
  skip = jnp.pad(D_D.astype(f32)[None], ((0, 0), (0, lanes)))
  inputs = wide(u_BTD), wide(dt_BTD), A, columns(B_BTN), columns(C_BTN), skip, h
  y, h = _scan(platform() != 'tpu', keep, *inputs)
  return y[:, :T, :D], h[:, :N, :D].transpose(0, 2, 1)
