"""The short causal convolution in front of a recurrence (Gu and Dao 2023, Mamba; Fu et al. 2023,
H3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.sequence_parallel import from_last_shard, from_previous_shard, time_axes
from jaxformer.sharding import per_shard, shards


def short_convolution(
  x_BTD: Float[Array, 'B T D'],
  w_KD: Float[Array, 'K D'],
  b_D: Float[Array, ' D'] | None,
  before_BJD: Float[Array, 'B J D'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B J D']]:
  """y_t = b + sum_k w_k x_{t-K+1+k} in each channel: the last of the K weights is that of the
  present input.

  A sum of K shifted products, which XLA fuses; a grouped convolution with one channel per group
  would be slow. Summed in fp32.

  Args:
    x_BTD: inputs.
    w_KD: the kernel, from the oldest input to the present one.
    b_D: bias; None for none.
    before_BJD: the J = K - 1 inputs before these, zeros where there were none; None for zeros.
    starts_BT: where a document starts; the kernel does not reach back across such a border.

  Returns:
    y, like x; and the last J inputs, for the next call: zeros in place of those of an earlier
    document.
  """
  (B, T, D), J = x_BTD.shape, w_KD.shape[0] - 1
  before = jnp.zeros((B, J, D)) if before_BJD is None else before_BJD
  arrays, axes = (x_BTD, w_KD, b_D, before.astype(x_BTD.dtype), starts_BT), time_axes(T)
  if not axes or not 0 < J <= T // shards('time', T):
    return _convolve(*arrays)

  def shard(x_BTD, w_KD, b_D, before_BJD, starts_BT):
    after = _convolve(x_BTD, w_KD, b_D, jnp.zeros_like(before_BJD), starts_BT)[1]
    y, _ = _convolve(x_BTD, w_KD, b_D, from_previous_shard(after, before_BJD, axes), starts_BT)
    return y, from_last_shard(after, axes)

  wide, state = ('batch', 'time', 'inner'), ('batch', None, 'inner')
  mapped = per_shard(shard, (wide, (None, 'inner'), ('inner',), state, wide[:2]), wide, state)
  return mapped(*arrays)


def _convolve(x_BTD, w_KD, b_D, before_BJD, starts_BT):
  J = w_KD.shape[0] - 1
  y = _sum(x_BTD, w_KD, b_D, before_BJD, starts_BT)
  if not J:
    return y, before_BJD
  inputs = jnp.concatenate([before_BJD, x_BTD[:, -J:]], axis=1)[:, -J:]
  after = [
    jnp.where(cut[:, -1:], jnp.zeros((), x_BTD.dtype), inputs[:, J - 1 - back])
    for back, cut in enumerate(_cuts(starts_BT, J)[:J])
  ]
  return y, jnp.stack(after[::-1], axis=1)


def _cuts(starts_BT, J: int):
  """For 0, 1, ... J steps back, where a border lies within the last so many steps."""
  cuts = [jnp.zeros(starts_BT.shape, bool)]
  for _ in range(J):
    cuts.append(starts_BT | jnp.pad(cuts[-1][:, :-1], ((0, 0), (1, 0))))
  return cuts


def _shifted(x_BTD, before_BJD, back: int):
  """x of `back` steps before, in fp32."""
  (T, J), inputs = (x_BTD.shape[1], before_BJD.shape[1]), (before_BJD, x_BTD)
  return jnp.concatenate(inputs, axis=1)[:, J - back : J - back + T].astype(jnp.float32)


@jax.custom_vjp
def _sum(x_BTD, w_KD, b_D, before_BJD, starts_BT):
  """y. Its gradient is written out, so that a shifted copy of it for every weight is neither stored
  nor rounded to the dtype of x."""
  D, J = x_BTD.shape[-1], w_KD.shape[0] - 1
  y = jnp.zeros((), jnp.float32)
  for back, cut in enumerate(_cuts(starts_BT, J)):
    weight = w_KD[J - back].astype(jnp.float32).reshape(1, 1, D)
    y = y + jnp.where(cut[..., None], 0.0, _shifted(x_BTD, before_BJD, back)) * weight
  if b_D is not None:
    y = y + b_D.astype(jnp.float32).reshape(1, 1, D)
  return y.astype(x_BTD.dtype)


def _sum_backward(saved, dy_BTD):
  x_BTD, w_KD, b_D, before_BJD, starts_BT = saved
  D, J, dy = x_BTD.shape[-1], w_KD.shape[0] - 1, dy_BTD.astype(jnp.float32)
  dx, dbefore, dw = jnp.zeros((), jnp.float32), jnp.zeros(before_BJD.shape, jnp.float32), []
  for back, cut in enumerate(_cuts(starts_BT, J)):
    weight = w_KD[J - back].astype(jnp.float32).reshape(1, 1, D)
    dw.append(
      jnp.sum(jnp.where(cut[..., None], 0.0, _shifted(x_BTD, before_BJD, back)) * dy, axis=(0, 1))
    )
    # the gradient of the step `back` steps later
    later = jnp.pad(dy_BTD, ((0, 0), (0, back), (0, 0)))[:, back:].astype(jnp.float32)
    apart = jnp.pad(cut, ((0, 0), (0, back)))[:, back:]
    dx = dx + jnp.where(apart[..., None], 0.0, later) * weight
    first = jnp.where(cut[:, :back, None], 0.0, dy[:, :back]) * weight
    dbefore = dbefore.at[:, J - back : J - back + first.shape[1]].add(first)
  db = None if b_D is None else jnp.sum(dy, axis=(0, 1)).astype(b_D.dtype)
  dw_KD = jnp.stack(dw[::-1]).astype(w_KD.dtype)
  return dx.astype(x_BTD.dtype), dw_KD, db, dbefore.astype(before_BJD.dtype), None


_sum.defvjp(lambda *saved: (_sum(*saved), saved), _sum_backward)
