"""Translation, from lists of tokens to lists of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.beam import GREEDY_BEAM, Beam, Hypotheses, beam_search
from jaxformer.inference.decoding import bucket, on
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel
from jaxformer.task_type import IGNORE


class Translation(NamedTuple):
  """A translation.

  Attributes:
    tokens: without the token that ends a translation.
    log_p: log p(tokens and end | source), in nats.
    score: log p with the penalties of the search.
    finished: whether it has its end; False where it reached `max_new_tokens`.
  """

  tokens: list[int]
  log_p: float
  score: float
  finished: bool


def translate(
  definition: Definition[EncoderDecoder],
  params: Params,
  sources: Sequence[Sequence[int]],
  *,
  end: int,
  begin: int | None = None,
  beam: Beam = GREEDY_BEAM,
  max_new_tokens: int | None = None,
  batch_size: int = 64,
  vocab_size: int | None = None,
  dtype: Any = None,
  parallel: Parallel | None = None,
) -> list[Translation]:
  """Translate each source; results are in the same order and independent of the batch.

  Args:
    sources: token ids as the model reads them, with the token that ends a source.
    end: the token that ends a translation.
    begin: the token that the decoder reads first; None for `end`.
    beam: how to search; greedy by default.
    max_new_tokens: maximum number of tokens, the end included; None for 2 x source length + 10.
    batch_size: sources per batch; sources of similar lengths are batched together.
    vocab_size: of the tokenizer, where the model's is padded: the rows beyond it are never chosen.
    dtype: compute dtype; None for that of the parameters.
    parallel: mesh and rules of the parameters; None for one device.

  Raises:
    InputError: token ids out of range, an empty source, or more tokens than the model has
      positions.
  """
  config = definition.config
  begin = end if begin is None else begin
  rows = _checked(config, sources, begin, end, max_new_tokens, batch_size, vocab_size)
  if dtype is not None:
    params = definition.cast(params, dtype)
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  found: dict[int, Translation] = {}
  for first in range(0, len(order), batch_size):
    chosen = order[first : first + batch_size]
    filled = [
      rows[chosen[min(b, len(chosen) - 1)]] for b in range(min(batch_size, bucket(len(chosen))))
    ]
    limit_B = np.array(
      [
        max_new_tokens or min(2 * len(row) + 10, config.max_len or 2 * len(row) + 10)
        for row in filled
      ],
      np.int32,
    )
    S, N = (
      min(bucket(int(n)), config.max_len or bucket(int(n)))
      for n in (len(filled[-1]), limit_B.max())
    )
    source_BS = np.full((len(filled), S), IGNORE, np.int32)
    for b, row in enumerate(filled):
      source_BS[b, : len(row)] = row
    with on(parallel):
      best = beam_search(
        definition,
        params,
        source_BS,
        np.int32(begin),
        np.int32(end),
        limit_B,
        beam=beam,
        max_new_tokens=N,
        vocab_size=vocab_size if vocab_size != config.vocab_size else None,
        where=parallel,
      )
    found |= dict(zip(chosen, _first(best, len(chosen)), strict=True))
  return [found[i] for i in range(len(rows))]


def _first(found: Hypotheses, rows: int) -> list[Translation]:
  """The best hypothesis of each row."""
  tokens_BN, log_p_B, score_B, finished_B = (
    np.asarray(a[:, 0])
    for a in (found.tokens_BKN, found.log_p_BK, found.score_BK, found.finished_BK)
  )
  return [
    Translation(
      tokens_BN[b][tokens_BN[b] != IGNORE].tolist(),
      float(log_p_B[b]),
      float(score_B[b]),
      bool(finished_B[b]),
    )
    for b in range(rows)
  ]


def _checked(
  config: EncoderDecoder.Config,
  sources: Sequence[Sequence[int]],
  begin: int,
  end: int,
  max_new_tokens: int | None,
  batch_size: int,
  vocab_size: int | None,
) -> list[list[int]]:
  for name, value in (
    ('max_new_tokens', max_new_tokens),
    ('batch_size', batch_size),
    ('vocab_size', vocab_size),
  ):
    if value is not None and value < 1:
      raise InputError(name, value, 'at least 1')
  for name, token in (('end', end), ('begin', begin)):
    if not 0 <= token < config.vocab_size:
      raise InputError(name, token, f'at least 0 and below the vocabulary of {config.vocab_size}')
  rows = [[int(t) for t in source] for source in sources]
  for i, row in enumerate(rows):
    if not row:
      raise InputError(f'source {i} is empty: give at least the token that ends it')
    if wrong := [t for t in row if not 0 <= t < config.source_vocab_size]:
      raise InputError(
        f'source {i} has token {wrong[0]}: must be at least 0 and below the vocabulary of '
        f'{config.source_vocab_size}'
      )
    if config.max_len is not None and len(row) > config.max_len:
      raise InputError(
        f'source {i} has {len(row)} tokens: must be at most {config.max_len}, the learned '
        'positions of the model'
      )
  if config.max_len is not None and (max_new_tokens or 0) > config.max_len:
    raise InputError(
      'max_new_tokens',
      max_new_tokens,
      f'at most {config.max_len}, the learned positions of the model',
    )
  return rows
