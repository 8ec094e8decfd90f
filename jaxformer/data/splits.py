"""Which text is for training and which for validation: by document or by position, the same on
every pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from jaxformer.config import Config, InputError
from jaxformer.data.readers import Document

Side = Literal['train', 'validation']
HASH_RANGE = 1 << 64


class Piece(NamedTuple):
  """A document, or the part of one that lies on one side of the split. `ends`: the document's own
  end is in this piece."""

  side: Side
  text: str
  ends: bool


class Survey(NamedTuple):
  """What a split must know of the whole corpus before it can place the first document; empty
  documents do not count."""

  documents: int
  characters: int
  lowest: int
  highest: int


class Split(Config, abstract=True):
  """How a corpus is divided into text to train on and text to validate on."""

  def pieces(self, documents: Iterable[Document], survey: Survey) -> Iterator[Piece]:
    """The non-empty documents in order, each on its side, or cut in two."""
    raise NotImplementedError


class ByDocument(Split):
  """Whole documents, about `fraction` of them to validation, chosen by a hash of their content: a
  document stays on its side when others are added, and copies of a document share a side. Where
  chance gives one side nothing, it gets the nearest document."""

  fraction: float = 0.05

  def validate(self) -> None:
    self.require(0 < self.fraction < 1, 'fraction', 'between 0 and 1')

  def pieces(self, documents: Iterable[Document], survey: Survey) -> Iterator[Piece]:
    if survey.lowest == survey.highest:
      what = (
        'the corpus is one document'
        if survey.documents == 1
        else f'all {survey.documents} documents are the same'
      )
      raise InputError(
        f'{self.tag}: {what}, which cannot be divided between training and validation; use the '
        'split ByPosition'
      )
    bound = self.bound(survey.lowest, survey.highest)
    for document in documents:
      if document.text:
        yield Piece(
          'validation' if content_hash(document.text) < bound else 'train', document.text, True
        )

  def bound(self, lowest: int, highest: int) -> int:
    """Documents whose hash is below are for validation; of all hashes, at least the lowest is below
    and the highest is not."""
    return min(max(int(self.fraction * HASH_RANGE), lowest + 1), highest)


class ByPosition(Split):
  """The last `fraction` of the corpus, counted in characters over the documents joined, to
  validation. The published benchmarks
  of characters do so: of n characters the first int(n * 0.9) are for training."""

  fraction: float = 0.1

  def validate(self) -> None:
    self.require(0 < self.fraction < 1, 'fraction', 'between 0 and 1')

  def pieces(self, documents: Iterable[Document], survey: Survey) -> Iterator[Piece]:
    left = int(survey.characters * (1 - self.fraction))
    if not 0 < left < survey.characters:
      raise InputError(
        f'{self.tag}.fraction = {self.fraction}: leaves a side of the {survey.characters} '
        'characters empty'
      )
    for document in documents:
      head, tail = document.text[:left], document.text[left:]
      left -= len(head)
      if head:
        yield Piece('train', head, not tail)
      if tail:
        yield Piece('validation', tail, True)


def content_hash(text: str) -> int:
  """A hash of the text, uniform over 0..2^64-1, the same on every machine."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def divide(documents: Callable[[], Iterator[Document]], split: Split, name: str) -> Iterator[Piece]:
  """The pieces of a corpus, in order. Reads it twice: once to survey it, once to yield it. `name`
  is for messages.

  Raises `InputError` where the corpus is empty or cannot be divided.
  """
  count, characters, lowest, highest = 0, 0, HASH_RANGE, -1
  for document in documents():
    if document.text:
      value = content_hash(document.text) if isinstance(split, ByDocument) else 0
      count, characters, lowest, highest = (
        count + 1,
        characters + len(document.text),
        min(lowest, value),
        max(highest, value),
      )
  if not count:
    raise InputError(f'{name}: the corpus holds no text')
  yield from split.pieces(documents(), Survey(count, characters, lowest, highest))
