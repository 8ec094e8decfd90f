"""State-space duality: the selective scan with one rate per head, computed as matrix products.

  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t

in every head (Dao and Gu 2024, eq. 1 and section 7).

Dims: B batch, T time, H heads, P channels of a head, G groups of heads that share their maps, N
  state, C steps of a chunk.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.chunks import from_chunks, scan_steps, to_chunks
from jaxformer.ops.implementation import Operation
from jaxformer.ops.kernels.ssd import ssd_pallas
from jaxformer.ops.sequence_parallel import (
  local_length,
  multiply_add,
  over_time,
  reset_masks,
  sums_after,
)
from jaxformer.sharding import platform, shards

# steps of a chunk; longer ones cost products, shorter ones memory traffic
CHUNK = {'cpu': 32, 'gpu': 128, 'tpu': 256}
# the logarithm of a decay to zero; finite, so that no 0 x inf arises
_ZERO_DECAY = -1e30

_WIDE = ('batch', 'time', 'heads', None)
_AXES = (_WIDE, _WIDE[:3], ('heads',), _WIDE, _WIDE, ('heads',), _WIDE[:2])


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
  """The recurrence above.

  Args:
    x_BTHP: inputs.
    dt_BTH: step sizes, positive.
    A_H: rates, negative.
    B_BTGN, C_BTGN: input and output maps; head h uses those of group h // (H / G).
    D_H: weight of the input itself in the output.
    state_BHPN: the state before the first token; None for zeros.
    starts_BT: True where the state is reset before the token.

  Returns:
    y, in the dtype of x, and the state after the last token, in fp32. Products take the inputs in
    their own dtype and accumulate in fp32.

  Raises:
    ValueError: H is no multiple of G.
  """
  (batch, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
  if H % G:
    raise ValueError(f'{H} heads are no multiple of {G} groups')
  run = SSD[SSD.choose(local_length(T))]
  # Groups are repeated until the mesh shards them like the heads: each shard then has the maps of
  # its heads.
  copies = math.lcm(G, shards('heads', H)) // G
  B, C = (a if copies == 1 else jnp.repeat(a, copies, axis=2) for a in (B_BTGN, C_BTGN))
  state = jnp.zeros((batch, H, P, N)) if state_BHPN is None else state_BHPN
  sharded = over_time(run, ('batch', 'heads', None, None), _AXES, _WIDE, _summarize, mapped=True)
  return sharded(state.astype(jnp.float32), x_BTHP, dt_BTH, A_H, B, C, D_H, starts_BT)


def _summarize(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts_BT):
  """By what a part multiplies the state, and the state in which it ends from zeros."""
  dt = dt_BTH.astype(jnp.float32)
  log = dt * A_H.astype(jnp.float32)[None, None]
  survives_B, kept_BT = reset_masks(starts_BT)
  weight = jnp.where(kept_BT[..., None], jnp.exp(sums_after(log)) * dt, 0.0)
  x = (x_BTHP.astype(jnp.float32) * weight[..., None]).astype(x_BTHP.dtype)
  by_group = x.reshape(*x.shape[:2], B_BTGN.shape[2], -1, x.shape[-1])
  h = _product('BsGRP,BsGN->BGRPN', by_group, B_BTGN)
  decay = jnp.where(survives_B[:, None], jnp.exp(jnp.sum(log, axis=1)), 0.0)
  return (decay[..., None, None], h.reshape(h.shape[0], -1, *h.shape[3:])), multiply_add


def ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, h_BHPN):
  """One token of `ssd`: y [B, H, P], in the dtype of x, and the new state in fp32."""
  x, dt, A, D = (a.astype(jnp.float32) for a in (x_BHP, dt_BH, A_H, D_H))
  B, C = (
    jnp.repeat(a.astype(jnp.float32), x.shape[1] // a.shape[1], axis=1) for a in (B_BGN, C_BGN)
  )
  h = (
    jnp.exp(dt * A[None])[..., None, None] * h_BHPN + (dt[..., None] * x)[..., None] * B[:, :, None]
  )
  y = jnp.sum(h * C[:, :, None], axis=-1) + D[None, :, None] * x
  return y.astype(x_BHP.dtype), h


def ssd_naive(h_BHPN, x, dt, A_H, B, C, D_H, starts_BT):
  """The recurrence step by step. Its gradient stores every state."""

  def step(h, x, dt, B, C):
    y, h = ssd_step(x, dt, A_H, B, C, D_H, h)
    return h, y

  return scan_steps(step, h_BHPN, (x, dt, B, C), starts_BT)


def _product(equation: str, *operands: Array):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _chunk(state_BGRPN, now):
  """One chunk: the contributions of its tokens to each other's outputs, that of the state, and the
  state after the chunk. R heads share a group.

  `log_BGRC` is the logarithm of each step's decay, `_ZERO_DECAY` where a document starts, so that a
  sum over steps across a border is a decay to zero. Sums of logarithms are taken over the steps
  concerned, not as differences of sums from the start of the chunk, which lose all digits where
  much has decayed before (section 6, listing 1, `segsum`)."""
  x_BCGRP, dt_BGRC, log_BGRC, B_BCGN, C_BCGN = now
  dtype, C = x_BCGRP.dtype, x_BCGRP.shape[1]
  t, s = jnp.arange(C).reshape(-1, 1), jnp.arange(C).reshape(1, -1)
  after_s = jnp.where((t > s).reshape(1, 1, 1, C, C), log_BGRC[..., None], 0.0)
  # from s to t
  between = jnp.exp(
    jnp.where((t >= s).reshape(1, 1, 1, C, C), jnp.cumsum(after_s, axis=3), _ZERO_DECAY)
  )
  # of x_s in the output of t
  weight = between * dt_BGRC[:, :, :, None]
  scores = _product('BtGN,BsGN->BGts', C_BCGN, B_BCGN)
  y = _product('BGRts,BsGRP->BtGRP', (scores[:, :, None] * weight).astype(dtype), x_BCGRP)
  # from before the chunk to t
  since = jnp.exp(jnp.cumsum(log_BGRC, axis=3))
  from_state = _product('BtGN,BGRPN->BtGRP', C_BCGN.astype(jnp.float32), state_BGRPN)
  y = y + from_state * jnp.moveaxis(since, 3, 1)[..., None]
  weighted = (
    x_BCGRP.astype(jnp.float32) * jnp.moveaxis(weight[:, :, :, -1], 3, 1)[..., None]
  ).astype(dtype)
  state = since[..., -1, None, None] * state_BGRPN + _product('BsGRP,BsGN->BGRPN', weighted, B_BCGN)
  return state, y.astype(dtype)


def ssd_chunked(h_BHPN, x, dt, A_H, B, C, D_H, starts_BT):
  """Chunks as matrix products, the state from chunk to chunk by a scan; the gradient keeps the
  states between chunks and recomputes the rest of each chunk, so that only one chunk's B x H x C x
  C weights are in memory."""
  (_, T, H, P), G = x.shape, B.shape[2]
  R, size = H // G, min(CHUNK[platform()], T)
  dt = dt.astype(jnp.float32)
  log = jnp.where(starts_BT[..., None], _ZERO_DECAY, dt * A_H.astype(jnp.float32).reshape(1, 1, H))
  # Padding has a step size of 0, which leaves the state as it is.
  x_n, dt_n, log_n, B_n, C_n = (to_chunks(a, size) for a in (x, dt, log, B, C))
  x_n = x_n.reshape(*x_n.shape[:3], G, R, P)
  by_head = (jnp.moveaxis(a.reshape(*a.shape[:3], G, R), 2, 4) for a in (dt_n, log_n))
  state, y = jax.lax.scan(
    jax.checkpoint(_chunk, prevent_cse=False),
    h_BHPN.reshape(h_BHPN.shape[0], G, R, *h_BHPN.shape[2:]),
    (x_n, *by_head, B_n, C_n),
  )
  y = from_chunks(y, T).reshape(x.shape).astype(jnp.float32)
  y = y + D_H.astype(jnp.float32).reshape(1, 1, H, 1) * x.astype(jnp.float32)
  return y.astype(x.dtype), state.reshape(h_BHPN.shape)


def _order(T: int) -> tuple[str, ...]:
  return ('naive',) if T == 1 else ('pallas',) if platform() == 'tpu' else ('chunked',)


SSD = Operation(
  'ssd',
  {
    'naive': ssd_naive,
    'chunked': ssd_chunked,
    # a kernel for TPUs; elsewhere it is interpreted, which is slow
    'pallas': ssd_pallas,
  },
  _order,
)
