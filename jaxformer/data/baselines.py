"""Baselines for bits per byte: unigram and bigram models of bytes.

The symbols are the 256 bytes, and 256 for the boundary of a document. Counts of pairs in the
training text determine the models, and counts of pairs in the validation text their scores."""

from collections.abc import Sequence

import numpy as np

BOUNDARY = 256
SYMBOLS = 257
SLICE = 1 << 22


class PairCounter:
  """Counts pairs of symbols in documents given in pieces: `pairs`, int64 [257, 257], first symbol
  by second."""

  def __init__(self):
    self.pairs = np.zeros((SYMBOLS, SYMBOLS), np.int64)
    self._last = BOUNDARY

  def add(self, texts: Sequence[tuple[bytes, bool, bool]]) -> None:
    """Count pieces of text, each given with whether it begins and whether it ends a document."""
    boundary = np.array([BOUNDARY], np.uint16)
    joined = [np.array([self._last], np.uint16)]
    for text, begins, ends in texts:
      joined += (
        [boundary] * begins + [np.frombuffer(text, np.uint8).astype(np.uint16)] + [boundary] * ends
      )
    symbols = np.concatenate(joined)
    for start in range(0, symbols.size - 1, SLICE):
      part = symbols[start : start + SLICE + 1].astype(np.int64)
      self.pairs += np.bincount(part[:-1] * SYMBOLS + part[1:], minlength=SYMBOLS**2).reshape(
        SYMBOLS, SYMBOLS
      )
    self.pairs[BOUNDARY, BOUNDARY] = 0  # there is nothing between two documents
    self._last = int(symbols[-1])


def unigram_bits_per_byte(train: np.ndarray, validation: np.ndarray, ends: bool) -> float:
  """Return bits per byte of the validation text under P(b) = (n(b) + 1) / (n + V), with n(b) the
  count of symbol b in the training text, n their sum and V the number of symbols. With `ends`, the
  ends of documents are predicted too, as a model with such a token does."""
  train, validation = _scored(train, ends), _scored(validation, ends)
  return _bits(np.log2(_unigram(train))[None, :], validation)


def bigram_bits_per_byte(train: np.ndarray, validation: np.ndarray, ends: bool) -> float:
  """Return bits per byte of the validation text under P(b|a) = (c(a,b) + d(a) P(b)) / (c(a) +
  d(a)), with c(a,b) the count of b after a in the training text, c(a) its sum over b, d(a) the
  number of distinct b after a (Witten and Bell 1991), P(b) as for the unigram model, and P(b|a) =
  P(b) where a was never seen. The first byte of a document is predicted from the boundary."""
  train, validation = _scored(train, ends), _scored(validation, ends)
  distinct = (train > 0).sum(axis=1, keepdims=True)
  unseen = distinct == 0
  weight = np.where(unseen, 1, distinct)
  return _bits(
    np.log2((train + weight * _unigram(train)) / (train.sum(axis=1, keepdims=True) + weight)),
    validation,
  )


def _scored(pairs: np.ndarray, ends: bool) -> np.ndarray:
  return pairs if ends else pairs[:, :BOUNDARY]


def _unigram(train: np.ndarray) -> np.ndarray:
  counts = train.sum(axis=0)
  return (counts + 1) / (counts.sum() + counts.size)


def _bits(log2: np.ndarray, validation: np.ndarray) -> float:
  return float(-(validation * log2).sum() / validation[:, :BOUNDARY].sum())
