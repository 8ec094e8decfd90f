"""Attention of a decoder to the tokens of its source, as a matrix and as a picture."""

import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import InputError
from jaxformer.files import user_path
from jaxformer.inference.decoding import token_ids
from jaxformer.layers.layer import Context
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.params import Definition, Params


@functools.partial(jax.jit, static_argnames='definition')
def _alignments(
  definition: Definition[EncoderDecoder],
  params: Params,
  source_BS: Int[Array, 'B S'],
  tokens_BT: Int[Array, 'B T'],
) -> tuple[Array, ...]:
  return definition.merge(params)(source_BS, tokens_BT, Context(align=True)).alignments


def align(
  definition: Definition[EncoderDecoder],
  params: Params,
  source: Sequence[int],
  target: Sequence[int],
  *,
  begin: int,
) -> Float[np.ndarray, 'L T S']:
  """Return the attention with which each token of a given target was predicted, of each layer that
  attends to the source from the bottom up, as the mean over heads.

  Args:
    source: token ids with the token that ends a source.
    target: token ids without the end; the last row is that of the end.
    begin: the token that the decoder reads first.

  Raises `InputError` for a model without attention to the source, and for ids out of range.
  """
  config = definition.config
  source_ids = token_ids('the source', source, config.source_vocab_size)
  tokens = [begin, *token_ids('the target', target, config.vocab_size)]
  if not source_ids:
    raise InputError('source: is empty; give at least the token that ends it')
  found = _alignments(
    definition, params, jnp.asarray([source_ids], jnp.int32), jnp.asarray([tokens], jnp.int32)
  )
  if not found:
    raise InputError('alignment: the model has no attention to the source')
  return np.stack([np.asarray(a[0]) for a in found])


def draw(
  path: str | os.PathLike,
  weights_TS: Float[np.ndarray, 'T S'],
  source: Sequence[str],
  target: Sequence[str],
) -> None:
  """Write a picture of an alignment, the target from top to bottom and the source from left to
  right (as figure 3 of Bahdanau et al. 2014), in the format of the path's suffix."""
  from matplotlib.figure import Figure

  file = user_path(path, 'out')
  if not file.suffix:
    raise InputError('out', str(path), 'a file whose suffix is a format, as .png, .svg or .pdf')
  if file.exists() and not file.is_file():
    raise InputError('out', str(path), 'a file')
  T, S = weights_TS.shape
  if (len(target), len(source)) != (T, S):
    raise InputError(
      f'an alignment of {T} by {S} tokens needs as many labels, not {len(target)} and {len(source)}'
    )
  figure = Figure(figsize=(2 + 0.28 * S, 1.5 + 0.28 * T), layout='constrained')
  axes = figure.add_subplot()
  axes.imshow(
    weights_TS, cmap='gray', vmin=0.0, vmax=max(1e-6, float(weights_TS.max())), aspect='equal'
  )
  axes.set_xticks(range(S), source, rotation=90)
  axes.set_yticks(range(T), target)
  axes.xaxis.tick_top()
  axes.tick_params(length=0)
  try:
    figure.savefig(file)
  except (OSError, ValueError) as e:
    raise InputError(f'{path}: the picture cannot be written ({e})') from None
