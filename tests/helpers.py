"""What several test files share."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp

from jaxformer.config import Config, forget, types_of
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.ops.implementation import implementation


def forced(f, **names):
  """`f` traced with the implementations of operations that `implementation` would be given."""

  @functools.wraps(f)
  def wrapped(*args, **options):
    with implementation(**names):
      return f(*args, **options)

  return wrapped


@contextlib.contextmanager
def temporary_types():
  """Within, config types may be defined; at the end they leave the registry. Those of the package,
  imported within for the first time, stay."""
  before = types_of(Config)
  try:
    yield
  finally:
    for cls in types_of(Config):
      if cls not in before and not cls.__module__.startswith('jaxformer.'):
        forget(cls)


def state_bytes(definition, batch, max_len, bytes_per_number=2):
  """Bytes of the decode state of `batch` sequences of up to `max_len` tokens: its floating numbers
  at `bytes_per_number` each.

  Of an encoder-decoder, sources too have `max_len` tokens. Counters and other integers, a few bytes
  a layer, are left out. Nothing is allocated."""

  def init(params):
    model = definition.merge(params)
    if isinstance(model, EncoderDecoder):
      return model.init_state(model.encode(jnp.zeros((batch, max_len), jnp.int32)), max_len)
    return model.init_state(batch, max_len)

  state = jax.eval_shape(init, definition.abstract())
  return bytes_per_number * sum(
    leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
