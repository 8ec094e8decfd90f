"""One chunk of a generalized delta rule inside the TPU kernels of `kernels/wkv7.py`: the WY form of
`ops/wkv7.py`, whose notation this is, and its gradients.

The heads of a group lie side by side along lanes, in tokens [C, X] as in pairs of tokens [C, heads
C], where row t has the columns s of each head. A product of each head's own rows and columns is one
product of the group, of which one operand is stacked: head below head, with zeros in the lanes of
the others.

With Z the right side, U = (I - A^ab)^{-1} Z, the gradients are

  dU = (A^rb)^T dY + B_out dS'^T,   dZ = (I - A^ab)^{-T} dU,   dA^ab = dZ U^T,   dA^ak = dZ V^T,
  dA^rb = dY U^T,   dA^rk = dY V^T,   dS = dS' diag(exp(L_C)) + dZ^T A_in + dY^T R_in

where A_in, R_in and B_out, K_out are a and r as they read the incoming state, and b and k as they
are left in the outgoing one. U, the inverse and S are saved by the forward pass. The gradient of
L_t is that of the exponents in which it stands, r dr - b db - k dk and the a da of the next
position; L_C, the end of the chunk, stands in every B_out and K_out and in the decay of S.

Dims: C positions of a chunk; X: the K of all heads of a group, Y: the V of all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.kernels.heads import HeadsPlan, sums


class Documents(NamedTuple):
  """Which positions of a chunk share a document; all are 1 where they do, else 0.

  Attributes:
    pairs: [2 C, 2 heads C], of the rows a_1 .. a_C, r_1 .. r_C and, for each head, the columns b_1
      .. b_C and k_1 .. k_C: a with the earlier positions, r also with its own.
    after: [2 C, 2 heads C], the same with rows and columns exchanged.
    reads: [C, 1], where the incoming state is read.
    kept: [C, 1], where something is left in the outgoing state.
    survives: [1, 1], where some of the incoming state is left in the outgoing one.
  """

  pairs: Any
  after: Any
  reads: Any
  kept: Any
  survives: Any


class Scaled(NamedTuple):
  """The inputs of a chunk, scaled by decays from or to its middle, and these decays: [C, X].

  Attributes:
    a, r: times `before` and `upto`.
    b, k: times `later`.
    read: from the start of the chunk to its middle, 0 for positions that do not read the state.
    left: from the middle to the end, 0 for positions that leave nothing in the state.
    total: [1, X], from the start to the end, 0 where nothing survives.
  """

  a: Any
  r: Any
  b: Any
  k: Any
  before: Any
  upto: Any
  later: Any
  read: Any
  left: Any
  total: Any


def below(x, y):
  return jnp.concatenate([x, y], axis=0)


def sum_matrices(C: int) -> tuple[np.ndarray, np.ndarray]:
  """[C, C]: sums from the middle of a chunk to each position, those before the middle negative; and
  the sums of each position and all later ones."""
  upto = np.tril(np.ones((C, C)))
  return upto - upto[C // 2 - 1], upto.T


@dataclasses.dataclass(frozen=True)
class ChunkPlan(HeadsPlan):
  """A chunk's arithmetic.

  Attributes:
    groups: of heads, per block.
  """

  groups: int

  def load(self, c, g, *refs):
    """The tokens of chunk c in fp32, of each array the lanes of group g."""
    return [ref[self.rows(c), self._lanes(g, ref)].astype(jnp.float32) for ref in refs]

  def store(self, c, g, ref, x):
    ref[self.rows(c), self._lanes(g, ref)] = x.astype(ref.dtype)

  def _lanes(self, g, ref):
    size = ref.shape[1] // self.groups
    return slice(g * size, (g + 1) * size)

  def documents(self, segment) -> Documents:
    """From `segment` [1, C]: how many documents started in the chunk up to and including each
    position."""
    C, PC = self.chunk, self.heads * self.chunk
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    # the transpose of the row
    column = jnp.sum(jnp.where(i == j, segment, 0.0), axis=1, keepdims=True)
    last = jnp.max(segment, axis=1, keepdims=True)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (C, PC), axis) for axis in (0, 1))
    lane = lane & (C - 1)
    together = column == jnp.concatenate([segment] * self.heads, axis=1)
    earlier, seen, later, now = (
      (together & m).astype(jnp.float32) for m in (row > lane, row >= lane, row < lane, row <= lane)
    )
    pairs = below(*(jnp.concatenate([m, m], axis=1) for m in (earlier, seen)))
    after = jnp.concatenate([below(m, m) for m in (later, now)], axis=1)
    reads, kept, survives = (
      x.astype(jnp.float32) for x in (column == 0.0, column == last, last == 0.0)
    )
    return Documents(pairs, after, reads, kept, survives)

  def scaled(self, documents: Documents, matrix, r, w, k, a, b) -> Scaled:
    L = sums(matrix, w)
    middle, end = w[:1] - L[:1], L[-1:]
    before, upto, later = jnp.exp(L - w), jnp.exp(L), jnp.exp(-L)
    return Scaled(
      a * before,
      r * upto,
      b * later,
      k * later,
      before,
      upto,
      later,
      documents.reads * jnp.exp(middle),
      documents.kept * jnp.exp(end),
      documents.survives * jnp.exp(middle + end),
    )

  def stacked(self, x, y, size: int):
    return below(self.stack(x, size), self.stack(y, size))

  def inverse(self, A):
    """(I - A)^{-1} of each head, for A [C, heads C] of pairs with earlier positions.

    By blocks of 2, 4, .. C positions: [[P, 0], [-A', Q]]^{-1} = [[P^{-1}, 0], [Q^{-1} A' P^{-1},
    Q^{-1}]], for all blocks of a size in two products. Factors are inverses themselves, bounded
    where the transitions contract. Only blocks on the diagonal are kept, one beside the other: row
    t has the columns of the t-th row of each block."""
    C, rows = self.chunk, min(16, self.chunk)
    blocks = {C: A}
    for size in (C >> i for i in range(1, C.bit_length())):
      if size >= rows:
        larger = blocks[2 * size]
        first = (self._lane(size) & size) == 0
        blocks[size] = jnp.where(first, larger[:size], larger[size:])
    inverse = (self._row(rows) == (self._lane(rows) & (rows - 1))).astype(jnp.float32)
    size = 1
    while size < C:
      if 2 * size > rows:
        rows = 2 * size
        own = ((self._row(rows) ^ self._lane(rows)) & size) == 0
        inverse = jnp.where(own, below(inverse, inverse), 0.0)
      # pairs in the two halves of a block of twice the size
      differ = self._row(rows) ^ (self._lane(rows) & (rows - 1))
      corner = jnp.where((differ >= size) & (differ < 2 * size), blocks[rows], 0.0)
      if size > 1:
        corner = self.dot(inverse, self._on_diagonal(corner), 'nn')
        yield
        corner = self.dot(corner, self._on_diagonal(inverse), 'nn')
        yield
      inverse, size = inverse + corner, 2 * size
    return inverse

  def _row(self, rows: int):
    return jax.lax.broadcasted_iota(jnp.int32, (rows, self.heads * self.chunk), 0)

  def _lane(self, rows: int):
    return jax.lax.broadcasted_iota(jnp.int32, (rows, self.heads * self.chunk), 1)

  def _on_diagonal(self, x):
    """[rows, heads C] -> [heads C, heads C]: blocks that lie one beside the other, on the
    diagonal."""
    rows, all_rows = x.shape[0], self.heads * self.chunk
    own = self._row(all_rows) // rows == self._lane(all_rows) // rows
    return jnp.where(own, jnp.concatenate([x] * (all_rows // rows), axis=0), 0.0)

  def outputs(self, documents: Documents, x: Scaled, v, S_YX):
    """(y, the state after the chunk, U, the inverse [C, heads C])."""
    C, PC, K, V = self.chunk, self.heads * self.chunk, self.K, self.V
    ar = below(x.a, x.r)
    pairs = self.dot(ar, self.stacked(x.b, x.k, K), 'nt') * documents.pairs
    yield
    inverse = yield from self.inverse(pairs[:C, :PC])
    known = self.dot(ar * below(x.read, x.read), S_YX, 'nt')
    known += self.dot(pairs[:, PC:], self.stack(v, V), 'nn')
    yield
    U = self.dot(inverse, self.stack(known[:C], V), 'nn')
    yield
    y = known[C:] + self.dot(pairs[C:, :PC], self.stack(U, V), 'nn')
    left = below(x.b * x.left, x.k * x.left)
    S_YX = S_YX * x.total + self.dot(below(U, v), left, 'tn') * self.diagonal()
    return y, S_YX, U, inverse

  def gradients(self, documents: Documents, upward, x: Scaled, inputs, saved, dy, dS_YX):
    """(dr, dw, dk, dv, da, db, the gradient of the state before) of a chunk, from those of its y
    and of the state after it.

    Args:
      inputs: r, k, v, a, b.
      saved: U, the inverse [C, heads C] and the state before.
    """
    (r, k, v, a, b), (U, inverse, S_YX) = inputs, saved
    C, PC, K, V = self.chunk, self.heads * self.chunk, self.K, self.V
    ar, bk, UV = below(x.a, x.r), below(x.b, x.k), below(U, v)
    read, left = below(x.read, x.read), below(x.left, x.left)
    r_pairs = self.dot(bk, self.stack(x.r, K), 'nt') * documents.after[:, PC:]
    ak = self.dot(x.k, self.stack(x.a, K), 'nt') * documents.after[:C, :PC]
    yield
    dUV = self.dot(r_pairs, self.stack(dy, V), 'nn') + self.dot(bk * left, dS_YX, 'nt')
    yield
    dZ = self.unstack(self.dot(inverse, dUV[:C], 'tn'), V)
    yield
    dv = dUV[C:] + self.dot(ak, self.stack(dZ, V), 'nn')
    dZy = below(dZ, dy)
    dpairs = self.dot(dZy, self.stacked(U, v, V), 'nt') * documents.pairs
    yield
    dar = self.dot(dZy, S_YX, 'nn') * read + self.dot(dpairs, self.stacked(x.b, x.k, K), 'nn')
    dleft = self.dot(UV, dS_YX, 'nn') * left
    yield
    dbk = self.dot(dpairs, ar, 'tn')
    yield
    dbk = dleft + below(self.unstack(dbk[:PC], K), self.unstack(dbk[PC:], K))

    da, dr, db, dk = (
      z * decay
      for z, decay in (
        (dar[:C], x.before),
        (dar[C:], x.upto),
        (dbk[:C], x.later),
        (dbk[C:], x.later),
      )
    )
    end = jnp.sum(dleft * bk, axis=0, keepdims=True)
    end += x.total * jnp.sum(S_YX * dS_YX, axis=0, keepdims=True)
    own = a * da
    dw = sums(upward, r * dr - b * db - k * dk + own) - own + end
    dS_YX = dS_YX * x.total + self.dot(dZy, ar * read, 'tn') * self.diagonal()
    return dr, dw, dk, dv, da, db, dS_YX
