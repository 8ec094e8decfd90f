"""State-space duality (Dao and Gu 2024): the selective scan with one rate a head, done with matrix
products.

Dims: B batch, T time, H heads, P channels of a head, G groups of heads that share their maps, N
  state, C steps of a chunk.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.implementation import Implementation, Operation
from jaxformer.ops.sequence_parallel import over_time, scaled, sums_after, time_axes, unbroken
from jaxformer.sharding import per_shard, platform, shards

# steps of a chunk; longer ones cost products, shorter ones memory traffic
CHUNK = {'cpu': 32, 'gpu': 128, 'tpu': 256}
# the logarithm of a decay to nothing; finite, so that no 0 x inf arises
_NEVER = -1e30


def ssd_step(
  x_BHP: Float[Array, 'B H P'],
  dt_BH: Float[Array, 'B H'],
  A_H: Float[Array, ' H'],
  B_BGN: Float[Array, 'B G N'],
  C_BGN: Float[Array, 'B G N'],
  D_H: Float[Array, ' H'],
  h_BHPN: Float[Array, 'B H P N'],
) -> tuple[Float[Array, 'B H P'], Float[Array, 'B H P N']]:
  """One token of `ssd`."""
  x, dt, A, D = (a.astype(jnp.float32) for a in (x_BHP, dt_BH, A_H, D_H))
  B, C = (
    jnp.repeat(a.astype(jnp.float32), x.shape[1] // a.shape[1], axis=1) for a in (B_BGN, C_BGN)
  )
  h = (
    jnp.exp(dt * A[None])[..., None, None] * h_BHPN + (dt[..., None] * x)[..., None] * B[:, :, None]
  )
  y = jnp.sum(h * C[:, :, None], axis=-1) + D[None, :, None] * x
  return y.astype(x_BHP.dtype), h


def ssd_naive(
  x_BTHP: Float[Array, 'B T H P'],
  dt_BTH: Float[Array, 'B T H'],
  A_H: Float[Array, ' H'],
  B_BTGN: Float[Array, 'B T G N'],
  C_BTGN: Float[Array, 'B T G N'],
  D_H: Float[Array, ' H'],
  state_BHPN: Float[Array, 'B H P N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H P'], Float[Array, 'B H P N']]:
  """The recurrence step by step. Its gradient stores every state."""
  batch, _, H, P = x_BTHP.shape
  first = (
    jnp.zeros((batch, H, P, B_BTGN.shape[-1]), jnp.float32)
    if state_BHPN is None
    else state_BHPN.astype(jnp.float32)
  )

  def step(h, now):
    x, dt, B, C, start = now
    y, h = ssd_step(x, dt, A_H, B, C, D_H, jnp.where(start[:, None, None, None], 0.0, h))
    return h, y

  h, y = jax.lax.scan(
    step, first, tuple(jnp.swapaxes(a, 0, 1) for a in (x_BTHP, dt_BTH, B_BTGN, C_BTGN, starts_BT))
  )
  return jnp.swapaxes(y, 0, 1), h


def _product(equation: str, *operands: Array) -> Array:
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _chunk(state_BGRPN: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
  """One chunk: what its tokens add to each other's outputs, what the state adds, and the state
  after it. R heads share a group.

  `log_BGRC` is the logarithm of each step's decay, `_NEVER` where a document begins, so that a sum
  over steps with a border among them is a decay to nothing. Sums of logarithms are taken over the
  steps concerned, not as differences of sums from the start of the chunk, which lose all digits
  where much has decayed before (section 6, listing 1, `segsum`)."""
  x_BCGRP, dt_BGRC, log_BGRC, B_BCGN, C_BCGN = now
  dtype, C = x_BCGRP.dtype, x_BCGRP.shape[1]
  t, s = jnp.arange(C).reshape(-1, 1), jnp.arange(C).reshape(1, -1)
  after_s = jnp.where((t > s).reshape(1, 1, 1, C, C), log_BGRC[..., None], 0.0)
  # from s to t
  between = jnp.exp(jnp.where((t >= s).reshape(1, 1, 1, C, C), jnp.cumsum(after_s, axis=3), _NEVER))
  # of x_s in what t reads
  weight = between * dt_BGRC[:, :, :, None]
  scores = _product('BtGN,BsGN->BGts', C_BCGN, B_BCGN)
  y = _product('BGRts,BsGRP->BtGRP', (scores[:, :, None] * weight).astype(dtype), x_BCGRP)
  # from before the chunk to t
  since = jnp.exp(jnp.cumsum(log_BGRC, axis=3))
  carried = _product('BtGN,BGRPN->BtGRP', C_BCGN.astype(jnp.float32), state_BGRPN)
  y = y + carried * jnp.moveaxis(since, 3, 1)[..., None]
  weighted = (
    x_BCGRP.astype(jnp.float32) * jnp.moveaxis(weight[:, :, :, -1], 3, 1)[..., None]
  ).astype(dtype)
  state = since[..., -1, None, None] * state_BGRPN + _product('BsGRP,BsGN->BGRPN', weighted, B_BCGN)
  return state, y.astype(dtype)


def ssd_chunked(
  x_BTHP: Float[Array, 'B T H P'],
  dt_BTH: Float[Array, 'B T H'],
  A_H: Float[Array, ' H'],
  B_BTGN: Float[Array, 'B T G N'],
  C_BTGN: Float[Array, 'B T G N'],
  D_H: Float[Array, ' H'],
  state_BHPN: Float[Array, 'B H P N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H P'], Float[Array, 'B H P N']]:
  """Chunks as matrix products, the state from chunk to chunk by a scan; the gradient keeps the
  states between chunks and does the rest of each chunk again, so that one chunk's B x H x C x C
  weights are in memory at a time."""
  (batch, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
  R, C = H // G, min(CHUNK[platform()], T)
  padding = -T % C  # with a step size of 0 the state stays as it is

  def chunks(a, *shape):
    a = jnp.pad(a, ((0, 0), (0, padding), *((0, 0),) * (a.ndim - 2)))
    return jnp.swapaxes(a.reshape(batch, -1, C, *(shape or a.shape[2:])), 0, 1)

  dt = dt_BTH.astype(jnp.float32)
  log = jnp.where(starts_BT[..., None], _NEVER, dt * A_H.astype(jnp.float32).reshape(1, 1, H))
  by_head = tuple(jnp.moveaxis(chunks(a, G, R), 2, 4) for a in (dt, log))
  state = (
    jnp.zeros((batch, H, P, N), jnp.float32)
    if state_BHPN is None
    else state_BHPN.astype(jnp.float32)
  )
  state, y = jax.lax.scan(
    jax.checkpoint(_chunk, prevent_cse=False),
    state.reshape(batch, G, R, P, N),
    (chunks(x_BTHP, G, R, P), *by_head, chunks(B_BTGN), chunks(C_BTGN)),
  )
  y = jnp.swapaxes(y, 0, 1).reshape(batch, -1, H, P)[:, :T].astype(jnp.float32)
  y = y + D_H.astype(jnp.float32).reshape(1, 1, H, 1) * x_BTHP.astype(jnp.float32)
  return y.astype(x_BTHP.dtype), state.reshape(batch, H, P, N)


SSD = Operation(
  'ssd',
  {'naive': Implementation(ssd_naive), 'chunked': Implementation(ssd_chunked)},
  lambda T: ('naive',) if T == 1 else ('chunked',),
)


def ssd(
  x_BTHP: Float[Array, 'B T H P'],
  dt_BTH: Float[Array, 'B T H'],
  A_H: Float[Array, ' H'],
  B_BTGN: Float[Array, 'B T G N'],
  C_BTGN: Float[Array, 'B T G N'],
  D_H: Float[Array, ' H'],
  state_BHPN: Float[Array, 'B H P N'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H P'], Float[Array, 'B H P N']]:
  """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t, in every head (Dao and Gu
  2024, eq. 1 and section 7).

  Args:
    x_BTHP: inputs.
    dt_BTH: step sizes, positive.
    A_H: rates, negative.
    B_BTGN, C_BTGN: input and output maps; head h uses those of group h // (H / G).
    D_H: what of the input passes by.
    state_BHPN: the state before the first token; None for zeros.
    starts_BT: True where the state is reset before the token.

  Returns:
    y, like x, and the state after the last token, in fp32. Products take the inputs as they are and
    are summed in fp32.

  Raises:
    ValueError: H is no multiple of G.
  """
  (batch, T, H, P), (G, N), axes = x_BTHP.shape, B_BTGN.shape[2:], time_axes(x_BTHP.shape[1])
  if H % G:
    raise ValueError(f'{H} heads are no multiple of {G} groups')
  chosen = SSD.choose(T // shards('time', T))
  # Groups repeated until the mesh divides them like the heads: each shard then has the maps of its
  # heads.
  copies = math.lcm(G, shards('heads', H)) // G
  B, C = (a if copies == 1 else jnp.repeat(a, copies, axis=2) for a in (B_BTGN, C_BTGN))

  def run(h, x, dt, A, B, C, D, starts):
    return SSD[chosen](x, dt, A, B, C, D, h, starts)

  if axes and state_BHPN is None:
    state_BHPN = jnp.zeros((batch, H, P, N), jnp.float32)
  wide, state = ('batch', 'time', 'heads', None), ('batch', 'heads', None, None)
  mapped = per_shard(
    over_time(run, _summary, scaled, axes),
    (state, wide, wide[:3], ('heads',), wide, wide, ('heads',), wide[:2]),
    wide,
    state,
  )
  y, h = mapped(state_BHPN, x_BTHP, dt_BTH, A_H, B, C, D_H, starts_BT)
  return y, h


def _summary(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts_BT) -> tuple[Array, Array]:
  """What a part multiplies the state by, and the state that it ends with from zeros."""
  dt = dt_BTH.astype(jnp.float32)
  log, (whole, last), G = (
    dt * A_H.astype(jnp.float32)[None, None],
    unbroken(starts_BT),
    B_BTGN.shape[2],
  )
  weight = jnp.where(last[..., None], jnp.exp(sums_after(log)) * dt, 0.0)
  x = (x_BTHP.astype(jnp.float32) * weight[..., None]).astype(x_BTHP.dtype)
  by_group = x.reshape(*x.shape[:2], G, -1, x.shape[-1])
  h = _product('BsGRP,BsGN->BGRPN', by_group, B_BTGN)
  decay = jnp.where(whole[:, None], jnp.exp(jnp.sum(log, axis=1)), 0.0)
  return decay[..., None, None], h.reshape(h.shape[0], -1, *h.shape[3:])
