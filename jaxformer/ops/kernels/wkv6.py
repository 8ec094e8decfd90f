"""WKV-6, the recurrence of RWKV-6 (Finch), as a TPU kernel with a state that stays in VMEM, forward
and backward.

The forward pass reads r, k, v and the decays once and writes y; for a gradient it also saves the
state once in `span` chunks. The backward pass walks the blocks in reverse: it computes a block's
states again and carries the gradient of the state. Blocks are cut out of [B, T, H K], as
projections write it, so nothing is transposed; tokens are padded to whole blocks, heads to whole
vectors of lanes (heads of 64 come in pairs).

What the TPU's compiler says of B8 T2048 H24 K64 in bf16 (inputs 246 MiB), temporaries on a v5e:
forward 0 MiB; with all gradients 25 MiB, the saved states 4 B H K V T / 256 bytes, where the
portable form takes 2553. Speed on a TPU was not measured.

Dims: B batch, T time, H heads, K key, V value dim of a head; C tokens a chunk. Inside the kernels
  the heads of a block lie side by
side along lanes (X: the K of all, Y: the V of all), and the state is transposed, S_YX,
block-diagonal over the heads."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from jaxformer import sharding

_LANES = 128
_UNDERFLOW = -128.0  # exp of it is 0 in fp32; sums of it stay finite where a log decay does not


class _Plan(NamedTuple):
  """What is static about a call."""

  heads: int  # of a block
  K: int
  V: int
  chunk: int  # tokens whose pairs become products of matrices
  span: int  # chunks of a block; the state is saved once a block
  T: int | None  # tokens before padding, where all have the same decay; None where each has its own
  exact: bool  # products in fp32, not with operands rounded to bf16
  interpret: bool

  def dot(self, a: jax.Array, b: jax.Array, form: str) -> jax.Array:
    """a b ('nn'), a b^T ('nt') or a^T b ('tn'), summed in fp32."""
    dims = ((0 if form[0] == 't' else 1,), (1 if form[1] == 't' else 0,))
    precision = jax.lax.Precision.HIGHEST if self.exact else jax.lax.Precision.DEFAULT
    if not self.exact:
      a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(
      a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

  def stack(self, x: jax.Array, size: int) -> jax.Array:
    """[C, lanes] -> [heads C, lanes]: under each other, the lanes of one head (of `size`) and
    zeros."""
    head = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // size
    return jnp.concatenate([jnp.where(head == h, x, 0.0) for h in range(self.heads)], axis=0)

  def unstack(self, x: jax.Array, size: int) -> jax.Array:
    """[heads C, lanes] -> [C, lanes]: of each head's rows its own lanes."""
    C = x.shape[0] // self.heads
    head = jax.lax.broadcasted_iota(jnp.int32, (C, x.shape[1]), 1) // size
    return sum(
      (jnp.where(head == h, x[h * C : (h + 1) * C], 0.0) for h in range(self.heads)),
      jnp.zeros(head.shape, x.dtype),
    )

  def diagonal(self) -> jax.Array:
    """[Y, X]: 1 where row and lane are of one head."""
    shape = (self.heads * self.V, self.heads * self.K)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row // self.V == lane // self.K).astype(jnp.float32)

  def expand(self, S_VX: jax.Array) -> jax.Array:
    return jnp.concatenate([S_VX] * self.heads, axis=0) * self.diagonal()

  def compact(self, S_YX: jax.Array) -> jax.Array:
    return sum((S_YX[h * self.V : (h + 1) * self.V] for h in range(1, self.heads)), S_YX[: self.V])


# ---- one chunk ---------------------------------------------------------------------------------
#
# Token i sees key j < i of its document through the decays between them, exp(sum of w over j < m <
# i). A pair belongs to the level s = 2^l that is the highest bit of i xor j: then i is in the right
# and j in the left half of one block of 2s tokens, and the sum is that of w from the middle to i
# plus that from j to the middle. Each level is one product of (r times the first decays) and (k
# times the second), all of them at most 1; nothing is subtracted, so nothing overflows or cancels,
# however strong the decays.


