"""Splits of a corpus into training and validation rows: by document or by position, the same on
every pass."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from jaxformer.config import Config, InputError
from jaxformer.data.corpora import Row

SideName = Literal['train', 'validation']
HASH_RANGE = 1 << 64


class Piece(NamedTuple):
  """A row, or the part of one that lies on one side of the split. `ends`: the end of the row is in
  this piece."""

  side: SideName
  texts: tuple[str, ...]
  ends: bool


class Survey(NamedTuple):
  """What a split must know of the whole corpus before it can place the first row.

  Attributes:
    rows: rows that are used.
    empty: rows that are left out: of one column those without text, of more columns those with a
      blank text.
    characters: of the first column.
    lowest, highest: hashes that rows are placed by.
  """

  rows: int
  empty: int
  characters: int
  lowest: int
  highest: int


class Split(Config, abstract=True):
  """How a corpus is divided into training and validation text; about `fraction` of it is for
  validation."""

  fraction: float

  def validate(self) -> None:
    self.require(0 < self.fraction < 1, 'fraction', 'between 0 and 1')

  def pieces(self, rows: Iterable[Row], survey: Survey) -> Iterator[Piece]:
    """Yield the rows in order, each on its side or cut in two."""
    raise NotImplementedError


class ByDocument(Split):
  """Put about `fraction` of the documents into validation, chosen by a hash of their name or, where
  the corpus names none, of their first text: a document stays on its side when others are added,
  and copies of a text share a side. Where a side would be empty, it gets the nearest document."""

  fraction: float = 0.05

  def pieces(self, rows: Iterable[Row], survey: Survey) -> Iterator[Piece]:
    if survey.lowest == survey.highest:
      what = 'the corpus is one document' if survey.rows == 1 else 'all rows are of one document'
      raise InputError(
        f'{self.tag}: {what}, which cannot be divided between training and validation; text can by '
        'the split ByPosition'
      )
    # At least the lowest hash is below the bound and the highest is not.
    bound = min(max(int(self.fraction * HASH_RANGE), survey.lowest + 1), survey.highest)
    for row in rows:
      yield Piece('validation' if _placed_by(row) < bound else 'train', row.texts, True)


class ByPosition(Split):
  """Put the last `fraction` of a text corpus, counted in characters over the joined rows, into
  validation. The published character-level benchmarks do so: of n characters the first int(n * 0.9)
  are for training."""

  fraction: float = 0.1

  def pieces(self, rows: Iterable[Row], survey: Survey) -> Iterator[Piece]:
    left = int(survey.characters * (1 - self.fraction))
    if not 0 < left < survey.characters:
      raise InputError(
        f'{self.tag}.fraction',
        self.fraction,
        problem=f'leaves a side of the {survey.characters} characters empty',
      )
    for row in rows:
      (text,) = row.texts
      head, tail = text[:left], text[left:]
      left -= len(head)
      if head:
        yield Piece('train', (head,), not tail)
      if tail:
        yield Piece('validation', (tail,), True)


def content_hash(text: str) -> int:
  """Return a hash of the text, uniform over 0..2^64-1, the same on every machine."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def divide(
  rows: Callable[[], Iterator[Row]], split: Split, name: str
) -> tuple[Survey, Iterator[Piece]]:
  """Return a survey of a corpus and its pieces in order. Reads it twice: once to survey it, once to
  yield it.

  Args:
    name: of the corpus, for messages.

  Raises `InputError` where the corpus is empty or, with the first piece, cannot be divided.
  """
  count, empty, characters, lowest, highest = 0, 0, 0, HASH_RANGE, -1
  for row in rows():
    if not _used(row):
      empty += 1
      continue
    value = _placed_by(row)
    lowest, highest = min(lowest, value), max(highest, value)
    count += 1
    characters += len(row.texts[0])
  if not count:
    raise InputError(f'{name}: the corpus holds no text')
  survey = Survey(count, empty, characters, lowest, highest)
  return survey, split.pieces(filter(_used, rows()), survey)


def _used(row: Row) -> bool:
  return bool(row.texts[0]) if len(row.texts) == 1 else all(t.strip() for t in row.texts)


def _placed_by(row: Row) -> int:
  return content_hash(row.document or row.texts[0])
