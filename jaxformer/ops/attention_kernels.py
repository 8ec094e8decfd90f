"""Attention by the kernels of others: XLA's composition, cuDNN on a GPU, splash attention on a TPU.

Each function has the arguments of `attention_naive`, and beside it stands the function that says
why it does not support a case, in words, or None where it does.

Dims: B batch, T queries, S keys, H query heads, G key/value heads, K head dim. `v_dim` is the head
dim of the values, None for K.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxformer import sharding
from jaxformer.ops.attention_chunked import SAVED
from jaxformer.ops.masks import Mask

AS_KERNEL = 'as_kernel'  # name of a jitted function that stands for a kernel in a trace
_LANES = 128
# The fused backward kernel saves two products in seven and writes one dq per block of keys: memory
# that grows with the square of the length. Above four blocks (T = 8192, B4 H16 K128: 1,413 MiB
# against 775) dq has a separate kernel.
_FUSED_BLOCKS = 4


def _window(mask: Mask) -> tuple[int, int] | None:
  """How many positions a query sees to its left and to its right."""
  return None if mask.window is None else (mask.window - 1, 0 if mask.causal else mask.window - 1)


def xla_unsupported(
  q, k, mask: Mask, softcap=None, slopes_H=None, sinks_H=None, v_dim: int | None = None
) -> str | None:
  if v_dim not in (None, q.shape[-1]):
    return f'it takes values of the head dim of queries and keys, {q.shape[-1]}, not {v_dim}'
  if softcap is not None or slopes_H is not None:
    return 'it has no soft cap and no ALiBi'
  if sinks_H is not None:
    return 'it has no sinks, and no gradient of the logsumexp that they could be computed from'
  if not mask.aligned or mask.segments_BT is not None:
    return 'it takes no segments and no positions'
  return None


def attention_xla(q, k, v, mask: Mask, *, scale, implementation='xla', **absent):
  """`jax.nn.dot_product_attention`. The structure of the mask is passed as arguments, since an
  explicit mask array makes cuDNN several times slower."""
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    is_causal=mask.causal,
    local_window_size=_window(mask),
    implementation=implementation,
  )


def attention_cudnn(q, k, v, mask: Mask, *, scale, **absent):
  """`jax.nn.dot_product_attention` by cuDNN. JAX traces it only where cuDNN is installed, so a
  program of an assumed platform has `_as_cudnn` in its place."""
  if sharding.platform_is_assumed():
    return _as_cudnn(q, k, v, mask, scale)
  return attention_xla(q, k, v, mask, scale=scale, implementation='cudnn')


def _as_cudnn(q, k, v, mask: Mask, scale: float):
  """The function of cuDNN by XLA, with the residuals of cuDNN: q, k, v, the output, and one
  statistic per query and head in fp32 (`_dot_product_attention_fwd_rule` in JAX's
  `cudnn/fused_attention_stablehlo.py`). The forward function is one jitted function of the name
  `AS_KERNEL`, since the kernel holds none of its inner arrays, such as the logits."""

  def as_kernel(q, k, v):
    return attention_xla(q, k, v, mask, scale=scale)

  assert as_kernel.__name__ == AS_KERNEL
  plain = jax.jit(as_kernel)

  def forward(q, k, v):
    out = plain(q, k, v)
    B, T, H, K = q.shape
    a = jnp.einsum('BTGRK,BSGK->BGRTS', q.reshape(B, T, k.shape[2], -1, K), k).reshape(B, H, T, -1)
    seen = mask.dense(T, k.shape[1])[:, None]
    a = jnp.where(seen, scale * a.astype(jnp.float32), -jnp.inf)
    return out, (q, k, v, jax.nn.logsumexp(a, axis=-1), out)

  def backward(kept, do):
    q, k, v, _, _ = kept
    return jax.vjp(plain, q, k, v)[1](do)

  run = jax.custom_vjp(plain)
  run.defvjp(forward, backward)
  return run(q, k, v)


def cudnn_unsupported(q, k, mask: Mask, **options) -> str | None:
  """Head dims of 256 need a Hopper GPU, which shapes do not show, so 128 is the limit here."""
  if (platform := sharding.platform()) != 'gpu':
    return f'it runs on a GPU, not on a {platform}'
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f'it takes bfloat16 and float16, not {q.dtype}'
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f'it takes head dims that are multiples of 8 up to 128, not {q.shape[-1]}'
  if mask.window is not None and not mask.causal:
    return 'its window needs a causal mask'
  if mask.causal and q.shape[1] != k.shape[1]:
    return 'its causal mask needs as many keys as queries'
  return xla_unsupported(q, k, mask, **options)


def splash_unsupported(
  q, k, mask: Mask, softcap=None, slopes_H=None, sinks_H=None, v_dim: int | None = None
) -> str | None:
  T, S = q.shape[1], k.shape[1]
  if (platform := sharding.platform()) != 'tpu':
    return f'it runs on a TPU, not on a {platform}'
  if slopes_H is not None:
    return 'it has no ALiBi'
  if (
    not mask.aligned
    or mask.key_segments_BS is not None
    or (mask.segments_BT is not None and T != S)
  ):
    return 'it needs keys and queries at the same positions'
  if mask.causal and T != S:
    return 'its causal mask needs as many keys as queries'
  parts = sharding.shards('time', T)
  if parts > 1 and mask.segments_BT is None and T != S:
    return 'it needs all queries of a sequence on one device'
  if T % (parts * _LANES) or S % _LANES:
    return f'it needs lengths that are multiples of {_LANES}, not {T // parts} and {S}'
  return None


def _block(size: int) -> int:
  """The largest block of whole lanes, at most 1024, that divides `size`."""
  return next(b for b in range(min(size, 1024), 0, -_LANES) if size % b == 0)


def attention_splash(
  q, k, v, mask: Mask, *, scale, softcap=None, slopes_H=None, sinks_H=None, interpret=False
):
  """Splash attention, the block-sparse flash attention kernel of JAX (Dao 2023). It saves output
  and logsumexp under the name `SAVED`. The scale is applied to q, in fp32 and rounded back."""
  order = np.arange(q.shape[1])[None]
  options = {'scale': scale, 'softcap': softcap, 'sinks_H': sinks_H, 'interpret': interpret}
  return splash_part(q, k, v, mask, order, 0, segments_BS=mask.segments_BT, **options)


@jax.custom_vjp
def _with_own_dtype(x):
  """x, and a gradient of its dtype: up to JAX 0.10 splash returns that of sinks in the dtype of q,
  summed from products that are rounded to it."""
  return x


_with_own_dtype.defvjp(lambda x: (x, x), lambda x, g: (g.astype(x.dtype),))


def splash_part(
  q,
  k,
  v,
  mask: Mask,
  order_nT: np.ndarray,
  part: Array | int,
  *,
  segments_BS,
  scale,
  softcap=None,
  sinks_H=None,
  interpret=False,
):
  """Splash attention for one of n parts of the queries, with all keys.

  Args:
    mask: of all queries, but with the segments of those of the part.
    order_nT: the positions of the queries of every part, which are multiples of 128 many.
    part: which one, a number that may be traced.
    segments_BS: of the keys; None if the mask has none.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  (n, T), H, S = order_nT.shape, q.shape[2], k.shape[1]
  window = _window(mask)
  if window is None and not mask.causal:
    n, one = 1, masks.FullMask((T, S))  # the same for all parts
  else:
    one = (
      masks.CausalMask((n * T, S))
      if window is None
      else masks.LocalMask((n * T, S), window_size=window, offset=0)
    )
    one.q_sequence = order_nT.reshape(-1).astype(np.int32)
  bq, bk = _block(T), _block(S)
  fused = S // bk <= _FUSED_BLOCKS
  sizes = kernels.BlockSizes(
    block_q=bq,
    block_kv=bk,
    block_q_dkv=bq,
    block_kv_dkv=bk,
    use_fused_bwd_kernel=fused,
    block_q_dq=None if fused else bq,
    block_kv_dq=None if fused else bk,
  )
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([one] * H),
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
    head_shards=1,
    q_seq_shards=n,
  )
  if n > 1:
    # Queries lie along the only axis of `q_sequence`, and along the second of what says of blocks,
    # `[heads, queries, keys]`, which to compute.
    def own(x):
      if not x.ndim:
        return x
      axis = min(x.ndim - 1, 1)
      size = x.shape[axis] // n
      return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)

    kernel = jax.tree.map(own, kernel)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  segments = mask.segments_BT
  ids = None if segments is None else kernels.SegmentIds(segments, segments_BS)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  run = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
  sinks_H = None if sinks_H is None else _with_own_dtype(sinks_H)
  return run(q, k, v, ids, sinks_H).swapaxes(1, 2)
