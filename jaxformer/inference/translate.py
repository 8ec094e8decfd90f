"""Translation, from lists of tokens to lists of tokens."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.beam import GREEDY_BEAM, Beam, Hypotheses, beam_search
from jaxformer.inference.decoding import bucket, check_positive, check_state, token_ids
from jaxformer.inference.finite import require_finite
from jaxformer.inference.token_rules import FREE, TokenRules
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel, use_mesh
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
  sources: Sequence[Sequence[int] | np.ndarray],
  *,
  end: int,
  begin: int | None = None,
  beam: Beam = GREEDY_BEAM,
  max_new_tokens: int | None = None,
  max_length: int | None = None,
  batch_size: int = 64,
  vocab_size: int | None = None,
  rules: TokenRules = FREE,
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
    max_length: limits that default, the token that the decoder reads first included; None for none.
    batch_size: sources per batch; sources of similar lengths are batched together.
    vocab_size: of the tokenizer, where the model's is padded: the rows beyond it are never chosen.
    rules: of which tokens may come, and which end a translation besides `end`.
    dtype: compute dtype; None for that of the parameters.
    parallel: mesh and rules of the parameters; None for one device.

  Raises:
    InputError: token ids out of range, an empty source, or more tokens than the model has
      positions.
    NotFiniteError: logits that are not finite.
  """
  config = definition.config
  begin = end if begin is None else begin
  check_positive(
    max_new_tokens=max_new_tokens,
    max_length=max_length,
    batch_size=batch_size,
    vocab_size=vocab_size,
  )
  config.check_length(max_new_tokens or 0)
  rules.check(config.vocab_size)
  for name, token in (('end', end), ('begin', begin)):
    if not 0 <= token < config.vocab_size:
      raise InputError(name, token, f'at least 0 and below the vocabulary of {config.vocab_size}')
  rows = []
  for i, source in enumerate(sources):
    rows.append(token_ids(f'source {i}', source, config.source_vocab_size))
    config.check_length(len(rows[i]))
    if not rows[i]:
      raise InputError(f'source {i} is empty: give at least the token that ends it')
  if dtype is not None:
    params = definition.cast(params, dtype)

  def most(n: int) -> int:
    return min(n, config.max_len or sys.maxsize)

  def default(source: int) -> int:
    return most(min(2 * source + 10, max(1, (max_length or sys.maxsize) - 1)))

  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  found: dict[int, Translation] = {}
  for first in range(0, len(order), batch_size):
    chosen = order[first : first + batch_size]
    # the last source again, so that batches of similar sizes share a program
    again = [chosen[-1]] * (min(batch_size, bucket(len(chosen))) - len(chosen))
    filled = [rows[i] for i in chosen + again]
    limit_B = np.array([max_new_tokens or default(len(row)) for row in filled], np.int32)
    source_BS = np.full((len(filled), most(bucket(len(filled[-1])))), IGNORE, np.int32)
    for b, row in enumerate(filled):
      source_BS[b, : len(row)] = row
    room = most(bucket(int(limit_B.max())))
    _check_memory(config, len(filled), beam.width, room, parallel)
    with use_mesh(parallel):
      ranked = beam_search(
        definition,
        params,
        source_BS,
        np.int32(begin),
        np.int32(end),
        limit_B,
        beam=beam,
        max_new_tokens=room,
        vocab_size=vocab_size,
        rules=rules,
        where=parallel,
      )
    found |= zip(chosen, _best(ranked, params, len(chosen)), strict=True)
  return [found[i] for i in range(len(rows))]


def _best(ranked: Hypotheses, params: Params, count: int) -> list[Translation]:
  """The best hypothesis of each of the first `count` sources. Raises `NotFiniteError`."""
  # log p is NaN from the first logits that are not finite on
  require_finite('logits', ~np.isnan(ranked.log_p_BK[:count]), params)
  best = jax.tree.map(lambda a: np.asarray(a[:count, 0]), ranked)  # of the beam
  values = best.tokens_BKN, best.log_p_BK, best.score_BK, best.finished_BK
  return [
    Translation(tokens[tokens != IGNORE].tolist(), float(log_p), float(score), bool(finished))
    for tokens, log_p, score, finished in zip(*values, strict=True)
  ]


def _check_memory(
  config: EncoderDecoder.Config, sources: int, width: int, room: int, parallel: Parallel | None
) -> None:
  """Raises `InputError` for a search that does not fit the memory of the devices."""
  rows, given = sources * width, {'max_new_tokens': room} if width == 1 else {'beam': width}
  scores = 0 if width == 1 else 4 * rows * config.vocab_size  # a beam is sorted at once
  check_state(config, rows, room, parallel, scores, **given)
