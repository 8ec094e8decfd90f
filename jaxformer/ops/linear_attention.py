"""Linear attention with decay: a matrix state per head that each token decays, adds to and reads.

  S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  y_t = q_t^T S_t

With decays that depend on the token and the key channel this is gated linear attention (Yang et al.
2024, section 4); with one fixed decay per head it is retention (Sun et al. 2023, eq. 6).

Neither has a chunk form of its own. Fixed decays are those of state-space duality with a step size
of 1 (`ops.ssd`), whose weights of pairs of tokens are one matrix per head; other decays are those
of WKV-6 (`ops.wkv6`). Both sum logarithms over the tokens concerned, so that no decay overflows,
however strong. Which implementation runs, on one device or with time sharded over several, is
chosen there.

Dims: B batch, T time, H heads, K key, V value dim of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.ops.ssd import ssd
from jaxformer.ops.wkv6 import wkv6


def linear_attention(
  q: Float[Array, 'B T H K'],
  k: Float[Array, 'B T H K'],
  v: Float[Array, 'B T H V'],
  log_decay: Float[Array, '#B #T H #K'],
  state: Float[Array, 'B H K V'] | None,
  starts_BT: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T H V'], Float[Array, 'B H K V']]:
  """y, in the dtype of v, and the state after the last token, in fp32.

  Args:
    log_decay: at most 0, however negative; of size 1 in K where a head has one decay, and in B and
      T too where it is the same for all tokens.
    state: None for zeros.
    starts_BT: where a packed document starts: the state is zero before that token.
  """
  if log_decay.shape[0] == log_decay.shape[1] == log_decay.shape[3] == 1:
    return _fixed(q, k, v, log_decay.reshape(-1), state, starts_BT)
  log_decay = jnp.broadcast_to(log_decay, (*log_decay.shape[:3], k.shape[3]))
  return wkv6(q, k, v, log_decay, None, state, starts_BT)


def _fixed(q, k, v, log_decay_H, state, starts_BT):
  # A constant array of all positions would be added up by XLA while it compiles.
  ones = jax.lax.optimization_barrier(jnp.ones(v.shape[:3], jnp.float32))
  before = None if state is None else jnp.swapaxes(state, 2, 3)
  y, after = ssd(v, ones, log_decay_H, k, q, jnp.zeros_like(log_decay_H), before, starts_BT)
  return y, jnp.swapaxes(after, 2, 3)
