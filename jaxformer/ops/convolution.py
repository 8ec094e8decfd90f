"""The short causal convolution in front of a recurrence (Gu and Dao 2023, Mamba; Fu et al. 2023,
H3)."""

from __future__ import annotations

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
  (B, T, D), J = x_BTD.shape, w_KD.shape[0] - 1
  inputs = jnp.concatenate([before_BJD, x_BTD], axis=1)
  # whether a border lies within the last `back` steps
  cut = jnp.zeros((B, T), bool)
  y, after = jnp.zeros((), jnp.float32), []
  for back in range(J + 1):
    shifted = inputs[:, J - back : J - back + T]
    weight = w_KD[J - back].astype(jnp.float32).reshape(1, 1, D)
    y = y + jnp.where(cut[..., None], 0.0, shifted.astype(jnp.float32)) * weight
    if back < J:
      after.append(jnp.where(cut[:, -1:], jnp.zeros((), x_BTD.dtype), inputs[:, T + J - 1 - back]))
      cut = starts_BT | jnp.pad(cut[:, :-1], ((0, 0), (1, 0)))
  if b_D is not None:
    y = y + b_D.astype(jnp.float32).reshape(1, 1, D)
  return y.astype(x_BTD.dtype), jnp.stack(after[::-1], axis=1) if after else before_BJD
