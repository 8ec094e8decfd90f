"""The selective scan of Mamba (Gu & Dao 2023, section 3.3 and algorithm 2) as a Pallas kernel for TPUs, forward and backward."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

_LANES, _ROWS = 128, 8   # of a vector register in fp32
_LOG2E = math.log2(math.e)


def _cdiv(a: int, b: int) -> int:
  return -(-a // b)


def _up(a: int, b: int) -> int:
  return _cdiv(a, b) * b


def _channels(D: int, N: int, numbers: int) -> int:
  """Channels of a block: at most `numbers` of state, whole lanes, blocks of nearly equal width."""
  most = max(numbers // N // _LANES, 1) * _LANES
  return _up(_cdiv(D, _cdiv(D, most)), _LANES)


def _read(ref, lanes: int | None, rows: int | None = None):
  """A block in fp32 with zeros where it hangs over the array: `lanes` and `rows` are what is left of it, None where it never does."""
  x = ref[...].astype(jnp.float32)
  if lanes is not None:
    x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < lanes, x, 0.0)
  if rows is not None:
    x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < rows, x, 0.0)
  return x


def _fold(x):
  """[N, K] -> [8, K]: the sum over the groups of eight rows."""
  return x.reshape(-1, _ROWS, x.shape[-1]).sum(0)


def _row_sums(parts):
  """Eight arrays [8, K] -> [8, K]: row r is the sum over the rows of the r-th. Halving eight of them together takes 10 rotations
  of rows where one by one would take 24."""
  row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
  for m in (4, 2, 1):
    low = (row & m) == 0
    if m == 4:
      parts = [jnp.where(low, a, b) + pltpu.roll(jnp.where(low, b, a), 4, 0) for a, b in zip(parts[:4], parts[4:], strict=True)]
    else:
      parts = [jnp.where(low, a + pltpu.roll(a, _ROWS - m, 0), b + pltpu.roll(b, m, 0))
               for a, b in zip(parts[:m], parts[m:], strict=True)]
  return parts[0]


def _left(size: int, block: int, index):
  """How much of an axis is left at a block, None where blocks divide it."""
  return None if size % block == 0 else size - index * block


def _forward_kernel(keep, u, dt, A, B, C, D, h0, y, *rest, size):
  """One chunk of time of one block of channels; see `_forward`. Refs [T, K] with K channels, [N, T] and [N, K]."""
  *borders, hT, dt_s, x_s, y_s, h_s = rest
  t = pl.program_id(2)
  lanes, rows = _left(size[1], u.shape[1], pl.program_id(1)), _left(size[0], u.shape[0], t)

  @pl.when(t == 0)
  def _():
    h_s[...] = h0[...]

  for border in borders:
    border[...] = h_s[...]
  u_TK = _read(u, lanes, rows)
  dt_s[...] = _read(dt, lanes, rows)
  x_s[...] = dt_s[...] * u_TK
  A_NK = A[...] * _LOG2E

  def group(i, carry):
    h, B_NT, C_NT = carry
    at = pl.multiple_of(i * _ROWS, _ROWS)
    dt_RK, x_RK, parts = dt_s[pl.ds(at, _ROWS)], x_s[pl.ds(at, _ROWS)], []
    for r in range(_ROWS):
      decay = jnp.exp2(A_NK * dt_RK[r:r + 1]) * keep[0, at + r]
      h = decay * h + B_NT[:, r:r + 1] * x_RK[r:r + 1]
      parts.append(_fold(C_NT[:, r:r + 1] * h))
    y_s[pl.ds(at, _ROWS)] = _row_sums(parts)
    return h, pltpu.roll(B_NT, _LANES - _ROWS, 1), pltpu.roll(C_NT, _LANES - _ROWS, 1)

  h_s[...], _, _ = jax.lax.fori_loop(0, u.shape[0] // _ROWS, group, (h_s[...], B[...], C[...]))
  y[...] = (y_s[...] + D[...] * u_TK).astype(y.dtype)

  @pl.when(t == pl.num_programs(2) - 1)
  def _():
    hT[...] = h_s[...]


def _backward_kernel(keep, u, dt, A, B, C, D, border, dy, dhT, du, ddt, dA, dB, dC, dD, dh0,
                     dt_s, x_s, dy_s, s_s, q_s, h_s, decay_s, g_s, *, size):
  """One chunk, the last first: its states again from the border, then the adjoint state backwards; see `_backward`."""
  T = u.shape[0]
  chunk = pl.num_programs(2) - 1 - pl.program_id(2)
  lanes, rows = _left(size[1], u.shape[1], pl.program_id(0)), _left(size[0], T, chunk)
  first = (pl.program_id(1) == 0) & (pl.program_id(2) == 0)

  @pl.when(pl.program_id(2) == 0)
  def _():
    g_s[...] = _read(dhT, lanes)

  @pl.when(first)
  def _():
    dA[...] = jnp.zeros_like(dA)
    dD[...] = jnp.zeros_like(dD)

  u_TK = _read(u, lanes, rows)
  dt_s[...] = _read(dt, lanes, rows)
  dy_s[...] = _read(dy, lanes, rows)
  x_s[...] = dt_s[...] * u_TK
  A_NK = _read(A, lanes)
  log2_NK = A_NK * _LOG2E

  def again(i, carry):
    h, B_NT = carry
    at = pl.multiple_of(i * _ROWS, _ROWS)
    dt_RK, x_RK = dt_s[pl.ds(at, _ROWS)], x_s[pl.ds(at, _ROWS)]
    for r in range(_ROWS):
      decay = jnp.exp2(log2_NK * dt_RK[r:r + 1]) * keep[0, at + r]
      h_s[at + r], decay_s[at + r] = h, decay
      h = decay * h + B_NT[:, r:r + 1] * x_RK[r:r + 1]
    return h, pltpu.roll(B_NT, _LANES - _ROWS, 1)

  h, _ = jax.lax.fori_loop(0, T // _ROWS, again, (_read(border, lanes), B[...]))
  lane = jax.lax.broadcasted_iota(jnp.int32, B.shape, 1)

  def group(i, carry):
    g, h, dA_NK, B_NT, C_NT, dB_NT, dC_NT = carry
    at = pl.multiple_of(T - _ROWS - i * _ROWS, _ROWS)
    dt_RK, x_RK, dy_RK = (s[pl.ds(at, _ROWS)] for s in (dt_s, x_s, dy_s))
    dB_NT, dC_NT = pltpu.roll(dB_NT, _ROWS, 1), pltpu.roll(dC_NT, _ROWS, 1)
    s, q = [], []
    for r in reversed(range(_ROWS)):
      dy_K, x_K, dt_K = dy_RK[r:r + 1], x_RK[r:r + 1], dt_RK[r:r + 1]
      dC_NT = jnp.where(lane == r, jnp.sum(dy_K * h, 1, keepdims=True), dC_NT)
      g = g + C_NT[:, r:r + 1] * dy_K
      dB_NT = jnp.where(lane == r, jnp.sum(g * x_K, 1, keepdims=True), dB_NT)
      s.append(_fold(g * B_NT[:, r:r + 1]))
      h = h_s[at + r]
      g = g * decay_s[at + r]
      e = g * h
      q.append(_fold(e * A_NK))
      dA_NK = dA_NK + e * dt_K
    s_s[pl.ds(at, _ROWS)], q_s[pl.ds(at, _ROWS)] = _row_sums(s[::-1]), _row_sums(q[::-1])
    return g, h, dA_NK, pltpu.roll(B_NT, _ROWS, 1), pltpu.roll(C_NT, _ROWS, 1), dB_NT, dC_NT

  back = (_LANES - T + _ROWS) % _LANES   # brings the chunk's last group to the first lanes
  B_NT, C_NT = (pltpu.roll(r[...], back, 1) if back else r[...] for r in (B, C))
  zeros = jnp.zeros(B.shape, jnp.float32)
  g, _, dA_NK, _, _, dB[...], dC[...] = jax.lax.fori_loop(
    0, T // _ROWS, group, (g_s[...], h, jnp.zeros_like(A_NK), B_NT, C_NT, zeros, zeros))
  g_s[...] = g
  dA[...] += dA_NK
  dD[...] += jnp.sum(dy_s[...] * u_TK, 0, keepdims=True)
  du[...] = (D[...] * dy_s[...] + dt_s[...] * s_s[...]).astype(du.dtype)
  ddt[...] = (u_TK * s_s[...] + q_s[...]).astype(ddt.dtype)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    dh0[...] = g


def _chunk(T: int) -> int:
  """Positions of a chunk: the lanes of one register of B, fewer for a short sequence (16 rows are a whole tile of bfloat16)."""
  return min(_up(T, 16), _LANES)


def _specs(order, N: int, chunk: int, K: int, chunks: int, reverse: bool) -> dict[str, pl.BlockSpec]:
  """What one program of the grid sees; `order` brings its indices into (batch, channels, time)."""
  def spec(shape, index, **where):
    def at(*ids):
      b, d, t = order(*ids)
      return index(b, d, chunks - 1 - t if reverse else t)
    return pl.BlockSpec(shape, at, **where)

  return {
    'keep': spec((None, None, 1, chunk), lambda b, d, t: (b, t, 0, 0), memory_space=pltpu.SMEM),
    'TD': spec((None, chunk, K), lambda b, d, t: (b, t, d)),
    'NT': spec((None, N, _LANES), lambda b, d, t: (b, 0, t)),
    'dNT': spec((None, None, N, _LANES), lambda b, d, t: (d, b, 0, t)),
    'ND': spec((N, K), lambda b, d, t: (0, d)),
    'D': spec((1, K), lambda b, d, t: (0, d)),
    'h': spec((None, N, K), lambda b, d, t: (b, 0, d)),
    'borders': spec((None, None, N, K), lambda b, d, t: (b, t, 0, d)),
  }


def _shape(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _forward(u, dt, A, B, C, D, h, keep, interpret: bool, save: bool):
  """(y, [the states before each chunk: B chunks N D,] the last state). Grid (batch, channels, time), the state in VMEM."""
  (Bt, T, Dm), N, (chunks, chunk) = u.shape, A.shape[0], (keep.shape[1], keep.shape[3])
  K = _channels(Dm, N, 8192)
  s = _specs(lambda b, d, t: (b, d, t), N, chunk, K, chunks, False)
  out = [(s['TD'], _shape(*u.shape, dtype=u.dtype))]
  out += [(s['borders'], _shape(Bt, chunks, N, Dm))] if save else []
  out += [(s['h'], _shape(*h.shape))]
  cost = pl.CostEstimate(
    flops=8 * u.size * N, transcendentals=u.size * N,
    bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (u, dt, B, C, h, *(x for _, x in out))))
  return pl.pallas_call(
    functools.partial(_forward_kernel, size=(T, Dm)),
    grid=(Bt, _cdiv(Dm, K), chunks),
    in_specs=[s[k] for k in ('keep', 'TD', 'TD', 'ND', 'NT', 'NT', 'D', 'h')],
    out_specs=[x for x, _ in out],
    out_shape=[x for _, x in out],
    scratch_shapes=[*(pltpu.VMEM((chunk, K), jnp.float32),) * 3, pltpu.VMEM((N, K), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    cost_estimate=cost, interpret=interpret, name='selective_scan',
  )(keep, u, dt, A, B, C, D, h)


def _backward(u, dt, A, B, C, D, keep, borders, dy, dhT, interpret: bool):
  """(du, ddt, dA, dB, dC, dD, dh). Grid (channels, batch, time), time from its end: dA and dD of a block of channels add up in
  VMEM over batch and time; dB and dC come one a block of channels and are added here."""
  (Bt, T, Dm), N, (chunks, chunk) = u.shape, A.shape[0], (keep.shape[1], keep.shape[3])
  K = _channels(Dm, N, 4096)
  blocks = _cdiv(Dm, K)
  s = _specs(lambda d, b, t: (b, d, t), N, chunk, K, chunks, True)
  partial = _shape(blocks, *B.shape)
  out = [_shape(*u.shape, dtype=u.dtype), _shape(*dt.shape, dtype=dt.dtype), _shape(*A.shape), partial, partial, _shape(*D.shape),
         _shape(*dhT.shape)]
  cost = pl.CostEstimate(
    flops=24 * u.size * N, transcendentals=u.size * N,
    bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (u, dt, dy, B, C, dhT, borders, *out)))
  rows, states = pltpu.VMEM((chunk, K), jnp.float32), pltpu.VMEM((chunk, N, K), jnp.float32)
  du, ddt, dA, dB, dC, dD, dh = pl.pallas_call(
    functools.partial(_backward_kernel, size=(T, Dm)),
    grid=(blocks, Bt, chunks),
    in_specs=[s[k] for k in ('keep', 'TD', 'TD', 'ND', 'NT', 'NT', 'D', 'borders', 'TD', 'h')],
    out_specs=[s[k] for k in ('TD', 'TD', 'ND', 'dNT', 'dNT', 'D', 'h')],
    out_shape=out,
    scratch_shapes=[rows, rows, rows, rows, rows, states, states, pltpu.VMEM((N, K), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
    cost_estimate=cost, interpret=interpret, name='selective_scan_backward',
  )(keep, u, dt, A, B, C, D, borders, dy, dhT)
  return du, ddt, dA, dB.sum(0), dC.sum(0), dD, dh


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
  u_BTD: Float[Array, 'B T D'], dt_BTD: Float[Array, 'B T D'], A_DN: Float[Array, 'D N'], B_BTN: Float[Array, 'B T N'],
  C_BTN: Float[Array, 'B T N'], D_D: Float[Array, ' D'], h_BDN: Float[Array, 'B D N'] | None, starts_BT: Bool[Array, 'B T'],
  interpret: bool = False,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D N']]:
  """h_t = exp(dt_t A) (0 where a document starts, else h_{t-1}) + dt_t u_t B_t;  y_t = C_t h_t + D u_t  (section 3.3, with the
  simplified Euler rule for B of the authors' code). The state is fp32, y has the dtype of u. `interpret` runs it on any device."""
  f32 = jnp.float32
  (Bt, T, D), N = u_BTD.shape, A_DN.shape[1]
  chunk, rows = _chunk(T), _up(N, _ROWS) - N
  chunks = _cdiv(T, chunk)

  def columns(x_BTN):
    return jnp.pad(x_BTN.astype(f32), ((0, 0), (0, chunks * _LANES - T), (0, rows))).transpose(0, 2, 1)

  keep = 1 - jnp.pad(starts_BT, ((0, 0), (0, chunks * chunk - T))).astype(f32).reshape(Bt, chunks, 1, chunk)
  h = jnp.zeros((Bt, N + rows, D), f32) if h_BDN is None else jnp.pad(h_BDN.astype(f32).transpose(0, 2, 1), ((0, 0), (0, rows), (0, 0)))
  A = jnp.pad(A_DN.astype(f32).T, ((0, rows), (0, 0)))
  y, h = _scan(u_BTD, dt_BTD, A, columns(B_BTN), columns(C_BTN), D_D.astype(f32)[None], h, keep, interpret)
  return y, h[:, :N].transpose(0, 2, 1)
