"""The recurrence of Mamba-3: trapezoidal discretization, complex states, and inputs and outputs of
rank R, computed as matrix products.

In every head, for a state h of P channels with N / 2 complex numbers each,

  h_t = alpha_t h_{t-1} + beta_t x_{t-1} B_{t-1}^T + gamma_t x_t B_t^T,  y_t = Re(h_t C_t) + D x_t

with alpha = exp(dt (A - i theta)), beta = (1 - lambda) dt alpha and gamma = lambda dt (Lahoti et
al. 2026, propositions 1 to 4). A complex number is a pair of real ones, and multiplication by
exp(-i dt theta) a rotation of the pair.

The product x_{t-1} B_{t-1}^T enters with the same alpha as the state, so both are one: the state
that is carried is s_t = h_t + ahead_t x_t B_t^T with ahead_t = (1 - lambda_{t+1}) dt_{t+1}, and

  h_t = alpha_t s_{t-1} + gamma_t x_t B_t^T.

It is kept in the frame of its last token, where that token's B and C are not rotated, so no angle
is part of it, and angles grow no larger than those of one chunk.

Dims: B batch, T time, H heads, P channels of a head, G groups of heads that share their maps, R
  rank of inputs and outputs, N state, A angles (of the pairs (i, A + i) of a state; 2 A <= N), C
  steps of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import from_chunks, scan_steps, to_chunks
from jaxformer.ops.implementation import Operation
from jaxformer.ops.sequence_parallel import local_length, over_time
from jaxformer.sharding import platform, shards

# products of a chunk have sides of steps x rank
CHUNK = {'cpu': 32, 'gpu': 128, 'tpu': 256}
# the logarithm of a decay to zero; finite, so that no 0 x inf arises
_ZERO_DECAY = -1e30

_TOKEN = ('batch', 'time', 'heads')
_MAPS = ('batch', 'time', 'heads', None, None)
_HEAD = ('heads', None, None)
_AXES = (
  (*_TOKEN, None),
  _TOKEN,
  _TOKEN,
  _TOKEN,
  _TOKEN,
  ('batch', 'time', None),
  _MAPS,
  _MAPS,
  _HEAD,
  _HEAD,
  _HEAD,
  ('heads',),
  ('batch', 'time'),
)


def mamba3(
  x_BTHP: Float[Array, 'B T H P'],
  dt_BTH: Float[Array, 'B T H'],
  rate_BTH: Float[Array, 'B T H'],
  trapezoid_BTH: Float[Array, 'B T H'],
  theta_BTA: Float[Array, 'B T A'],
  B_BTGRN: Float[Array, 'B T G R N'],
  C_BTGRN: Float[Array, 'B T G R N'],
  B_bias_HRN: Float[Array, 'H R N'],
  C_bias_HRN: Float[Array, 'H R N'],
  expand_HRP: Float[Array, 'H R P'] | None,
  D_H: Float[Array, ' H'],
  state: tuple[Float[Array, 'B H P N'], Float[Array, 'B 1 H P'], Float[Array, 'B 1 G R N']] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H R P'], Float[Array, 'B H P N']]:
  """The recurrence above.

  Args:
    x_BTHP: inputs; those of rank r are x * expand[:, r], or x itself if `expand_HRP` is None, with
      R = 1.
    dt_BTH: step sizes, positive.
    rate_BTH: A, negative.
    trapezoid_BTH: lambda, in [0, 1]: the weight of the present token; 1 is the Euler rule.
    theta_BTA: angles per unit of dt.
    B_BTGRN, C_BTGRN: input and output maps; head h uses those of group h // (H / G), plus its own
      bias.
    D_H: weight of the input itself in the output.
    state: h after the token before the first, and the x and B of that token; None for zeros.
    starts_BT: True where the state is reset before the token.

  Returns:
    y, in the dtype of x, and h after the last token, in fp32. Products take the inputs in their own
    dtype and accumulate in fp32.

  Raises:
    ValueError: H is no multiple of G.
  """
  (batch, T, H, P), G, N = x_BTHP.shape, B_BTGRN.shape[2], B_BTGRN.shape[4]
  if H % G:
    raise ValueError(f'{H} heads are no multiple of {G} groups')
  run = MAMBA3[MAMBA3.choose(local_length(T))]
  dt, trapezoid = dt_BTH.astype(jnp.float32), trapezoid_BTH.astype(jnp.float32)
  later = (1.0 - trapezoid) * dt
  ahead = jnp.pad(later[:, 1:], ((0, 0), (0, 1), (0, 0)))
  if state is None:
    carried = jnp.zeros((batch, H, P, N))
  else:
    h, x, B = state
    k, v = with_bias(B[:, 0], B_bias_HRN), _expanded(x[:, 0], expand_HRP)
    carried = h + later[:, 0, :, None, None] * jnp.einsum('BHRP,BHRN->BHPN', v, k)
  # Groups are repeated until the mesh shards them like the heads: each shard then has the maps of
  # its heads.
  copies = math.lcm(G, shards('heads', H)) // G
  maps = (a if copies == 1 else jnp.repeat(a, copies, axis=2) for a in (B_BTGRN, C_BTGRN))
  sharded = over_time(run, ('batch', 'heads', None, None), _AXES, _MAPS, _summarize, mapped=True)
  return sharded(
    carried,
    x_BTHP,
    dt,
    rate_BTH.astype(jnp.float32) * dt,
    trapezoid * dt,
    ahead,
    theta_BTA.astype(jnp.float32),
    *maps,
    B_bias_HRN,
    C_bias_HRN,
    expand_HRP,
    D_H,
    starts_BT,
  )


def with_bias(
  maps: Float[Array, '*B G R N'], bias_HRN: Float[Array, 'H R N']
) -> Float[Array, '*B H R N']:
  """The maps of every head, in fp32: those of its group plus its bias."""
  copies = bias_HRN.shape[0] // maps.shape[-3]
  bias = bias_HRN.astype(jnp.float32).reshape((1,) * (maps.ndim - 3) + bias_HRN.shape)
  return jnp.repeat(maps.astype(jnp.float32), copies, axis=-3) + bias


def _expanded(x: Float[Array, '*B H P'], expand_HRP: Array | None) -> Float[Array, '*B H R P']:
  """The inputs of each rank, in fp32."""
  x = x.astype(jnp.float32)[..., None, :]
  if expand_HRP is None:
    return x
  return x * expand_HRP.astype(jnp.float32).reshape((1,) * (x.ndim - 3) + expand_HRP.shape)


def rotated(x: Float[Array, '*B N'], angle: Float[Array, '*#B A']) -> Float[Array, '*B N']:
  """x with its pairs (i, A + i) rotated by the angles; the last N - 2 A numbers stay."""
  A = angle.shape[-1]
  real, imaginary, rest = jnp.split(x, (A, 2 * A), axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
  return jnp.concatenate([*turned, rest], axis=-1)


def mamba3_naive(s_BHPN, x, dt, log, now, ahead, theta, B, C, B_bias, C_bias, expand, D, starts_BT):
  """The recurrence step by step, with rotated states and no rotated maps. Its gradient stores every
  state. Arguments: s; of each token x, dt, log abs(alpha), gamma, `ahead`, theta, B and C; biases,
  expansion and D."""

  def step(s, x, dt, log, now, ahead, theta, B, C):
    k, q, v = with_bias(B, B_bias), with_bias(C, C_bias), _expanded(x, expand)
    s = rotated(s, (-dt[..., None] * theta[:, None])[:, :, None])
    added = jnp.einsum('BHRP,BHRN->BHPN', v, k)
    h = jnp.exp(log)[..., None, None] * s + now[..., None, None] * added
    y = jnp.einsum('BHPN,BHRN->BHRP', h, q) + D.reshape(1, -1, 1, 1) * v
    return h + ahead[..., None, None] * added, y.astype(x.dtype)

  return scan_steps(step, s_BHPN, (x, dt, log, now, ahead, theta, B, C), starts_BT)


def _product(equation: str, *operands: Array):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _angles(dt_BCH, theta_BCA) -> Float[Array, 'B C H A']:
  """The angle of each token of a chunk from the token before the chunk."""
  return jnp.cumsum(dt_BCH[..., None] * theta_BCA[:, :, None], axis=1)


def _after_chunk(s_BHPN, angle_BCHA, since_BHC, weight_BHC, k_BCHRN, v_BCHRP):
  """The state after a chunk: that before it and the tokens, each with its decay to the end, in the
  frame of the last token."""
  weighted = v_BCHRP * jnp.swapaxes(weight_BHC, 1, 2)[..., None, None].astype(v_BCHRP.dtype)
  s = since_BHC[..., -1, None, None] * s_BHPN + _product('BsHRP,BsHRN->BHPN', weighted, k_BCHRN)
  return rotated(s, -angle_BCHA[:, -1, :, None])


def _decays(log_BHC):
  """From token s to token t of a chunk, `[B, H, t, s]`, and from before the chunk to t.

  `log_BHC` is `_ZERO_DECAY` where a document starts. Sums of logarithms are taken over the steps
  concerned, not as differences of sums from the start of the chunk, which lose all digits where
  much has decayed before (Dao and Gu 2024, section 6, listing 1)."""
  C = log_BHC.shape[-1]
  t, s = jnp.arange(C).reshape(-1, 1), jnp.arange(C).reshape(1, -1)
  after_s = jnp.where((t > s).reshape(1, 1, C, C), log_BHC[..., None], 0.0)
  sums = jnp.where((t >= s).reshape(1, 1, C, C), jnp.cumsum(after_s, axis=2), _ZERO_DECAY)
  return jnp.exp(sums), jnp.exp(jnp.cumsum(log_BHC, axis=2))


def _chunk(s_BHPN, inputs, constants):
  """One chunk: the contributions of its tokens to each other's outputs, that of the state, and the
  state after the chunk. All maps are rotated by their angle from the token before the chunk."""
  x, dt_BCH, log_BCH, now_BCH, ahead_BCH, theta, B, C = inputs
  B_bias, C_bias, expand, D_H = constants
  dtype, size, H = x.dtype, x.shape[1], x.shape[2]
  angle = _angles(dt_BCH, theta)
  k, q = (
    rotated(with_bias(maps, bias), angle[:, :, :, None]).astype(dtype)
    for maps, bias in ((B, B_bias), (C, C_bias))
  )
  v = _expanded(x, expand).astype(dtype)
  between, since = _decays(jnp.moveaxis(log_BCH, 1, 2))
  now, total = (jnp.moveaxis(a, 1, 2) for a in (now_BCH, now_BCH + ahead_BCH))
  # of token s in the output of t: a later token sees what s adds at s + 1 too
  present = jnp.eye(size, dtype=bool).reshape(1, 1, size, size)
  weight = jnp.where(present, now[:, :, None], between * total[:, :, None])
  scores = _product('BtHjN,BsHiN->BHtjsi', q, k) * weight[:, :, :, None, :, None]
  y = _product('BHtjsi,BsHiP->BtHjP', scores.astype(dtype), v)
  from_state = _product('BtHjN,BHPN->BtHjP', q.astype(jnp.float32), s_BHPN)
  y = y + from_state * jnp.swapaxes(since, 1, 2)[..., None, None]
  y = y + D_H.astype(jnp.float32).reshape(1, 1, H, 1, 1) * v.astype(jnp.float32)
  s = _after_chunk(s_BHPN, angle, since, between[:, :, -1] * total, k, v)
  return s, y.astype(dtype)


def _to_chunks(x, dt, log, now, ahead, theta, B, C, starts_BT) -> tuple[Array, ...]:
  """The inputs of each chunk. Padding has a step size of 0, which leaves the state as it is."""
  T, R = x.shape[1], B.shape[3]
  size = min(max(CHUNK[platform()] // R, 1), T)
  log = jnp.where(starts_BT[..., None], _ZERO_DECAY, log)
  return tuple(to_chunks(a, size) for a in (x, dt, log, now, ahead, theta, B, C))


def mamba3_chunked(
  s_BHPN, x, dt, log, now, ahead, theta, B, C, B_bias, C_bias, expand, D, starts_BT
):
  """Chunks as matrix products, the state from chunk to chunk by a scan; the gradient keeps the
  states between chunks and recomputes the rest of each chunk, so that only one chunk's maps per
  head and its scores are in memory. Arguments as in `mamba3_naive`."""
  constants = (B_bias, C_bias, expand, D)

  def body(s, chunk):
    return _chunk(s, chunk, constants)

  chunks = _to_chunks(x, dt, log, now, ahead, theta, B, C, starts_BT)
  s, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), s_BHPN, chunks)
  return from_chunks(y, x.shape[1]), s


def _summarize(x, dt, log, now, ahead, theta, B, C, B_bias, C_bias, expand, D, starts_BT):
  """By what a part multiplies the state, the angle by which it rotates it, and the state in which
  it ends from zeros."""
  batch, H, P, N, dtype = x.shape[0], x.shape[2], x.shape[3], B.shape[-1], x.dtype

  def body(carry, chunk):
    x, dt, log, now, ahead, theta, B = chunk
    decay, turned, s = carry
    angle = _angles(dt, theta)
    k = rotated(with_bias(B, B_bias), angle[:, :, :, None]).astype(dtype)
    between, since = _decays(jnp.moveaxis(log, 1, 2))
    weight = between[:, :, -1] * jnp.moveaxis(now + ahead, 1, 2)
    s = _after_chunk(s, angle, since, weight, k, _expanded(x, expand).astype(dtype))
    return (decay * since[..., -1], jnp.mod(turned + angle[:, -1], 2 * jnp.pi), s), None

  first = (
    jnp.ones((batch, H)),
    jnp.zeros((batch, H, theta.shape[-1])),
    jnp.zeros((batch, H, P, N)),
  )
  chunks = _to_chunks(x, dt, log, now, ahead, theta, B, C, starts_BT)[:-1]
  summary, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), first, chunks)
  return summary, _join


def _join(s_BHPN, part: tuple[Any, Any, Any]):
  """The state after a part, from that before it and the part's summary."""
  decay, angle, s = part
  return decay[..., None, None] * rotated(s_BHPN, -angle[:, :, None]) + s


def _order(T: int) -> tuple[str, ...]:
  return ('naive',) if T == 1 else ('chunked',)


MAMBA3 = Operation('mamba3', {'naive': mamba3_naive, 'chunked': mamba3_chunked}, _order)
