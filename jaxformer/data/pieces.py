"""Cut long texts into pieces whose tokens, joined, are the tokens of the whole text.

Memory and time per piece are those of the tokenizer for about `SIZE` characters, however long a
document is. A cut is made only where the tokenizer itself cuts, which is checked at every place by
tokenizing the surroundings with and without the cut. A text without such a place for `LONGEST`
characters (one word, for a tokenizer that splits at spaces: emoji, DNA, Chinese without
punctuation) is cut there nevertheless, between two tokens of the surroundings: the tokens next to
this cut can differ from those of the whole text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

SIZE = 1 << 17
LONGEST = 1 << 20
WINDOW = 256  # characters on each side of a cut that are tokenized to check it
TRIES = 8  # places of a kind that are checked
LAST_TRIES = 32  # places that are checked where nothing but tokens end
# Kinds of places at which tokenizers cut, in the order in which they are looked for: a line end
# between words, an end of a word before white space, a start of a line, a single space, an end of a
# word before punctuation or symbols (without apostrophes, which contractions contain, and without
# invisible characters, which normalizers remove).
PLACES = tuple(
  map(
    re.compile,
    (
      r'(?<=[^\W_]\n)(?=[^\W_])',
      r'(?<=[^\W_])(?=\s)',
      r'(?<=\S\n)(?=\w)',
      r'(?<=\S)(?= \S)',
      r'(?<=[^\W\d_])(?=[^\w\s\'’\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2060\ufeff])',
    ),
  )
)

Separates = Callable[[str, str], bool]
"""Whether the tokens of two texts are, one after the other, those of the joined text."""


def cut(
  text: str,
  start: int,
  separates: Separates,
  scan: Callable[[str], list[int]] | None = None,
  loosely: Separates | None = None,
  size: int | None = None,
) -> int | None:
  """Return where the piece from `start` on ends; None where the text is too short for a cut, also
  where more of it may follow.

  Args:
    scan: returns all ends of words of a text, for texts without places of the usual kinds.
    loosely: as `separates` for the surroundings alone, where nothing separates the whole text.
    size: characters of a piece; `SIZE` by default, and the longest in proportion.
  """
  longest, size = (LONGEST if size is None else LONGEST * size // SIZE + 1), size or SIZE
  first, last = start + size, min(len(text) - WINDOW, start + longest)
  if first > last:
    return None

  def check(at: int, left: int) -> bool:
    return separates(text[left:at], text[at : at + WINDOW])

  def look(low: int, high: int) -> int | None:
    for kind in PLACES:
      for match in itertools.islice(kind.finditer(text, low, high), TRIES):
        if check(match.start(), max(start, match.start() - WINDOW)):
          return match.start()
    return None

  near = min(first + size, last + 1)
  if (at := look(first, near)) is not None:
    return at
  if scan is not None:
    # From a true start, ends of words before the last ones are those of the whole text.
    ends = [start + end for end in scan(text[start : first + WINDOW])]
    for at in [e for e in ends if e <= first][: -TRIES - 1 : -1]:
      if check(at, max((e for e in ends if e <= at - WINDOW), default=start)):
        return at
  if (at := look(near, last + 1)) is not None:
    return at
  if last < start + longest:
    return None
  loosely = loosely or separates
  tried = range(last, max(last - LAST_TRIES, start), -1)
  return next(
    (a for a in tried if loosely(text[max(start, a - WINDOW) : a], text[a : a + WINDOW])), last
  )


def pieces(text: str, cut_at: Callable[[str, int], int | None]) -> Iterator[str]:
  """Yield the pieces of a text."""
  start = 0
  while (end := cut_at(text, start)) is not None:
    yield text[start:end]
    start = end
  yield text[start:]


def usual_words() -> WordCuts:
  """Return the cuts of GPT-2, which those derived from it make too."""
  import tokenizers as hf

  return WordCuts(hf.pre_tokenizers.ByteLevel(add_prefix_space=False))


class WordCuts:
  """Cuts of a pre-tokenizer of the library `tokenizers`, for tokens within its words."""

  def __init__(self, pre_tokenizer: Any):
    self._split = pre_tokenizer.pre_tokenize_str

  def __call__(self, text: str, start: int) -> int | None:
    return cut(text, start, self.separates, self.ends)

  def separates(self, left: str, right: str) -> bool:
    return self._words(left + right) == self._words(left) + self._words(right)

  def ends(self, text: str) -> list[int]:
    """Return the ends of all words."""
    return [end for _, (_, end) in self._split(text)]

  def _words(self, text: str) -> list[str]:
    return [word for word, _ in self._split(text)]
