"""What the delta rules share: chunks of a recurrence whose transitions are a diagonal matrix plus
one of rank one, in the WY representation (Bischof and Van Loan 1987; Yang et al. 2024, section 3.2,
for the delta rule).

Such a recurrence reads a value u_t of its state S, `[V, K]`, before it writes one. In a chunk of C
positions that starts from S, all of it is linear in S and in U, whose rows are the u_t:

  U  = reads S^T + lower U + own          lower is strictly lower triangular, so that
  U  = (I - lower)^{-1} (reads S^T + own)
  y  = query S^T + weights U
  S' = S diag(decay) + U^T out

The triangular system is solved once for all chunks, as it does not depend on S; everything is
matrix products, and only the states at the borders of chunks are sequential. How the coefficients
come from keys and decays is the family's: `ops/wkv7.py`, `ops/delta_rule.py`.

Dims: B batch, T time, H heads, K key channels, V value channels, C positions of a chunk, N chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import to_chunks
from jaxformer.ops.documents import count_starts

# positions whose intermediate values are in memory together; a gradient keeps the states between
# spans
SPAN = 256
EXACT = jax.lax.Precision.HIGHEST
TOKEN, STATE = ('batch', 'time', 'heads', None), ('batch', 'heads', None, None)


def scan_spans(
  body: Callable[..., tuple[Array, Array]],
  S_BHVK: Float[Array, 'B H V K'],
  inputs: tuple[Array, ...],
  chunk: int,
  span: int = SPAN,
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H V K']]:
  """y and the last state, for `body(state, inputs of a span `[B, H, N, C, ...]`) -> (state after
  it, y `[B, H, N, C, V]`)`.

  A gradient keeps the inputs and the state at every `span` positions, and recomputes the rest. What
  is missing of the last span is zeros, which must neither decay nor add to the state. The starts of
  documents, `[B, T]`, become `[B, 1, N, C]`."""
  B, T = inputs[0].shape[:2]
  N = min(max(span // chunk, 1), -(-T // chunk))  # chunks per span

  def by_span(x):
    x = to_chunks(x, N * chunk)
    x = x.reshape(*x.shape[:2], N, chunk, *x.shape[3:])
    # [spans, B, H, N, C, ...]; one head for starts
    return jnp.moveaxis(x, 4, 2) if x.ndim > 4 else x[:, :, None]

  spans = tuple(by_span(x) for x in inputs)
  body = jax.checkpoint(body, prevent_cse=False)
  if len(spans[0]) == 1:
    S_BHVK, y = body(S_BHVK, tuple(x[0] for x in spans))
    y = y[None]
  else:
    S_BHVK, y = jax.lax.scan(body, S_BHVK, spans)
  y = jnp.moveaxis(jnp.moveaxis(y, 0, 2), 1, 4)  # [B, spans, N, C, H, V]
  return y.reshape(B, -1, *y.shape[4:])[:, :T], S_BHVK


@dataclasses.dataclass(frozen=True)
class Masks:
  """Which positions of a chunk see each other, within documents. Shapes `[B, 1, N, C, ...]`.

  Attributes:
    earlier: whether position s is before t and in its document.
    seen: the same, or s = t.
    reads: where the state before the chunk is that of the position's document.
    kept: positions of the document in which the chunk ends.
  """

  earlier: Bool[Array, 'B _ N C C']
  seen: Bool[Array, 'B _ N C C']
  reads: Bool[Array, 'B _ N C _']
  kept: Bool[Array, 'B _ N C _']


def masks(starts: Bool[Array, 'B _ N C']) -> Masks:
  """Return the masks of chunks in which documents start."""
  document = count_starts(starts, axis=-1)  # 0 for the document in which the chunk starts
  together = document[..., :, None] == document[..., None, :]
  index = jnp.arange(starts.shape[-1])
  return Masks(
    together & (index[:, None] > index[None, :])[None, None, None],
    together & (index[:, None] >= index[None, :])[None, None, None],
    (document == 0)[..., None],
    (document == document[..., -1:])[..., None],
  )


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """Those of chunks, as above."""

  lower: Float[Array, 'B H N C C']
  reads: Float[Array, 'B H N C K']
  own: Float[Array, 'B H N C V']
  query: Float[Array, 'B H N C K']
  weights: Float[Array, 'B H N C C']
  out: Float[Array, 'B H N C K']
  decay: Float[Array, 'B H N _ _']


@dataclasses.dataclass(frozen=True)
class Given:
  """Values that are written whatever the state holds: y += weights v, S' += v^T out."""

  v: Float[Array, 'B H N C V']
  weights: Float[Array, 'B H N C C']
  out: Float[Array, 'B H N C K']


