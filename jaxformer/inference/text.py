"""Continuations as text, streamed, with stop strings."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.decoding import Decoding, Request, request
from jaxformer.inference.sampling import Sampling
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel
from jaxformer.task_type import IGNORE

DecodeBytes = Callable[[Iterable[int]], bytes]  # a tokenizer's `decode_bytes`

CHUNK = 16  # tokens decoded per host sync
# tokens detokenized along with the new ones: of some tokenizers, text depends on the one before
BEFORE = 8
UNKNOWN = '\ufffd'.encode()


class GeneratedText(NamedTuple):
  """A continuation.

  Attributes:
    text: up to the stop string, if there is one.
    tokens: all new tokens up to the one that completed the stop string, without the end of
      document.
    finished: whether it has a stop string or the end of document; False where `max_new_tokens` was
      reached.
  """

  text: str
  tokens: list[int]
  finished: bool


class TextRow:
  """The text of one row, from tokens that arrive one at a time.

  Holds back bytes of an incomplete character, and text that could be the start of a stop string.
  The stop string that is completed first ends the text (of two that end together, the longer), so
  the text does not depend on how tokens are grouped."""

  def __init__(self, prompt: Sequence[int], decode_bytes: DecodeBytes, stops: Sequence[str]):
    self.tokens: list[int] = []
    self.stopped = False
    self._decode, self._stops = decode_bytes, stops
    self._ids = list(prompt[-BEFORE:])
    # where the tokens to detokenize start, and those not yet written
    self._window, self._read = 0, len(self._ids)
    self._characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._held = ''

  def push(self, token: int) -> str:
    """Return the text that is certain after this token."""
    if self.stopped:
      return ''
    self.tokens.append(token)
    self._ids.append(token)
    return self._certain(self._characters.decode(self._new_bytes(final=False)))

  def close(self) -> str:
    """Return the text that was held back, at the end of the row."""
    if self.stopped:
      return ''
    text = self._certain(self._characters.decode(self._new_bytes(final=True), final=True))
    rest, self._held = self._held, ''
    return text if self.stopped else text + rest

  def _new_bytes(self, final: bool) -> bytes:
    """The bytes that the unread tokens add. Tokenizers that are not byte-level write an
    incomplete character as U+FFFD: except at the `final` call, these wait for the rest."""
    before = self._decode(self._ids[self._window : self._read])
    new = self._decode(self._ids[self._window :])[len(before) :]
    if not new or (new.endswith(UNKNOWN) and not final):
      return b''
    self._window, self._read = max(self._window, self._read - BEFORE), len(self._ids)
    return new

  def _certain(self, text: str) -> str:
    self._held += text
    found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
    if found:
      self.stopped = True
      at = min(found)[1]
      text, self._held = self._held[:at], ''
      return text
    keep = max(
      (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
      default=0,
    )
    text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
    return text


class Options(TypedDict, total=False):
  """Keyword arguments that `stream` and `generate_text` pass on; see
  `jaxformer.inference.generate.generate`."""

  sampling: Sampling
  seed: int
  end_of_document: int | None
  dtype: Any
  max_len: int | None
  parallel: Parallel | None
  vocab_size: int | None


def stream(
  definition: Definition[LanguageModel],
  params: Params,
  prompts: Sequence[Sequence[int]],
  decode_bytes: DecodeBytes,
  *,
  max_new_tokens: int,
  stop: Sequence[str] = (),
  chunk: int = CHUNK,
  **options: Unpack[Options],
) -> Iterator[list[str]]:
  """Stream continuations: each iteration yields a piece of text for each row, '' where there is
  nothing new.

  The tokens are those of `generate`, which documents the other arguments and the errors; errors are
  raised by the call, not by the first iteration. A row ends before a string of `stop`, at the end
  of document or after `max_new_tokens`.

  Args:
    decode_bytes: the tokenizer's: the bytes of a sequence of tokens.
    stop: strings that end a row; they are not part of the text.
    chunk: tokens decoded per host sync, that is per iteration.
  """
  r = _checked(definition, params, prompts, max_new_tokens, stop, chunk, options)
  rows = _rows(prompts, decode_bytes, stop)
  return _pieces(r, rows, chunk, np.zeros(len(rows), bool))


def generate_text(
  definition: Definition[LanguageModel],
  params: Params,
  prompts: Sequence[Sequence[int]],
  decode_bytes: DecodeBytes,
  *,
  max_new_tokens: int,
  stop: Sequence[str] = (),
  chunk: int = CHUNK,
  **options: Unpack[Options],
) -> list[GeneratedText]:
  """Return the complete continuations that `stream` yields in pieces."""
  r = _checked(definition, params, prompts, max_new_tokens, stop, chunk, options)
  rows, finished = _rows(prompts, decode_bytes, stop), np.zeros(len(prompts), bool)
  texts = zip(*_pieces(r, rows, chunk if stop else max_new_tokens, finished))
  return [
    GeneratedText(''.join(pieces), row.tokens, bool(f))
    for pieces, row, f in zip(texts, rows, finished, strict=True)
  ]


def _checked(
  definition,
  params,
  prompts,
  max_new_tokens: int,
  stop: Sequence[str],
  chunk: int,
  options: Options,
) -> Request:
  if isinstance(stop, str) or not all(stop):
    raise InputError('stop', stop, 'a list of strings, none of them empty')
  if chunk < 1:
    raise InputError('chunk', chunk, 'at least 1')
  return request(definition, params, prompts, max_new_tokens=max_new_tokens, **options)


def _rows(
  prompts: Sequence[Sequence[int]], decode_bytes: DecodeBytes, stop: Sequence[str]
) -> list[TextRow]:
  return [TextRow(prompt, decode_bytes, stop) for prompt in prompts]


def _pieces(
  r: Request, rows: list[TextRow], chunk: int, finished_B: np.ndarray
) -> Iterator[list[str]]:
  """Run the loop chunk by chunk. `finished_B` is filled in."""
  decoding, done, open_B = r.begin(), 0, np.ones(len(rows), bool)
  while open_B.any():
    decoding = r.advance(decoding, done + chunk)
    tokens_BN, ended_B, count = (
      np.asarray(decoding.tokens_BN),
      np.asarray(decoding.finished_B),
      int(decoding.count),
    )
    pieces = []
    for i, row in enumerate(rows):
      piece = ''
      if open_B[i]:
        new = tokens_BN[i, done:count]
        piece = ''.join(row.push(int(t)) for t in new[new != IGNORE] if not row.stopped)
        if ended_B[i] or row.stopped or count >= r.max_new_tokens:
          piece += row.close()
          finished_B[i], open_B[i] = ended_B[i] or row.stopped, False
      pieces.append(piece)
    done = count
    yield pieces
    if any(row.stopped for row in rows):
      decoding = _ended(decoding, ~open_B)


def _ended(decoding: Decoding, ended_B: np.ndarray) -> Decoding:
  """Mark rows as finished whose text has ended: the loop need not wait for them."""
  return dataclasses.replace(decoding, finished_B=decoding.finished_B | jnp.asarray(ended_B))
