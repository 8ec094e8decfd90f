"""One chunk of WKV-6 inside the TPU kernels of `kernels/wkv6.py`: decays, pair weights, the state,
and their gradients.

Token i sees key j < i of its document through the decays between them, exp(sum of w over j < m <
i). A pair belongs to the level s = 2^l that is the highest bit of i xor j: then i is in the right
and j in the left half of one block of 2s tokens, and the sum is that of w from the middle to i plus
that from j to the middle. Each level is one product of (r times the first decays) and (k times the
second), all of them at most 1; nothing is subtracted, so nothing overflows or cancels, however
strong the decays.

Dims: C tokens of a chunk; the heads of a block lie side by side along lanes (X: the K of all, Y:
  the V of all), and the state is transposed, S_YX, block-diagonal over the heads.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.ops.kernels.heads import HeadsPlan, sums

_UNDERFLOW = -128.0  # exp of it is 0 in fp32; sums of it stay finite where a log decay does not


def sum_matrix(C: int) -> np.ndarray:
  """[(levels + 1) C, C] of 0 and 1, to be multiplied with the w of a chunk: which of them each
  token sums for each purpose.

  For s = 2, 4, .. C/2: tokens in the right half of a block of 2s sum those before them in that
  half, tokens in the left half those after them (for s = 1 there are none). Then all before; then
  all after."""
  t, m = np.arange(C)[:, None], np.arange(C)[None, :]
  halves = [2**l for l in range(1, int(math.log2(C)))]
  rows = [(t // s == m // s) & np.where((t // s) % 2 == 1, m < t, m > t) for s in halves]
  return np.concatenate([*rows, m < t, m > t])


def _scaled(x, decay):
  return x if decay is None else x * decay


@dataclasses.dataclass(frozen=True)
class KernelPlan(HeadsPlan):
  """A chunk's arithmetic; the state is saved once a block."""

  def levels(self):
    """[heads C, C]: the level of each pair i > j, else -1."""
    C = self.chunk
    shape = (self.heads * C, C)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    i = i & (C - 1)
    differ = i ^ j
    level = sum((differ >= 2**l).astype(jnp.int32) for l in range(1, int(math.log2(C))))
    return jnp.where(i > j, level, -1)

  def decays(self, matrix, level, w, segment):
    """The decays of a chunk, and which token sees which, for `segment` [1, C]: how many documents
    started in the chunk up to and including each token.

    Returns:
      pairs: per level [C, X], None where all are 1.
      before: [C, X], from the start of the chunk to a token; 0 where its document started within
        it.
      after: [C, X], from a token to the end; 0 where its document ends before.
      total: [1, X], over the chunk; 0 where a document started.
      level: [heads C, C], of each pair in one document, else -1.
    """
    C, w = self.chunk, jnp.maximum(w, _UNDERFLOW)
    decays = jnp.exp(sums(matrix, w))
    *pairs, before, after = jnp.split(decays, decays.shape[0] // C)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    # the transpose of the row
    column = jnp.sum(jnp.where(i == j, segment, 0.0), axis=1, keepdims=True)
    last = jnp.max(segment, axis=1, keepdims=True)
    same = jnp.concatenate([(column == segment).astype(jnp.float32)] * self.heads, axis=0)
    return (
      [None, *pairs],
      before * (column == 0.0).astype(jnp.float32),
      after * (column == last).astype(jnp.float32),
      jnp.exp(jnp.sum(w, axis=0, keepdims=True)) * (last == 0.0).astype(jnp.float32),
      jnp.where(same > 0.0, level, -1),
    )

  def pair_weights(self, chunk, r, k):
    """A [heads C, C]: the weight of v_j in y_i, for j < i."""
    pairs, _, _, _, level = chunk
    A = jnp.zeros(level.shape, jnp.float32)
    for l, decay in enumerate(pairs):
      products = self.dot(self.stack(_scaled(r, decay), self.K), _scaled(k, decay), 'nt')
      A = jnp.where(level == l, products, A)
    return A

  def load(self, c, *refs):
    return tuple(ref[self.rows(c), :].astype(jnp.float32) for ref in refs)

  def store(self, c, ref, x):
    ref[self.rows(c), :] = x.astype(ref.dtype)

  def next_state(self, chunk, k, v, S_YX):
    _, _, after, total, _ = chunk
    return S_YX * total + self.dot(v, k * after, 'tn') * self.diagonal()

  def _pair_gradients(self, chunk, r, k, v, dy):
    """From y_i through the tokens j < i of its chunk: dr, dk, dv, and for each level but the first
    the gradient of its sums of w."""
    (pairs, _, _, _, level), dys = chunk, self.stack(dy, self.V)
    dA, A = self.dot(dys, v, 'nt'), jnp.zeros(level.shape, jnp.float32)
    dr, dk, dsums = jnp.zeros_like(r), jnp.zeros_like(k), []
    for l, decay in enumerate(pairs):
      rl, kl, here = self.stack(_scaled(r, decay), self.K), _scaled(k, decay), level == l
      A = jnp.where(here, self.dot(rl, kl, 'nt'), A)
      dAl = jnp.where(here, dA, 0.0)
      drl, dkl = (
        _scaled(self.unstack(self.dot(dAl, kl, 'nn'), self.K), decay),
        _scaled(self.dot(dAl, rl, 'tn'), decay),
      )
      dr, dk = dr + drl, dk + dkl
      if decay is not None:
        dsums.append(r * drl + k * dkl)
    return dr, dk, self.dot(A, dys, 'tn'), dsums

  def chunk_gradients(self, chunk, transposed, u, r, k, v, S_YX, dy, dS_YX):
    """(dr, dk, dv, dw, du, the gradient of the state before) of a chunk, from those of its y and of
    the state after it."""
    (_, before, after, total, _), diagonal = chunk, self.diagonal()
    dr, dk, dv, dsums = self._pair_gradients(chunk, r, k, v, dy)
    own = self.dot(dy * v, diagonal, 'nn')
    du = jnp.sum(own * r * k, axis=0, keepdims=True)
    dr_before, dk_after = (self.dot(dy, S_YX, 'nn') * before, self.dot(v, dS_YX, 'nn') * after)
    dv += self.dot(r * u * k, diagonal, 'nt') * dy + self.dot(k * after, dS_YX, 'nt')
    dw = sums(transposed, jnp.concatenate([*dsums, r * dr_before, k * dk_after], axis=0))
    dw += total * jnp.sum(S_YX * dS_YX, axis=0, keepdims=True)
    dS = dS_YX * total + self.dot(dy, r * before, 'tn') * diagonal
    return dr + dr_before + own * u * k, dk + dk_after + own * u * r, dv, dw, du, dS
