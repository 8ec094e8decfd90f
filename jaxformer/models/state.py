"""What a model remembers while it decodes, in bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.models.params import Definition


def state_bytes(definition: Definition, batch: int, max_len: int, bytes_per_number: int = 2) -> int:
  """Bytes of the decode state of `batch` sequences of up to `max_len` tokens: its floating numbers at `bytes_per_number` each.

  Counters and other integers, a few bytes a layer, are left out. Nothing is allocated.
  """
  state = jax.eval_shape(lambda params: definition.merge(params).init_state(batch, max_len), definition.abstract())
  return bytes_per_number * sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