def _sum_matrix(C: int) -> np.ndarray:
  """[(levels + 1) C, C] of 0 and 1, to be multiplied by the w of a chunk: which of them each token
  sums for each use.

  For s = 2, 4, .. C/2: tokens in the right half of a block of 2s sum those before them in that
  half, tokens in the left half those after them (for s = 1 there are none). Then all before; then
  all after."""
  t, m = np.arange(C)[:, None], np.arange(C)[None, :]
  halves = [2**l for l in range(1, int(math.log2(C)))]
  rows = [(t // s == m // s) & np.where((t // s) % 2 == 1, m < t, m > t) for s in halves]
  return np.concatenate([*rows, m < t, m > t])


def _thrice(matrix: np.ndarray) -> jax.Array:
  return jnp.asarray(np.concatenate([matrix] * 3, axis=1), jnp.bfloat16)


def _sums(thrice: jax.Array, x: jax.Array) -> jax.Array:
  """matrix x to fp32, by one product in bf16, half or less of the work of one in fp32: a matrix of
  0 and 1, three times side by side, times the highest, the middle and the lowest 8 bits of x's
  significands under each other."""
  parts = []
  for _ in range(3):
    high = jax.lax.bitcast_convert_type(
      jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32
    )
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return jnp.dot(thrice, jnp.concatenate(parts, axis=0), preferred_element_type=jnp.float32)


def _levels(plan: _Plan) -> jax.Array:
  """[heads C, C]: the level of each pair i > j, else -1."""
  C = plan.chunk
  shape = (plan.heads * C, C)
  i, j = (
    jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (C - 1),
    jax.lax.broadcasted_iota(jnp.int32, shape, 1),
  )
  differ = i ^ j
  level = (
    sum((differ >= 2**l).astype(jnp.int32) for l in range(1, int(math.log2(C))))
    if C > 2
    else jnp.zeros(shape, jnp.int32)
  )
  return jnp.where(i > j, level, -1)


class _Chunk(NamedTuple):
  """The decays of a chunk, and who sees whom."""

  pairs: list[jax.Array | None]  # a level: [C, X], None where all are 1
  # [C, X]: from the start of the chunk to a token; 0 where its document began within the chunk
  before: jax.Array
  # [C, X]: from a token to the end; 0 where its document does not reach it
  after: jax.Array
  whole: jax.Array  # [1, X]: over the chunk; 0 where a document began
  level: jax.Array  # [heads C, C]: of each pair in one document, else -1


def _decays(
  plan: _Plan, matrix: jax.Array, level: jax.Array, w: jax.Array, segment: jax.Array
) -> _Chunk:
  """`segment` [1, C]: how many documents began in the chunk up to and including each token."""
  C = plan.chunk
  decays = jnp.exp(_sums(matrix, w))
  *pairs, before, after = (decays[at : at + C] for at in range(0, decays.shape[0], C))
  i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
  # the transpose of the row
  column = jnp.sum(jnp.where(i == j, segment, 0.0), axis=1, keepdims=True)
  last = jnp.max(segment, axis=1, keepdims=True)
  same = jnp.concatenate([(column == segment).astype(jnp.float32)] * plan.heads, axis=0)
  return _Chunk(
    [None, *pairs],
    before * (column == 0.0).astype(jnp.float32),
    after * (column == last).astype(jnp.float32),
    jnp.exp(jnp.sum(w, axis=0, keepdims=True)) * (last == 0.0).astype(jnp.float32),
    jnp.where(same > 0.0, level, -1),
  )


def _scaled(x: jax.Array, decay: jax.Array | None) -> jax.Array:
  return x if decay is None else x * decay


def _pair_weights(plan: _Plan, chunk: _Chunk, r: jax.Array, k: jax.Array) -> jax.Array:
  """A [heads C, C]: how much of v_j is in y_i, for j < i."""
  A = jnp.zeros(chunk.level.shape, jnp.float32)
  for l, decay in enumerate(chunk.pairs):
    products = plan.dot(plan.stack(_scaled(r, decay), plan.K), _scaled(k, decay), 'nt')
    A = jnp.where(chunk.level == l, products, A)
  return A


def _load(plan: _Plan, c, *refs):
  at = pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk)
  return tuple(ref[at, :].astype(jnp.float32) for ref in refs)


def _time(plan: _Plan, block, c, shape: tuple[int, int]) -> jax.Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (block * plan.span + c) * plan.chunk


def _log_decays(plan: _Plan, block, c, ref) -> jax.Array:
  """[C, X] of chunk c of a block."""
  if plan.T is None:
    return jnp.maximum(*_load(plan, c, ref), _UNDERFLOW)
  return jnp.where(
    _time(plan, block, c, (plan.chunk, ref.shape[1])) < plan.T,
    jnp.maximum(ref[...], _UNDERFLOW),
    0.0,
  )


def _store(plan: _Plan, c, ref, x):
  ref[pl.ds(pl.multiple_of(c * plan.chunk, plan.chunk), plan.chunk), :] = x.astype(ref.dtype)


def _next_state(
  plan: _Plan, chunk: _Chunk, k: jax.Array, v: jax.Array, S_YX: jax.Array
) -> jax.Array:
  return S_YX * chunk.whole + plan.dot(v, k * chunk.after, 'tn') * plan.diagonal()


def _forward_kernel(
  plan: _Plan,
  matrix_ref,
  r_ref,
  k_ref,
  v_ref,
  w_ref,
  u_ref,
  segment_ref,
  first_ref,
  y_ref,
  last_ref,
  *rest,
):
  """One block of tokens and heads. `rest`: the state before the block, where it is to be saved, and
  the state, in scratch."""
  *saved, S_ref = rest
  n = pl.program_id(2)

  @pl.when(n == 0)
  def _():
    S_ref[...] = plan.expand(first_ref[...])

  for ref in saved:
    ref[...] = plan.compact(S_ref[...])
  matrix, u, level, diagonal = matrix_ref[...], u_ref[...], _levels(plan), plan.diagonal()

  def body(c, S_YX):
    r, k, v = _load(plan, c, r_ref, k_ref, v_ref)
    chunk = _decays(plan, matrix, level, _log_decays(plan, n, c, w_ref), segment_ref[c])
    y = plan.unstack(plan.dot(_pair_weights(plan, chunk, r, k), v, 'nn'), plan.V)
    y += plan.dot(r * chunk.before, S_YX, 'nt') + plan.dot(r * u * k, diagonal, 'nt') * v
    _store(plan, c, y_ref, y)
    return _next_state(plan, chunk, k, v, S_YX)

  S_ref[...] = jax.lax.fori_loop(0, plan.span, body, S_ref[...])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    last_ref[...] = plan.compact(S_ref[...])


def _pair_gradients(plan: _Plan, chunk: _Chunk, r, k, v, dy):
  """From y_i through the tokens j < i of its chunk: dr, dk, dv, and of each level but the first the
  gradient of its sums of w."""
  dys = plan.stack(dy, plan.V)
  dA, A = plan.dot(dys, v, 'nt'), jnp.zeros(chunk.level.shape, jnp.float32)
  dr, dk, dsums = jnp.zeros_like(r), jnp.zeros_like(k), []
  for l, decay in enumerate(chunk.pairs):
    rl, kl, here = plan.stack(_scaled(r, decay), plan.K), _scaled(k, decay), chunk.level == l
    A = jnp.where(here, plan.dot(rl, kl, 'nt'), A)
    dAl = jnp.where(here, dA, 0.0)
    drl, dkl = (
      _scaled(plan.unstack(plan.dot(dAl, kl, 'nn'), plan.K), decay),
      _scaled(plan.dot(dAl, rl, 'tn'), decay),
    )
    dr, dk = dr + drl, dk + dkl
    if decay is not None:
      dsums.append(r * drl + k * dkl)
  return dr, dk, plan.dot(A, dys, 'tn'), dsums


def _chunk_gradients(plan: _Plan, chunk: _Chunk, transposed, u, r, k, v, S_YX, dy, dS_YX):
  """(dr, dk, dv, dw, du, the gradient of the state before) of a chunk, from those of its y and of
  the state after it."""
  diagonal = plan.diagonal()
  dr, dk, dv, dsums = _pair_gradients(plan, chunk, r, k, v, dy)
  own = plan.dot(dy * v, diagonal, 'nn')
  du = jnp.sum(own * r * k, axis=0, keepdims=True)
  dr_before, dk_after = (
    plan.dot(dy, S_YX, 'nn') * chunk.before,
    plan.dot(v, dS_YX, 'nn') * chunk.after,
  )
  dv += plan.dot(r * u * k, diagonal, 'nt') * dy + plan.dot(k * chunk.after, dS_YX, 'nt')
  dw = _sums(transposed, jnp.concatenate([*dsums, r * dr_before, k * dk_after], axis=0))
  dw += chunk.whole * jnp.sum(S_YX * dS_YX, axis=0, keepdims=True)
  before = dS_YX * chunk.whole + plan.dot(dy, r * chunk.before, 'tn') * diagonal
  return dr + dr_before + own * u * k, dk + dk_after + own * u * r, dv, dw, du, before


def _backward_kernel(
  plan: _Plan,
  matrix_ref,
  transposed_ref,
  r_ref,
  k_ref,
  v_ref,
  w_ref,
  u_ref,
  segment_ref,
  saved_ref,
  dy_ref,
  dlast_ref,
  dr_ref,
  dk_ref,
  dv_ref,
  dw_ref,
  du_ref,
  dfirst_ref,
  dS_ref,
  states_ref,
):
  """One block, the last first: its states again, then its chunks backwards with dS, the gradient of
  the state after them."""
  n = pl.program_id(2)
  block = pl.num_programs(2) - 1 - n

  @pl.when(n == 0)
  def _():
    dS_ref[...] = plan.expand(dlast_ref[...])
    du_ref[...] = jnp.zeros_like(du_ref)
    if plan.T is not None:
      dw_ref[...] = jnp.zeros_like(dw_ref)

  matrix, level = matrix_ref[...], _levels(plan)

  def decays(c):
    return _decays(plan, matrix, level, _log_decays(plan, block, c, w_ref), segment_ref[c])

  def again(c, S_YX):
    states_ref[c] = S_YX
    return _next_state(plan, decays(c), *_load(plan, c, k_ref, v_ref), S_YX)

  states_ref[plan.span - 1] = jax.lax.fori_loop(
    0, plan.span - 1, again, plan.expand(saved_ref[...])
  )

  def body(step, dS):
    c = plan.span - 1 - step
    r, k, v, dy = _load(plan, c, r_ref, k_ref, v_ref, dy_ref)
    dr, dk, dv, dw, du, dS = _chunk_gradients(
      plan, decays(c), transposed_ref[...], u_ref[...], r, k, v, states_ref[c], dy, dS
    )
    for ref, x in ((dr_ref, dr), (dk_ref, dk), (dv_ref, dv)):
      _store(plan, c, ref, x)
    du_ref[...] += du
    if plan.T is None:
      _store(plan, c, dw_ref, dw)
    else:
      dw_ref[...] += jnp.sum(
        jnp.where(_time(plan, block, c, dw.shape) < plan.T, dw, 0.0), axis=0, keepdims=True
      )
    return dS

  dS_ref[...] = jax.lax.fori_loop(0, plan.span, body, dS_ref[...])

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    dfirst_ref[...] = plan.compact(dS_ref[...])


# ---- calls -------------------------------------------------------------------------------------


def _specs(plan: _Plan, backwards: int = 0) -> dict[str, pl.BlockSpec]:
  """The block of each kind of argument at step (b, h, n) of the grid; of `backwards` blocks of
  tokens, the last comes first."""
  tokens, X, Y = plan.chunk * plan.span, plan.heads * plan.K, plan.heads * plan.V

  def block(n):
    return backwards - 1 - n if backwards else n

  specs = {
    'X': pl.BlockSpec((None, tokens, X), lambda b, h, n: (b, block(n), h)),
    'Y': pl.BlockSpec((None, tokens, Y), lambda b, h, n: (b, block(n), h)),
    'w': pl.BlockSpec((None, 1, X), lambda b, h, n: (0, 0, h)),
    'dw': pl.BlockSpec((None, 1, X), lambda b, h, n: (b, 0, h)),
    'u': pl.BlockSpec((None, 1, X), lambda b, h, n: (h, 0, 0)),
    'du': pl.BlockSpec((None, None, 1, X), lambda b, h, n: (b, h, 0, 0)),
    'segment': pl.BlockSpec((None, plan.span, 1, plan.chunk), lambda b, h, n: (b, block(n), 0, 0)),
    'state': pl.BlockSpec((None, None, plan.V, X), lambda b, h, n: (b, h, 0, 0)),
    'saved': pl.BlockSpec((None, None, None, plan.V, X), lambda b, h, n: (b, h, block(n), 0, 0)),
  }
  return specs | ({'w': specs['X'], 'dw': specs['X']} if plan.T is None else {})


def _constant(matrix: np.ndarray) -> pl.BlockSpec:
  return pl.BlockSpec((matrix.shape[0], 3 * matrix.shape[1]), lambda b, h, n: (0, 0))


def _call(
  plan: _Plan,
  kernel,
  name: str,
  grid: tuple[int, int, int],
  in_specs,
  out,
  scratch: int,
  pair_products: int,
):
  """`pl.pallas_call` with what both directions share. `out`: (spec, shape, dtype) of each
  result."""
  X, Y, C = plan.heads * plan.K, plan.heads * plan.V, plan.chunk
  tokens = math.prod(grid) * plan.span * C
  levels = int(math.log2(C))
  products = (
    plan.heads * C * (levels * X + Y) * pair_products
    + (levels + 1) * C * X
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
      transcendentals=tokens * (levels + 1) * X,
      bytes_accessed=tokens * pair_products * (4 * X + 6 * (X + Y)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
  )


def _forward(plan: _Plan, save: bool, r_BTX, k_BTX, v_BTY, w_BTX, u_X, first, segment):
  B, T = r_BTX.shape[:2]
  blocks = first.shape[1]
  grid = (B, blocks, T // (plan.chunk * plan.span))
  s, matrix = _specs(plan), _sum_matrix(plan.chunk)
  out = [(s['Y'], v_BTY.shape, v_BTY.dtype), (s['state'], first.shape, jnp.float32)]
  if save:
    out.append((s['saved'], (*first.shape[:2], grid[2], *first.shape[2:]), jnp.float32))
  arguments = [s[kind] for kind in ('X', 'X', 'Y', 'w', 'u', 'segment', 'state')]
  call = _call(
    plan, _forward_kernel, 'wkv6_forward', grid, [_constant(matrix), *arguments], out, 1, 1
  )
  return call(_thrice(matrix), r_BTX, k_BTX, v_BTY, w_BTX, u_X, segment, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv6(plan: _Plan, *arguments):
  return tuple(_forward(plan, False, *arguments))


def _wkv6_fwd(plan: _Plan, *arguments):
  y, last, saved = _forward(plan, True, *arguments)
  return (y, last), (arguments, saved)


def _wkv6_bwd(plan: _Plan, residuals, gradients):
  (r, k, v, w, u, first, segment), saved = residuals
  dy, dlast = gradients
  grid = (r.shape[0], first.shape[1], saved.shape[2])
  s, matrix = _specs(plan, grid[2]), _sum_matrix(plan.chunk)
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
    _thrice(matrix), _thrice(matrix.T), r, k, v, w, u, segment, saved, dy, dlast
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
  """The lanes of one head: sizes that share or fill whole vectors of lanes."""
  return 2 ** max(3, math.ceil(math.log2(size))) if size < _LANES else -(-size // _LANES) * _LANES


def _pad(x: jax.Array, *sizes: int) -> jax.Array:
  return jnp.pad(x, [(0, size - old) for old, size in zip(x.shape, sizes, strict=True)])


def wkv6_pallas(
  r_BTHK: Float[Array, 'B T H K'],
  k_BTHK: Float[Array, 'B T H K'],
  v_BTHV: Float[Array, 'B T H V'],
  log_decay_BTHK: Float[Array, '#B #T H K'],
  u_HK: Float[Array, 'H K'],
  state_BHKV: Float[Array, 'B H K V'] | None,
  starts_BT: Bool[Array, 'B T'],
  interpret: bool = False,
  *,
  chunk: int = 64,
  span: int = 4,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H K V']]:
  """y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,
  where S_{t-1} = 0 if `starts_BT` (Peng et al. 2024, arXiv 2404.05892), differentiable in all but
  `starts_BT`. y has v's dtype, the state after the last token is fp32.

  Decays and states are fp32. Products of matrices are fp32 unless r, k and v are bf16; then their
  operands are rounded to bf16, as r, k and v were, and their sums stay fp32.

  Args:
    log_decay_BTHK: at most 0 and as low as -inf; of size 1 in B and T where all are the same
      (RWKV-5).
    state_BHKV: the state before the first token; None: zeros.
    interpret: runs anywhere, slowly, for tests.
    chunk: tokens whose pairs become products of matrices, a power of 2 from 8; fewer where T is
      less.
    span: chunks between two saved states.
  """
  (B, T, H, K), V, dtype = r_BTHK.shape, v_BTHV.shape[-1], jnp.result_type(r_BTHK, k_BTHK, v_BTHV)
  chunk = min(chunk, max(16, 2 ** math.ceil(math.log2(T))))
  X, Y = _lanes(K), _lanes(V)
  heads = min(H, max(1, _LANES // min(X, Y)))
  static = log_decay_BTHK.shape[:2] == (1, 1)
  plan = _Plan(
    heads,
    X,
    Y,
    chunk,
    min(span, -(-T // chunk)),
    T if static else None,
    dtype != jnp.bfloat16,
    interpret,
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
  if state_BHKV is None:
    first = jnp.zeros((B, blocks, Y, heads * X), jnp.float32)
  else:
    first = _pad(state_BHKV.astype(jnp.float32), B, all_H, X, Y).reshape(B, blocks, heads, X, Y)
    first = first.transpose(0, 1, 4, 2, 3).reshape(B, blocks, Y, heads * X)
  segment = jnp.cumsum(
    _pad(starts_BT.astype(jnp.float32), B, all_T).reshape(B, -1, 1, chunk), axis=-1
  )
  y, last = _wkv6(plan, flat(r_BTHK, X), flat(k_BTHK, X), flat(v_BTHV, Y), w, u, first, segment)
  last = last.reshape(B, blocks, Y, heads, X).transpose(0, 1, 3, 4, 2).reshape(B, all_H, X, Y)
  return y.reshape(B, all_T, all_H, Y)[:, :T, :H, :V].astype(v_BTHV.dtype), last[:, :H, :K, :V]


def wkv6_tpu(
  r_BTHK: Float[Array, 'B T H K'],
  k_BTHK: Float[Array, 'B T H K'],
  v_BTHV: Float[Array, 'B T H V'],
  log_decay_BTHK: Float[Array, '#B #T H K'],
  u_HK: Float[Array, 'H K'],
  state_BHKV: Float[Array, 'B H K V'] | None,
  starts_BT: Bool[Array, 'B T'],
  interpret: bool = False,
  *,
  chunk: int = 64,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H K V']]:
  """`wkv6_pallas` on the active mesh: each shard has its sequences and its heads, and the whole of
  time."""
  token, state = ('batch', None, 'heads', None), ('batch', 'heads', None, None)
  mapped = sharding.per_shard(
    functools.partial(wkv6_pallas, interpret=interpret, chunk=chunk),
    (token, token, token, token, ('heads', None), state, ('batch', None)),
    token,
    state,
  )
  return mapped(r_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, u_HK, state_BHKV, starts_BT)
