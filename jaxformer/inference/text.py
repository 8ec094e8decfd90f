"""Continuations as text, streamed, with stop strings."""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.decoding import Generated, Request, check_positive
from jaxformer.task_type import IGNORE

DecodeBytes = Callable[[Iterable[int]], bytes]  # a tokenizer's `decode_bytes`

CHUNK = 16  # tokens decoded per host sync
# tokens detokenized along with the new ones: of some tokenizers, text depends on the one before
BEFORE = 8
UNKNOWN = '\ufffd'.encode()


class TextRow:
  """The text of one row, from tokens that arrive one at a time.

  Holds back bytes of an incomplete character, and text that could be the start of a stop string.
  The stop string that is completed first ends the text (of two that end together, the longer), so
  the text does not depend on how tokens are grouped."""

  def __init__(self, prompt: Sequence[int], decode_bytes: DecodeBytes, stops: Sequence[str]):
    self.tokens: list[int] = []
    self.stopped = self.ended = False  # by a stop string; by the end of document
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


def stream(
  r: Request, decode_bytes: DecodeBytes, *, stop: Sequence[str] = (), chunk: int = CHUNK
) -> Iterator[list[str]]:
  """Stream the continuations of a `request`: each iteration yields a piece of text for each row, ''
  where there is nothing new.

  The tokens are those of `generate`. A row ends before a string of `stop`, at the end of document
  or after `max_new_tokens`. Errors are raised by the call, not by the first iteration.

  Args:
    decode_bytes: the tokenizer's: the bytes of a sequence of tokens.
    stop: strings that end a row; they are not part of the text.
    chunk: tokens decoded per host sync, that is per iteration.
  """
  return _pieces(r, _rows(r, decode_bytes, stop, chunk), chunk)


def generate_text(
  r: Request, decode_bytes: DecodeBytes, *, stop: Sequence[str] = (), chunk: int = CHUNK
) -> list[Generated]:
  """Return the complete continuations that `stream` yields in pieces."""
  rows = _rows(r, decode_bytes, stop, chunk)
  texts = zip(*_pieces(r, rows, chunk if stop else r.max_new_tokens))
  return [
    Generated(row.tokens, row.stopped or row.ended, ''.join(pieces))
    for pieces, row in zip(texts, rows, strict=True)
  ]


def _rows(r: Request, decode_bytes: DecodeBytes, stop: Sequence[str], chunk: int) -> list[TextRow]:
  if isinstance(stop, str) or not all(stop):
    raise InputError('stop', stop, 'a list of strings, none of them empty')
  check_positive(chunk=chunk)
  return [TextRow(prompt, decode_bytes, stop) for prompt in r.prompts]


def _pieces(r: Request, rows: list[TextRow], chunk: int) -> Iterator[list[str]]:
  """Run the loop chunk by chunk."""
  decoding, done, open_B = r.begin(), 0, np.ones(len(rows), bool)
  while open_B.any():
    decoding = r.advance(decoding, done + chunk)
    tokens_BN, ended_B = np.asarray(decoding.tokens_BN), np.asarray(decoding.finished_B)
    count = int(decoding.count)
    pieces = [''] * len(rows)
    for i in np.flatnonzero(open_B):
      row, new = rows[i], tokens_BN[i, done:count]
      pieces[i] = ''.join(row.push(int(t)) for t in new[new != IGNORE])
      row.ended = bool(ended_B[i])
      if row.ended or row.stopped or count >= r.max_new_tokens:
        pieces[i] += row.close()
        open_B[i] = False
    done = count
    yield pieces
    if any(row.stopped for row in rows):  # the loop need not wait for them
      decoding = dataclasses.replace(decoding, finished_B=decoding.finished_B | ~open_B)
