"""The selective scan of Mamba (Gu & Dao 2023, section 3.3 and algorithm 2) as a Pallas kernel for
TPUs, forward and backward."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

_LANES, _ROWS = 128, 8  # of a vector register in fp32
# Numbers of state in a block: eight registers and four, beside as many of A, of decays and of what
# is added.
_FORWARD, _BACKWARD = 8192, 4096
_LOG2E = math.log2(math.e)


def _cdiv(a: int, b: int) -> int:
  return -(-a // b)


def _up(a: int, b: int) -> int:
  return _cdiv(a, b) * b


def _channels(D: int, N: int, numbers: int) -> int:
  """Channels of a block: at most `numbers` of state, whole lanes, blocks of nearly equal width."""
  most = max(numbers // N // _LANES, 1) * _LANES
  return _up(_cdiv(D, _cdiv(D, most)), _LANES)


def _read(ref, lanes, rows=None):
  """A block in fp32 with zeros where it hangs over the array: `lanes` and `rows` are left of it,
  None where it never does."""
  x = ref[...].astype(jnp.float32)
  if lanes is not None:
    x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < lanes, x, 0.0)
  if rows is not None:
    x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < rows, x, 0.0)
  return x


def _store(ref, x):
  """[T, K] into [K / 128, T, 128], where `_spread` finds its rows."""
  for j in range(ref.shape[0]):
    ref[j] = x[:, j * _LANES : (j + 1) * _LANES]


def _spread(ref, t, N: int, interpret: bool):
  """Row t of what `_store` stored in each of N rows, [N, K]. A load with stride 0 does that where a
  TPU would spend a permutation on every register to broadcast a row that it has loaded; the
  interpreter knows no such stride."""
  if interpret:
    return jnp.broadcast_to(ref[:, pl.ds(t, 1)].reshape(1, -1), (N, ref.shape[0] * _LANES))
  row = jnp.concatenate([ref[j, pl.ds(t, _ROWS, stride=0)] for j in range(ref.shape[0])], 1)
  return jnp.concatenate([row] * (N // _ROWS), 0)


def _columns(ref, x_NT):
  """[N, T] into [T, N, 128]: each column in all lanes. The time loop then loads what it would have
  to permute."""
  ref[...] = jnp.broadcast_to(x_NT.T[: ref.shape[0], :, None], ref.shape)


def _column_sums(ref, out):
  """[T, N, 128] into [N, T]: column t is the sum over the lanes of the t-th."""
  out[:, : ref.shape[0]] = jnp.sum(ref[...], 2).T


def _wide(x_NL, K: int):
  """[N, 128] -> [N, K], the same lanes again and again."""
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


def _left(size: int, block: int, index):
  """How much of an axis is left at a block, None where blocks divide it."""
  return None if size % block == 0 else size - index * block


def _forward_kernel(keep, u, dt, A, B, C, D, h0, y, *rest, size, interpret):
  """One chunk of time of one block of channels; see `_forward`. Refs [T, K] with K channels, [N, T]
  and [N, K]."""
  *borders, hT, dt_s, x_s, y_s, B_s, C_s, h_s = rest
  t, d, (T, K), N = pl.program_id(1), pl.program_id(2), u.shape, A.shape[0]
  lanes, rows = _left(size[1], K, d), _left(size[0], T, t)

  @pl.when(t == 0)
  def _():
    h_s[d] = h0[...]

  @pl.when(d == 0)
  def _():
    _columns(B_s, B[...])
    _columns(C_s, C[...])

  for border in borders:
    border[...] = h_s[d]
  u_TK, dt_TK = _read(u, lanes, rows), _read(dt, lanes, rows)
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

  # most chunks lie inside of a document and spare the product of every decay with 1
  def run(resets):
    return lambda h: jax.lax.fori_loop(0, T // _ROWS, functools.partial(group, resets=resets), h)

  h_s[d] = jax.lax.cond(keep[0, T] > 0, run(False), run(True), h_s[d])
  y[...] = (y_s[...] + D[...] * u_TK).astype(y.dtype)

  @pl.when(t == pl.num_programs(1) - 1)
  def _():
    hT[...] = h_s[d]


def _backward_kernel(
  keep,
  u,
  dt,
  A,
  B,
  C,
  D,
  border,
  dy,
  dhT,
  du,
  ddt,
  dA,
  dB,
  dC,
  dD,
  dh0,
  dt_s,
  x_s,
  dy_s,
  s_s,
  q_s,
  B_s,
  C_s,
  dB_s,
  dC_s,
  h_s,
  decay_s,
  g_s,
  dA_s,
  dD_s,
  *,
  size,
  interpret,
):
  """One chunk, the last first: its states again from the border, then the adjoint state backwards;
  see `_backward`."""
  t, d, (T, K), N = pl.program_id(1), pl.program_id(2), u.shape, A.shape[0]
  lanes, rows = _left(size[1], K, d), _left(size[0], T, pl.num_programs(1) - 1 - t)

  @pl.when(t == 0)
  def _():
    g_s[d] = _read(dhT, lanes)
    dA_s[d] = jnp.zeros_like(A)
    dD_s[d] = jnp.zeros_like(D)

  @pl.when(d == 0)
  def _():
    _columns(B_s, B[...])
    _columns(C_s, C[...])
    dB_s[...] = jnp.zeros_like(dB_s)
    dC_s[...] = jnp.zeros_like(dC_s)

  u_TK, dt_TK, dy_TK = (_read(x, lanes, rows) for x in (u, dt, dy))
  _store(dt_s, dt_TK)
  _store(x_s, dt_TK * u_TK)
  _store(dy_s, dy_TK)
  A_NK = _read(A, lanes)
  log2_NK = A_NK * _LOG2E

  def again(i, h):
    at = pl.multiple_of(i * _ROWS, _ROWS)
    for r in range(_ROWS):
      decay = jnp.exp2(log2_NK * _spread(dt_s, at + r, N, interpret)) * keep[0, at + r]
      h_s[at + r], decay_s[at + r] = h, decay
      h = decay * h + _wide(B_s[at + r], K) * _spread(x_s, at + r, N, interpret)
    return h

  h = jax.lax.fori_loop(0, T // _ROWS, again, _read(border, lanes))

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
  K = _channels(D, N, _BACKWARD)
  # spread maps and their gradients; states and decays; rows
  position = 4 * N * _LANES + 2 * N * K + 15 * K
  fits = (13 * 2**18 - N * (2 * D + 12 * K)) // position // 16 * 16
  return min(_up(T, 16), max(fits, 16), _LANES)


def _specs(
  N: int, chunk: int, K: int, chunks: int, blocks: int, reverse: bool
) -> dict[str, pl.BlockSpec]:
  """What one program of the grid (batch, time, channels) sees. 'first' and 'last' are fetched, or
  written, in the first or last round over the channels alone."""

  def spec(shape, index, **where):
    return pl.BlockSpec(
      shape, lambda b, t, d: index(b, chunks - 1 - t if reverse else t, d), **where
    )

  def once(rows, round_, rest):
    return pl.BlockSpec((None, rows, K), lambda b, t, d: (b, 0, jnp.where(t == round_, d, rest)))

  return {
    'keep': spec((None, None, 1, chunk + 1), lambda b, t, d: (b, t, 0, 0), memory_space=pltpu.SMEM),
    'TD': spec((None, chunk, K), lambda b, t, d: (b, t, d)),
    'NT': spec((None, None, N, _LANES), lambda b, t, d: (b, t, 0, 0)),
    'ND': spec((N, K), lambda b, t, d: (0, d)),
    'D': spec((1, K), lambda b, t, d: (0, d)),
    'borders': spec((None, None, N, K), lambda b, t, d: (b, t, 0, d)),
    'first': once(N, 0, blocks - 1),
    'last': once(N, chunks - 1, 0),
    'last D': once(1, chunks - 1, 0),
  }


def _shape(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _vmem(*shape: int):
  return pltpu.VMEM(shape, jnp.float32)


def _options(name: str, interpret: bool, flops: int, exponentials: int, moved) -> dict[str, Any]:
  cost = pl.CostEstimate(
    flops=flops,
    transcendentals=exponentials,
    bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
  )
  return {
    'compiler_params': pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary')
    ),
    'cost_estimate': cost,
    'interpret': interpret,
    'name': name,
  }


def _forward(u, dt, A, B, C, D, h, keep, interpret: bool, save: bool):
  """(y, [the states before each chunk: B chunks N D,] the last state). The grid's channels are
  innermost, so that the maps of a chunk are spread over the lanes once; the states of all channels
  stay in VMEM over time."""
  (Bt, T, Dm), N, (chunks, chunk) = u.shape, A.shape[0], (keep.shape[1], keep.shape[3] - 1)
  K = _channels(Dm, N, _FORWARD)
  blocks, tiles = _cdiv(Dm, K), _vmem(K // _LANES, chunk, _LANES)
  s = _specs(N, chunk, K, chunks, blocks, False)
  out = [
    ('TD', _shape(*u.shape, dtype=u.dtype)),
    ('borders', _shape(Bt, chunks, N, Dm)),
    ('last', _shape(*h.shape)),
  ]
  if not save:
    del out[1]
  return pl.pallas_call(
    functools.partial(_forward_kernel, size=(T, Dm), interpret=interpret),
    grid=(Bt, chunks, blocks),
    in_specs=[s[k] for k in ('keep', 'TD', 'TD', 'ND', 'NT', 'NT', 'D', 'first')],
    out_specs=[s[k] for k, _ in out],
    out_shape=[x for _, x in out],
    scratch_shapes=[
      tiles,
      tiles,
      _vmem(chunk, K),
      *(_vmem(chunk, N, _LANES),) * 2,
      _vmem(blocks, N, K),
    ],
    **_options(
      'selective_scan',
      interpret,
      8 * u.size * N,
      u.size * N,
      (u, dt, B, C, h, *(x for _, x in out)),
    ),
  )(keep, u, dt, A, B, C, D, h)


def _backward(u, dt, A, B, C, D, keep, borders, dy, dhT, interpret: bool):
  """(du, ddt, dA, dB, dC, dD, dh), time from its end. dB and dC add up over the channels and dA and
  dD over time in VMEM; over the batch, whose programs may run on two cores, they are added here."""
  (Bt, T, Dm), N, (chunks, chunk) = u.shape, A.shape[0], (keep.shape[1], keep.shape[3] - 1)
  K = _channels(Dm, N, _BACKWARD)
  blocks, tiles = _cdiv(Dm, K), _vmem(K // _LANES, chunk, _LANES)
  s = _specs(N, chunk, K, chunks, blocks, True)
  out = [
    _shape(*u.shape, dtype=u.dtype),
    _shape(*dt.shape, dtype=dt.dtype),
    _shape(Bt, N, Dm),
    _shape(*B.shape),
    _shape(*C.shape),
    _shape(Bt, 1, Dm),
    _shape(*dhT.shape),
  ]
  du, ddt, dA, dB, dC, dD, dh = pl.pallas_call(
    functools.partial(_backward_kernel, size=(T, Dm), interpret=interpret),
    grid=(Bt, chunks, blocks),
    in_specs=[s[k] for k in ('keep', 'TD', 'TD', 'ND', 'NT', 'NT', 'D', 'borders', 'TD', 'first')],
    out_specs=[s[k] for k in ('TD', 'TD', 'last', 'NT', 'NT', 'last D', 'last')],
    out_shape=out,
    scratch_shapes=[
      *(tiles,) * 3,
      *(_vmem(chunk, K),) * 2,
      *(_vmem(chunk, N, _LANES),) * 4,
      *(_vmem(chunk, N, K),) * 2,
      *(_vmem(blocks, N, K),) * 2,
      _vmem(blocks, 1, K),
    ],
    **_options(
      'selective_scan_backward',
      interpret,
      24 * u.size * N,
      u.size * N,
      (u, dt, dy, B, C, dhT, borders, *out),
    ),
  )(keep, u, dt, A, B, C, D, borders, dy, dhT)
  return du, ddt, dA.sum(0), dB, dC, dD.sum(0), dh


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _scan(u_BTD, dt_BTD, A_ND, B_BNT, C_BNT, D_1D, h_BND, keep, interpret: bool):
  y, h = _forward(u_BTD, dt_BTD, A_ND, B_BNT, C_BNT, D_1D, h_BND, keep, interpret, save=False)
  return y, h


def _scan_forward(u, dt, A, B, C, D, h, keep, interpret):
  y, borders, h = _forward(u, dt, A, B, C, D, h, keep, interpret, save=True)
  return (y, h), (u, dt, A, B, C, D, keep, borders)


def _scan_backward(interpret, saved, cotangents):
  return *_backward(*saved, *cotangents, interpret), None


_scan.defvjp(_scan_forward, _scan_backward)


def selective_scan_pallas(
  u_BTD: Float[Array, 'B T D'],
  dt_BTD: Float[Array, 'B T D'],
  A_DN: Float[Array, 'D N'],
  B_BTN: Float[Array, 'B T N'],
  C_BTN: Float[Array, 'B T N'],
  D_D: Float[Array, ' D'],
  h_BDN: Float[Array, 'B D N'] | None,
  starts_BT: Bool[Array, 'B T'],
  interpret: bool = False,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D N']]:
  """h_t = exp(dt_t A) (0 where a document starts, else h_{t-1}) + dt_t u_t B_t;  y_t = C_t h_t + D
  u_t  (section 3.3, with the simplified Euler rule for B of the authors' code). The state is fp32,
  y has the dtype of u. `interpret` runs it on any device."""
  f32 = jnp.float32
  (Bt, T, D), N = u_BTD.shape, A_DN.shape[1]
  rows = -N % _ROWS
  chunk = _chunk(T, D, N + rows)
  chunks = _cdiv(T, chunk)

  def columns(x_BTN):
    x = jnp.pad(x_BTN.astype(f32), ((0, 0), (0, chunks * chunk - T), (0, rows))).reshape(
      Bt, chunks, chunk, N + rows
    )
    return jnp.pad(x.transpose(0, 1, 3, 2), ((0, 0), (0, 0), (0, 0), (0, _LANES - chunk)))

  keep = 1 - jnp.pad(starts_BT, ((0, 0), (0, chunks * chunk - T))).astype(f32).reshape(
    Bt, chunks, 1, chunk
  )
  keep = jnp.concatenate([keep, keep.min(-1, keepdims=True)], -1)
  h = jnp.zeros((Bt, D, N), f32) if h_BDN is None else h_BDN.astype(f32)
  h = jnp.pad(h.transpose(0, 2, 1), ((0, 0), (0, rows), (0, 0)))
  A = jnp.pad(A_DN.astype(f32).T, ((0, rows), (0, 0)))
  y, h = _scan(
    u_BTD, dt_BTD, A, columns(B_BTN), columns(C_BTN), D_D.astype(f32)[None], h, keep, interpret
  )
  return y, h[:, :N].transpose(0, 2, 1)
