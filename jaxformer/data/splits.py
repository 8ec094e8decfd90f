"""Splits of a corpus into training and validation rows: by document or by position, the same on
every pass."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from jaxformer.config import Config, InputError
from jaxformer.data.corpora import Row

SideName = Literal['train', 'validation']
HASH_RANGE = 1 << 64
HASHED_CHARACTERS = 1 << 20  # that are encoded at a time


class Piece(NamedTuple):
  """A row, or a part of one that lies on one side of the split. `ends`: the end of the row is in
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
    lowest, highest: hashes that rows are placed by; of a part of a mixture, in all parts.
    hashes: of the rows that come in parts, in their order.
    skipped: rows that could not be used, and were to be skipped.
    problem: of the first of them.
  """

  rows: int
  empty: int
  characters: int
  lowest: int
  highest: int
  hashes: tuple[int, ...] = ()
  skipped: int = 0
  problem: str = ''


class Split(Config, abstract=True):
  """How a corpus is divided into training and validation text; about `fraction` of it is for
  validation."""

  fraction: float

  def validate(self) -> None:
    self.require(0 < self.fraction < 1, 'fraction', 'between 0 and 1')

  def pieces(self, rows: Iterable[Row], survey: Survey) -> Iterator[Piece]:
    """Yield the rows in order, or their parts, each on its side or cut in two."""
    raise NotImplementedError

  def bound(self, survey: Survey) -> int | None:
    """Return the hash below which documents are for validation; None where there is none."""
    return None


class ByDocument(Split):
  """Put about `fraction` of the documents into validation, chosen by a hash of their name or, where
  the corpus names none, of their first text: a document stays on its side when others are added,
  and copies of a text (equal to the last character, white space too) share a side, in a mixture
  across all its corpora. Where a side would be empty, it gets the nearest document: of a mixture
  where a side of the whole mixture would be, so a small corpus in it can have no validation text.
  """

  fraction: float = 0.05

  def bound(self, survey: Survey) -> int | None:
    if survey.lowest == survey.highest:
      return None
    # At least the lowest hash is below the bound and the highest is not.
    return min(max(int(self.fraction * HASH_RANGE), survey.lowest + 1), survey.highest)

  def pieces(self, rows: Iterable[Row], survey: Survey) -> Iterator[Piece]:
    bound = self.bound(survey)
    if bound is None:
      what = 'the corpus is one document' if survey.rows == 1 else 'all rows are of one document'
      raise InputError(
        f'{self.tag}: {what}, which cannot be divided between training and validation; text can by '
        'the split ByPosition'
      )
    hashes, begins, value = iter(survey.hashes), True, 0
    for row in rows:
      if begins:
        value = _placed_by(row) if row.ends else next(hashes)
      begins = row.ends
      yield Piece('validation' if value < bound else 'train', row.texts, row.ends)


class ByPosition(Split):
  """Put the last `fraction` of a text corpus, counted in characters over the joined rows, into
  validation. The published character-level benchmarks do so: of n characters the first int(n * 0.9)
  are for training. Each corpus of a mixture is divided by itself. Copies of a text, in one or in
  several corpora, can be on both sides; `ByDocument` keeps them together."""

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
        yield Piece('train', (head,), row.ends and not tail)
      if tail:
        yield Piece('validation', (tail,), row.ends)


def content_hash(text: str) -> int:
  """Return a hash of the text, uniform over 0..2^64-1, the same on every machine."""
  found = _hash()
  _update(found, text)
  return _number(found)


def _update(found: hashlib.blake2b, text: str) -> None:
  for start in range(0, len(text), HASHED_CHARACTERS):
    found.update(text[start : start + HASHED_CHARACTERS].encode())


def _hash() -> hashlib.blake2b:
  return hashlib.blake2b(digest_size=8)


def _number(found: hashlib.blake2b) -> int:
  return int.from_bytes(found.digest(), 'little')


def survey_rows(rows: Iterable[Row], name: str) -> Survey:
  """Return a survey of the rows of a corpus. Raises `InputError` with the name of the corpus where
  it is empty."""
  count, empty, skipped, characters, lowest, highest = 0, 0, 0, 0, HASH_RANGE, -1
  hashes: list[int] = []
  problem, part_hash = '', None
  for row in rows:
    if row.problem:
      skipped, problem = skipped + 1, problem or row.problem
      continue
    if part_hash is None and row.ends and not _used(row):
      empty += 1
      continue
    characters += len(row.texts[0])
    if part_hash is not None or not row.ends:
      part_hash = part_hash or _hash()
      _update(part_hash, row.texts[0])
    if row.ends:
      value = _placed_by(row) if part_hash is None else _number(part_hash)
      hashes += [] if part_hash is None else [value]
      lowest, highest = min(lowest, value), max(highest, value)
      part_hash, count = None, count + 1
  if not count:
    others = f'; {skipped:,} rows were skipped, the first: {problem}' if skipped else ''
    raise InputError(f'{name}: the corpus holds no text{others}')
  return Survey(count, empty, characters, lowest, highest, tuple(hashes), skipped, problem)


def joined(surveys: Sequence[Survey]) -> list[Survey]:
  """Return the surveys of the corpora of a mixture, so that each is divided as the whole is."""
  lowest, highest = min(s.lowest for s in surveys), max(s.highest for s in surveys)
  return [s._replace(lowest=lowest, highest=highest) for s in surveys]


def divide(
  rows: Callable[[], Iterator[Row]], split: Split, name: str, survey: Survey | None = None
) -> tuple[Survey, Iterator[Piece]]:
  """Return a survey of a corpus and its pieces in order. Reads it twice: once to survey it, once to
  yield it.

  Args:
    name: of the corpus, for messages.
    survey: of the corpus, where it is a part of a mixture or has been surveyed before.

  Raises `InputError` where the corpus is empty or, with the first piece, cannot be divided.
  """
  survey = survey or survey_rows(rows(), name)
  return survey, split.pieces(used_rows(rows()), survey)


def used_rows(rows: Iterable[Row]) -> Iterator[Row]:
  """Yield the rows that hold text, and all parts of long rows."""
  inside = False
  for row in rows:
    if not row.problem and (inside or not row.ends or _used(row)):
      yield row
      inside = not row.ends


def _used(row: Row) -> bool:
  return bool(row.texts[0]) if len(row.texts) == 1 else all(t.strip() for t in row.texts)


def _placed_by(row: Row) -> int:
  return content_hash(row.document or row.texts[0])
