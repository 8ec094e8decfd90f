"""The recurrence of RWKV-4: a weighted mean of all values so far, in which the present one has a
weight of its own.

  y_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i} +
  e^{u + k_t})

(Peng et al. 2023, "RWKV", equation 16), w > 0 per channel. Numerator and denominator are kept as
aa e^pp and bb e^pp, so that no exponential overflows. Everything is fp32; y is returned in the
dtype of v.

The chunked implementations compute the exponents pp first. They are a choice of scale and do not
change the result, so no gradient flows through them, and what remains are two linear recurrences
whose coefficients are known for all positions of a chunk at once.

Dims: B batch, T time, C chunk, D channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import scan_chunks, scan_steps
from jaxformer.ops.documents import count_starts
from jaxformer.ops.implementation import Operation
from jaxformer.ops.sequence_parallel import local_length, over_time, reset_masks
from jaxformer.sharding import platform

CHUNK = 64
EMPTY = -1e38  # the exponent of a sum without terms
_SHORT = 4  # up to so many tokens the recurrence itself is the fastest implementation
_UNROLL = 8

_SUMS, _TOKEN, _CHANNEL = ('batch', 'heads'), ('batch', 'time', 'heads'), ('heads',)


class Wkv4State(NamedTuple):
  """The sums over all tokens so far, as the next token reads them: aa e^pp of the weighted values
  and bb e^pp of the weights. Fp32."""

  aa: Float[Array, 'B D']
  bb: Float[Array, 'B D']
  pp: Float[Array, 'B D']

  @classmethod
  def empty(cls, batch: int, width: int) -> Wkv4State:
    """Before the first token."""
    zeros = jnp.zeros((batch, width), jnp.float32)
    return cls(zeros, zeros, jnp.full((batch, width), EMPTY, jnp.float32))


def wkv4(
  k_BTD: Float[Array, 'B T D'],
  v_BTD: Float[Array, 'B T D'],
  w_D: Float[Array, ' D'],
  u_D: Float[Array, ' D'],
  state: Wkv4State | None,
  starts_BT: Bool[Array, 'B T'],
  *,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T D'], Wkv4State]:
  """y and the state after the last token.

  Args:
    w_D: exp(time_decay), by which the log weight of a token falls per step.
    u_D: added to the key of the present token.
    state: None before the first token.
    starts_BT: where a packed document starts: the state is empty before that token.
    chunk: tokens per chunk.
  """
  (B, T, D), dtype = v_BTD.shape, v_BTD.dtype
  state = Wkv4State.empty(B, D) if state is None else state
  run = functools.partial(WKV4[WKV4.choose(local_length(T))], chunk=chunk)

  def summarize(k, v, w, u, starts):
    survives_B, _ = reset_masks(starts)
    fall = jnp.where(survives_B[:, None], k.shape[1] * w[None], -EMPTY)
    own = run(Wkv4State.empty(k.shape[0], k.shape[2]), k, v, w, u, starts)[1]
    return (fall, tuple(own)), _join

  inputs = (x.astype(jnp.float32) for x in (k_BTD, v_BTD, w_D, u_D))
  sharded = over_time(
    run, _SUMS, (_TOKEN, _TOKEN, _CHANNEL, _CHANNEL, _TOKEN[:2]), _TOKEN, summarize
  )
  y, state = sharded(state, *inputs, starts_BT)
  return y.astype(dtype), state


def _join(state, part):
  """A part lowers the exponent of the state by T w and adds its own sums."""
  (aa, bb, pp), (fall, (own_aa, own_bb, own_pp)) = state, part
  before = jnp.maximum(pp - fall, EMPTY)
  pp = jnp.maximum(before, own_pp)
  old, new = jnp.exp(before - pp), jnp.exp(own_pp - pp)
  return Wkv4State(old * aa + new * own_aa, old * bb + new * own_bb, pp)


def wkv4_naive(state, k_BTD, v_BTD, w_D, u_D, starts_BT, chunk=CHUNK):
  """The recurrence, one token after another, in fp32."""

  def step(state, k_BD, v_BD):
    aa, bb, pp = state
    p = jnp.maximum(pp, u_D[None] + k_BD)
    old, new = jnp.exp(pp - p), jnp.exp(u_D[None] + k_BD - p)
    y_BD = (old * aa + new * v_BD) / (old * bb + new)
    p = jnp.maximum(pp - w_D[None], k_BD)
    old, new = jnp.exp(pp - w_D[None] - p), jnp.exp(k_BD - p)
    return Wkv4State(old * aa + new * v_BD, old * bb + new, p), y_BD

  empty = Wkv4State.empty(*state.pp.shape)
  return scan_steps(step, state, (k_BTD, v_BTD), starts_BT, empty)


# ---- chunks ------------------------------------------------------------------------------------


def _chunked(state, k, v, w, u, starts, chunk=CHUNK, tree=False):
  def body(state, k, v, starts):
    by_time = (jnp.swapaxes(x, 0, 1) for x in (k, v, starts))
    state, y = _chunk(state, *by_time, w, u, tree)
    return state, jnp.swapaxes(y, 0, 1)

  return scan_chunks(body, state, (k, v, starts), chunk)


def _chunk(state, k, v, starts, w, u, tree):
  """(state, y) after a chunk of tokens `[C, B, D]`."""
  w, u, begins = w[None, None], u[None, None], starts[..., None]
  # the exponents after each token
  after = lax.stop_gradient(_exponents(state.pp, k, w, begins, tree))
  before = jnp.where(begins, EMPTY, jnp.concatenate([state.pp[None], after[:-1]]))
  keeps, takes = jnp.exp(before - w - after), jnp.exp(k - after)
  # the sums after each token
  aa, bb = _linear(keeps, (takes * v, takes), (state.aa, state.bb), tree)
  aa_before, bb_before = (
    jnp.concatenate([s[None], x[:-1]]) for s, x in ((state.aa, aa), (state.bb, bb))
  )
  p = lax.stop_gradient(jnp.maximum(before, u + k))
  old, new = jnp.exp(before - p), jnp.exp(u + k - p)
  y = (old * aa_before + new * v) / (old * bb_before + new)
  # The outgoing state has the exponent that the recurrence defines, gradient included.
  pp = _last_exponent(state.pp, k, w, starts)
  scale = jnp.exp(after[-1] - pp)
  return Wkv4State(scale * aa[-1], scale * bb[-1], pp), y


def _recurrence(first, elements, apply, compose, tree):
  """x_t = apply(x_{t-1}, element_t) over the first axis; `compose` two elements into one."""
  if tree:
    return apply(jax.tree.map(lambda x: x[None], first), lax.associative_scan(compose, elements))

  def step(x, element):
    x = apply(x, element)
    return x, x

  return lax.scan(step, first, elements, unroll=_UNROLL)[1]


def _exponents(pp, k, w, begins, tree):
  """max(pp - w, k) after each token."""
  fall = jnp.where(begins, -EMPTY, jnp.broadcast_to(w, k.shape))

  def compose(a, b):
    return jnp.minimum(a[0] + b[0], -EMPTY), jnp.maximum(a[1] - b[0], b[1])

  return _recurrence(pp, (fall, k), lambda p, now: jnp.maximum(p - now[0], now[1]), compose, tree)


def _last_exponent(pp, k, w, starts):
  """The exponent after the last token, differentiable: the largest of pp - C w and all k_i - (C - 1
  - i) w since the document started."""
  C = k.shape[0]
  # here or later in the chunk
  begun = jnp.flip(count_starts(jnp.flip(starts, 0), axis=0), 0) > 0
  # of the state, then of each token
  dropped = jnp.concatenate([begun, jnp.zeros_like(begun[:1])])[..., None]
  age = jnp.arange(C, -1, -1, dtype=jnp.float32)[:, None, None]
  candidates = jnp.where(dropped, EMPTY, jnp.concatenate([pp[None], k]) - age * w)
  # By index: the gradient of a maximum compares numbers, and recomputed ones may differ in the last
  # bit.
  best = jnp.argmax(candidates, axis=0)
  chosen = jnp.arange(C + 1)[:, None, None] == best[None]
  return jnp.sum(jnp.where(chosen, candidates, 0.0), axis=0)


def _linear(keeps, takes, first, tree):
  """x_t = keeps_t x_{t-1} + takes_t over the first axis, for several x with the same keeps."""

  def apply(x, now):
    return tuple(now[0] * a + b for a, b in zip(x, now[1], strict=True))

  def compose(a, b):
    return a[0] * b[0], apply(a[1], b)

  return _recurrence(first, (keeps, takes), apply, compose, tree)


def _order(T: int) -> tuple[str, ...]:
  """An accelerator prefers few, large steps."""
  return ('naive',) if T <= _SHORT else ('chunked',) if platform() == 'cpu' else ('associative',)


WKV4 = Operation(
  'wkv4',
  {
    'naive': wkv4_naive,
    # a scan inside each chunk
    'chunked': _chunked,
    # an associative scan inside each chunk
    'associative': functools.partial(_chunked, tree=True),
  },
  _order,
)