def by_transitions(
  S_BHVK: Array, c: Coefficients, given: Given, dot: Callable[..., Array]
) -> tuple[Array, Array]:
  """The state after some chunks, and their outputs. Each chunk takes S to S M + s, so that one
  product with a `[K, K]` matrix per chunk is sequential: for K of at most about 2 C."""
  inverse = unit_lower_inverse(c.lower)
  W = dot('...ts,...sK->...tK', inverse, c.reads)  # U = W S^T + G
  G = dot('...ts,...sV->...tV', inverse, c.own)
  turned = dot('...sI,...sK->...IK', W, c.out)  # S' = S (diag(decay) + turned) + add
  written = jnp.concatenate([G, given.v], axis=-2)
  add = dot('...sV,...sK->...VK', written, jnp.concatenate([c.out, given.out], axis=-2))

  def border(S_BHVK, now):
    decay, turned, add = now
    return S_BHVK * decay + dot('BHVI,BHIK->BHVK', S_BHVK, turned) + add, S_BHVK

  last, S_NBHVK = jax.lax.scan(
    border, S_BHVK, tuple(jnp.moveaxis(x, 2, 0) for x in (c.decay, turned, add))
  )
  read = c.query + dot('...ts,...sK->...tK', c.weights, W)
  y = dot('BHNtK,NBHVK->BHNtV', read, S_NBHVK)
  both = jnp.concatenate([c.weights, given.weights], axis=-1)
  return last, y + dot('...ts,...sV->...tV', both, written)


def by_values(S_BHVK: Array, c: Coefficients, dot: Callable[..., Array]) -> tuple[Array, Array]:
  """The state after some chunks, and their outputs. U is computed from state to state: two products
  with C rows per chunk are sequential, which are fewer FLOPs than `by_transitions` if K is above
  C."""
  inverse = unit_lower_inverse(c.lower)
  W = dot('...ts,...sK->...tK', inverse, c.reads)
  G = dot('...ts,...sV->...tV', inverse, c.own)

  def border(S_BHVK, now):
    decay, W, G, out = now
    U = G + dot('BHtK,BHVK->BHtV', W, S_BHVK)
    return S_BHVK * decay + dot('BHsV,BHsK->BHVK', U, out), (S_BHVK, U)

  last, (S_NBHVK, U_NBHCV) = jax.lax.scan(
    border, S_BHVK, tuple(jnp.moveaxis(x, 2, 0) for x in (c.decay, W, G, c.out))
  )
  y = dot('BHNtK,NBHVK->BHNtV', c.query, S_NBHVK)
  return last, y + dot('BHNts,NBHsV->BHNtV', c.weights, U_NBHCV)


def summary_of(run: Callable[..., tuple[Array, Array]], values: int) -> Callable[..., Any]:
  """Return the `summarize` of `sequence_parallel.over_time` for `run(state, *inputs)`.

  A part takes S to S M + s; both come from one run that starts from the identity below zeros, and
  adds zeros there. `values` is the index of `v_BTHV`, the values that are written, in the inputs;
  the first input is `[B, T, H, K]`."""

  def summarize(*inputs: Array):
    (B, T, H, K), v = inputs[0].shape, inputs[values]
    V = v.shape[-1]
    below = jnp.concatenate([jnp.zeros((V, K)), jnp.eye(K)])
    v = jnp.concatenate([v, jnp.zeros((B, T, H, K), v.dtype)], axis=-1)
    below = jnp.broadcast_to(below[None, None], (B, H, V + K, K))
    return run(below, *inputs[:values], v, *inputs[values + 1 :])[1], _join

  return summarize


def _join(S_BHVK, part):
  own, M_BHKK = jnp.split(part, (S_BHVK.shape[2],), axis=2)
  return jnp.einsum('BHVI,BHIK->BHVK', S_BHVK, M_BHKK, precision=EXACT) + own


@jax.custom_vjp
def unit_lower_inverse(A: Float[Array, '*B C C']) -> Float[Array, '*B C C']:
  """(I - A)^{-1} for strictly lower triangular A of a power of two of rows, by blocks.

  [[P, 0], [-A', Q]]^{-1} = [[P^{-1}, 0], [Q^{-1} A' P^{-1}, Q^{-1}]]. All factors are inverses
  themselves, which are bounded where the transitions contract; the powers of A that a Neumann
  series adds up are not, and cancel."""
  return _unit_lower_inverse(A)


def _unit_lower_inverse(A):
  C = A.shape[-1]
  if C == 1:
    return jnp.ones_like(A)
  h = C // 2
  P, Q = jnp.moveaxis(
    _unit_lower_inverse(jnp.stack([A[..., :h, :h], A[..., h:, h:]], axis=-3)), -3, 0
  )
  corner = jnp.matmul(jnp.matmul(Q, A[..., h:, :h], precision=EXACT), P, precision=EXACT)
  top = jnp.concatenate([P, jnp.zeros_like(P)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([corner, Q], axis=-1)], axis=-2)


def _inverse_forward(A):
  X = _unit_lower_inverse(A)
  return X, X


def _inverse_backward(X, dX):
  # dX = X dA X, so dA = X^T dX X^T below the diagonal.
  Xt = jnp.swapaxes(X, -1, -2)
  return (jnp.tril(jnp.matmul(jnp.matmul(Xt, dX, precision=EXACT), Xt, precision=EXACT), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
