"""The size of the decoding state, in bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.params import Definition


def state_bytes(definition: Definition, batch: int, max_len: int, bytes_per_number: int = 2) -> int:
  """Bytes of the decode state of `batch` sequences of up to `max_len` tokens: its floating numbers
  at `bytes_per_number` each.

  Of an encoder-decoder, sources too have `max_len` tokens. Counters and other integers, a few bytes
  a layer, are left out. Nothing is allocated."""

  def init(params):
    model: Any = definition.merge(params)
    if isinstance(model, EncoderDecoder):
      return model.init_state(model.encode(jnp.zeros((batch, max_len), jnp.int32)), max_len)
    return model.init_state(batch, max_len)

  state = jax.eval_shape(init, definition.abstract())
  return bytes_per_number * sum(
    leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
