"""The recurrence of RWKV-4: a weighted mean of all values so far, with a weight of its own for the
present one.

  y_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i} +
  e^{u + k_t})

(Peng et al. 2023, "RWKV", equation 16), w > 0 a channel. Numerator and denominator are kept as aa
e^pp and bb e^pp, so that no exponential overflows. Everything is fp32; y comes back in the dtype of
v.

The chunked form finds the exponents pp first. They are a choice, not a part of the result, so no
gradient flows through them and what is left are two linear recurrences whose coefficients are known
for a whole chunk at once.

Dims: B batch, T time, C chunk, D channels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.sequence_parallel import over_time, time_axes, unbroken
from jaxformer.sharding import per_shard, platform, shards

CHUNK = 64
NOTHING = -1e38  # the exponent of a sum without terms
_SHORT = 4  # up to so many tokens the recurrence itself is the fastest form
_UNROLL = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wkv4State:
  """The sums over all tokens so far: aa e^pp of e^{..} v and bb e^pp of e^{..}, as of the next
  token. Fp32."""

  aa: Float[Array, 'B D']
  bb: Float[Array, 'B D']
  pp: Float[Array, 'B D']

  @classmethod
  def empty(cls, batch: int, width: int) -> Wkv4State:
    """Before the first token."""
    zeros = jnp.zeros((batch, width), jnp.float32)
    return cls(zeros, zeros, jnp.full((batch, width), NOTHING, jnp.float32))


def wkv4_naive(
  k_BTD: Float[Array, 'B T D'],
  v_BTD: Float[Array, 'B T D'],
  w_D: Float[Array, ' D'],
  u_D: Float[Array, ' D'],
  state: Wkv4State,
  starts_BT: Bool[Array, 'B T'],
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T D'], Wkv4State]:
  """The recurrence, one token after the other, in fp32."""

  def step(state, now):
    k_BD, v_BD, begins_B = now
    aa, bb, pp = (
      jnp.where(begins_B[:, None], e, s) for e, s in zip((0.0, 0.0, NOTHING), state, strict=True)
    )
    p = jnp.maximum(pp, u_D[None] + k_BD)
    old, new = jnp.exp(pp - p), jnp.exp(u_D[None] + k_BD - p)
    y_BD = (old * aa + new * v_BD) / (old * bb + new)
    p = jnp.maximum(pp - w_D[None], k_BD)
    old, new = jnp.exp(pp - w_D[None] - p), jnp.exp(k_BD - p)
    return (old * aa + new * v_BD, old * bb + new, p), y_BD

  first = state.aa, state.bb, state.pp
  last, y_TBD = lax.scan(
    step, first, (jnp.swapaxes(k_BTD, 0, 1), jnp.swapaxes(v_BTD, 0, 1), starts_BT.T)
  )
  return jnp.swapaxes(y_TBD, 0, 1), Wkv4State(*last)


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
    w_D: exp(time_decay), what the weight of a token loses a step; u_D: what is added to the present
      token's key.
    state: None before the first token.
    starts_BT: where a packed document begins: nothing is left of the state before that token.
    chunk: tokens at a time.
  """
  (B, T, D), dtype = v_BTD.shape, v_BTD.dtype
  k, v, w, u = (x.astype(jnp.float32) for x in (k_BTD, v_BTD, w_D, u_D))
  state = Wkv4State.empty(B, D) if state is None else state
  axes = time_axes(T)
  chosen = WKV4.choose(T // shards('time', T))

  def run(state, k, v, w, u, starts):
    return WKV4[chosen](k, v, w, u, state, starts, chunk)

  if axes:
    y, state = _over_time(run, axes)(state, k, v, w, u, starts_BT)
  else:
    y, state = run(state, k, v, w, u, starts_BT)
  return y.astype(dtype), state


def _over_time(run, axes: tuple[str, ...]):
  """`run` on shards of time (`ops.sequence_parallel`). A part lowers the exponent of the state by T w and
  adds its own sums."""

  def summary(k, v, w, u, starts):
    loss = jnp.where(unbroken(starts)[0][:, None], k.shape[1] * w[None], -NOTHING)
    empty = Wkv4State.empty(k.shape[0], k.shape[2])
    return loss, plain((empty.aa, empty.bb, empty.pp), k, v, w, u, starts)[1]

  def join(state, part):
    (aa, bb, pp), (loss, (own_aa, own_bb, own_pp)) = state, part
    before = jnp.maximum(pp - loss, NOTHING)
    pp = jnp.maximum(before, own_pp)
    old, new = jnp.exp(before - pp), jnp.exp(own_pp - pp)
    return old * aa + new * own_aa, old * bb + new * own_bb, pp

  def plain(state, *inputs):
    y, last = run(Wkv4State(*state), *inputs)
    return y, (last.aa, last.bb, last.pp)

  def flat(aa, bb, pp, *inputs):
    y, last = over_time(plain, summary, join, axes)((aa, bb, pp), *inputs)
    return y, *last

  def mapped(state, *inputs):
    token, sums, channel = ('batch', 'time', 'heads'), ('batch', 'heads'), ('heads',)
    shard = per_shard(
      flat, (sums, sums, sums, token, token, channel, channel, token[:2]), token, sums, sums, sums
    )
    y, *sums = shard(state.aa, state.bb, state.pp, *inputs)
    return y, Wkv4State(*sums)

  return mapped


def _order(T: int) -> tuple[str, ...]:
  """An accelerator prefers few, large steps."""
  return ('naive',) if T <= _SHORT else ('chunked',) if platform() == 'cpu' else ('associative',)


# ---- the chunked form --------------------------------------------------------------------------


def _chunked(k, v, w, u, state: Wkv4State, starts, chunk: int, tree: bool = False):
  """Whole chunks in a scan that keeps the states at their borders alone for the backward pass, then
  what is left."""
  (B, T, D), ys = k.shape, []
  n, rest = divmod(T, chunk)

  @jax.checkpoint
  def body(state, now):
    return _chunk(state, *(jnp.swapaxes(x, 0, 1) for x in now), w, u, tree)

  if n:
    cut = lambda x: jnp.moveaxis(x[:, : n * chunk].reshape(B, n, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
    state, y = lax.scan(body, state, tuple(cut(x) for x in (k, v, starts)))
    ys.append(y.reshape(n * chunk, B, D))
  if rest:
    state, y = body(state, tuple(x[:, n * chunk :] for x in (k, v, starts)))
    ys.append(y)
  return jnp.swapaxes(ys[0] if len(ys) == 1 else jnp.concatenate(ys), 0, 1), state


def _chunk(state: Wkv4State, k, v, starts, w, u, tree: bool):
  """(state, y) after a chunk of tokens `[C, B, D]`."""
  w, u, begins = w[None, None], u[None, None], starts[..., None]
  # of the state after each token
  after = lax.stop_gradient(_exponents(state.pp, k, w, begins, tree))
  before = jnp.where(begins, NOTHING, jnp.concatenate([state.pp[None], after[:-1]]))
  keeps, takes = jnp.exp(before - w - after), jnp.exp(k - after)
  # after each token, too
  aa, bb = _linear(keeps, (takes * v, takes), (state.aa, state.bb), tree)
  aa_before, bb_before = (
    jnp.concatenate([s[None], x[:-1]]) for s, x in ((state.aa, aa), (state.bb, bb))
  )
  p = lax.stop_gradient(jnp.maximum(before, u + k))
  old, new = jnp.exp(before - p), jnp.exp(u + k - p)
  y = (old * aa_before + new * v) / (old * bb_before + new)
  # The state goes out with the exponent that the recurrence defines, gradient and all.
  pp = _last_exponent(state.pp, k, w, starts)
  scale = jnp.exp(after[-1] - pp)
  return Wkv4State(scale * aa[-1], scale * bb[-1], pp), y


def _exponents(pp, k, w, begins, tree: bool):
  """max(pp - w, k) after each token."""
  loss = jnp.where(begins, -NOTHING, jnp.broadcast_to(w, k.shape))
  if not tree:

    def step(p, now):
      p = jnp.maximum(p - now[0], now[1])
      return p, p

    return lax.scan(step, pp, (loss, k), unroll=_UNROLL)[1]

  def join(a, b):
    return jnp.minimum(a[0] + b[0], -NOTHING), jnp.maximum(a[1] - b[0], b[1])

  lost, own = lax.associative_scan(join, (loss, k))
  return jnp.maximum(pp[None] - lost, own)


def _last_exponent(pp, k, w, starts):
  """The same after the last token, differentiable: the largest of pp - C w and all k_i - (C - 1 -
  i) w since the document began."""
  C = k.shape[0]
  # here or later in the chunk
  begun = jnp.flip(lax.cummax(jnp.flip(starts, 0).astype(jnp.int32), axis=0), 0) == 1
  # of the state, then of each token
  dropped = jnp.concatenate([begun, jnp.zeros_like(begun[:1])])[..., None]
  age = jnp.arange(C, -1, -1, dtype=jnp.float32)[:, None, None]
  candidates = jnp.where(dropped, NOTHING, jnp.concatenate([pp[None], k]) - age * w)
  # By index: a maximum's gradient compares numbers, and those computed again need not be equal to
  # the last bit.
  best = jnp.argmax(candidates, axis=0)
  chosen = jnp.arange(C + 1)[:, None, None] == best[None]
  return jnp.sum(jnp.where(chosen, candidates, 0.0), axis=0)


def _linear(keeps, takes, first, tree: bool):
  """x_t = keeps_t x_{t-1} + takes_t over the first axis, for several x with the same keeps."""
  if not tree:

    def step(x, now):
      x = tuple(now[0] * a + b for a, b in zip(x, now[1], strict=True))
      return x, x

    return lax.scan(step, first, (keeps, takes), unroll=_UNROLL)[1]

  def join(a, b):
    return a[0] * b[0], tuple(b[0] * x + y for x, y in zip(a[1], b[1], strict=True))

  kept, own = lax.associative_scan(join, (keeps, takes))
  return tuple(kept * x[None] + y for x, y in zip(first, own, strict=True))


WKV4 = Operation(
  'wkv4',
  {
    'naive': Implementation(wkv4_naive),
    # a scan inside each chunk
    'chunked': Implementation(_chunked),
    # an associative scan inside each chunk
    'associative': Implementation(functools.partial(_chunked, tree=True)),
  },
  _order,
)
