"""Continuations as text, streamed, with stop strings."""

import codecs
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.decoding import Generated, Request, check_positive, generate
from jaxformer.task_type import IGNORE

DecodeBytes = Callable[[Iterable[int]], bytes]  # a tokenizer's `decode_bytes`

CHUNK = 16  # tokens decoded per host sync
UNKNOWN = '\ufffd'.encode()
# Tokens after which text that still ends in U+FFFD is taken as it is: a character has at most four
# bytes, and tokens without text (special ones) may come between them.
WAIT = 16


class TextRow:
  """The text of one row, from tokens that arrive one at a time.

  The pieces, joined, are the text of the prompt and the new tokens, decoded as one sequence, from
  the length of the prompt's text on. (A character that the prompt begins counts as the prompt's.)
  The text of a token can depend on those before it: sentencepiece writes no space at the start of a
  text, and a run of byte tokens is text only as a whole. So new tokens are decoded together with
  the tokens of the piece before, which began where a character began.

  One case differs. Decoders with byte fallback write U+FFFD for each byte of a run of byte tokens
  that is not valid UTF-8 as a whole, also for its valid characters; here the characters that were
  complete before the first invalid byte are written already and stay, and each further byte is
  U+FFFD. Characters can come again after `WAIT` tokens of the run.

  Holds back bytes of an incomplete character, and text that could be the start of a stop string.
  The stop string that is completed first ends the text (of two that end together, the longer), so
  the text does not depend on how tokens are grouped."""

  def __init__(self, prompt: Sequence[int], decode_bytes: DecodeBytes, stops: Sequence[str]):
    self.tokens: list[int] = []
    self.stopped = self.ended = False  # by a stop string; by the end of document
    self._decode, self._stops = decode_bytes, stops
    # The tokens since the start of the piece before, of which the first `_read` are written, and
    # the bytes of those. The next piece is decoded with the tokens from `_start` on.
    self._ids, self._read = list(prompt), len(prompt)
    self._before = decode_bytes(self._ids)
    self._start = self._read
    if self._before.endswith(UNKNOWN):
      counts = range(self._read - 1, max(self._read - WAIT, 0) - 1, -1)
      self._start = next(filter(self._complete, counts), self._read)
    self._characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._characters.decode(self._before)
    # characters that are the prompt's, though they are complete only with the first new tokens
    self._skip = 1 if self._characters.getstate()[0] else 0
    self._held = ''

  def push(self, token: int) -> str:
    """Return the text that is certain after this token."""
    if self.stopped:
      return ''
    self.tokens.append(token)
    self._ids.append(token)
    return self._certain(self._new_text(final=False))

  def rest(self, tokens: Iterable[int]) -> str:
    """Return the text that these last tokens add, decoded at once."""
    new = list(tokens)
    self.tokens += new
    self._ids += new
    return self.close()

  def close(self) -> str:
    """Return the text that was held back, at the end of the row."""
    if self.stopped:
      return ''
    text = self._certain(self._new_text(final=True))
    rest, self._held = self._held, ''
    return text if self.stopped else text + rest

  def _new_text(self, final: bool) -> str:
    """The text that the unread tokens add. Tokenizers that are not byte-level write an incomplete
    character as U+FFFD: except at the `final` call, these wait for the rest."""
    now = self._decode(self._ids)
    waits = now.endswith(UNKNOWN) and len(self._ids) - self._read < WAIT
    new = now[self._written(now) :] if final or not waits else b''
    if new:
      self._ids = self._ids[self._start :]
      self._start = self._read = len(self._ids)
      self._before = self._decode(self._ids)
    text = self._characters.decode(new, final=final)
    skipped, text = text[: self._skip], text[self._skip :]
    self._skip -= len(skipped)
    return text

  def _complete(self, count: int) -> bool:
    """Whether the first tokens end with a whole character."""
    return not self._decode(self._ids[:count]).endswith(UNKNOWN)

  def _written(self, now: bytes) -> int:
    """The bytes of `now`, the text of all tokens, that are written."""
    if now.startswith(self._before):
      return len(self._before)
    # The last run of byte tokens goes on.
    before, text = self._before.decode('utf-8', 'replace'), now.decode('utf-8', 'replace')
    same = len(before.rstrip('\ufffd'))
    if unknown := len(before) - same:  # its bytes have become characters
      sizes = itertools.accumulate(len(c.encode()) for c in text[same:])
      count = same + 1 + sum(size < unknown for size in sizes)
    else:  # its characters are no text any more, and each of their bytes is U+FFFD
      pairs = zip(before, text, strict=False)
      same = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
      count = same + len(before[same:].encode())
    return len(text[:count].encode())

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
  """Return the complete continuations. Without `stop`, the text is that of all tokens decoded at
  once; with it, what `stream` yields in pieces (see `TextRow`)."""
  rows = _rows(r, decode_bytes, stop, chunk)
  if not stop:
    return [
      found._replace(text=row.rest(found.tokens))
      for found, row in zip(generate(r), rows, strict=True)
    ]
  texts = zip(*_pieces(r, rows, chunk))
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
    r.check(decoding)
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
