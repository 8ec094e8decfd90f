"""Tokenised text on disk, memory-mapped: built once for a source, tokenizer and split, found by a
hash of all three.

A cache is a folder with, for each side of the split, the tokens one after another (uint16, or
uint32 for vocabularies beyond 65,536), the position where every document starts, and counts of byte
pairs for the baselines; `index.json` holds sizes and hashes."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np
from jaxtyping import Int64, UInt

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data.baselines import PairCounter
from jaxformer.data.sources import Source
from jaxformer.data.splits import Piece, Side, Split, divide
from jaxformer.data.storage import file_sha256, published, sha256
from jaxformer.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer

FORMAT = 1
BATCH_CHARACTERS = 1 << 22
BATCH_PIECES = 4096
# Larger files are checked by size alone when a cache is opened.
CHECKED_BYTES = 256 << 20
LOG_SECONDS = 10.0

Log = Callable[[str], None]


class SplitTokens(NamedTuple):
  """One side of the split."""

  tokens_N: UInt[np.ndarray, ' N']  # uint16 or uint32, memory-mapped
  starts_D: Int64[np.ndarray, ' D']  # where each document starts
  # how often a byte (or 256, a document's boundary) follows another
  pairs: Int64[np.ndarray, '257 257']
  documents: int
  characters: int
  bytes: int  # of the text in UTF-8
  sha256: str  # of the tokens and starts as stored


class TokenCache(NamedTuple):
  """An opened cache."""

  key: str
  train: SplitTokens
  validation: SplitTokens


def open_tokenizer(
  tokenizer: TokenizerConfig, source: Source, split: Split, folder: Path, log: Log
) -> Tokenizer:
  """The tokenizer of a config; one that is learned from the corpus is learned once and kept in the
  cache folder."""
  if not tokenizer.learned:
    return tokenizer.build(source, split)
  key = sha256(
    f'tokenizer {FORMAT}', config.text(tokenizer), config.text(split), source.fingerprint(folder)
  )[:32]

  def build(into: Path) -> None:
    log(f'learning the vocabulary of {tokenizer.tag} from {source.tag}')
    tokenizer.build(source, split).save(into)

  return published(folder / f'tokenizer-{key}', build, _loaded)


def _loaded(folder: Path) -> Tokenizer | None:
  try:
    return load_tokenizer(folder)
  except InputError:
    return None


def open_tokens(
  source: Source, tokenizer: Tokenizer, split: Split, folder: Path, log: Log
) -> TokenCache:
  """The tokens of a source, from the cache folder or tokenised now. A cache that is cut off or
  damaged is built again.

  Raises `InputError` for a corpus that is empty or cannot be divided, and for a cache folder that
  cannot be written."""
  key = sha256(
    f'tokens {FORMAT}', source.fingerprint(folder), tokenizer.fingerprint(), config.text(split)
  )[:32]
  place = folder / f'tokens-{key}'
  return published(
    place, lambda into: _build(into, key, source, tokenizer, split, log), lambda at: _open(at, key)
  )


# ---- building ----------------------------------------------------------------------------------


class _Writer:
  """Appends the documents of one side."""

  def __init__(self, folder: Path, side: str, tokenizer: Tokenizer, file: BinaryIO):
    self.folder, self.side, self.tokenizer = folder, side, tokenizer
    self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    self.file = file
    self.starts = array('q')
    self.counter = PairCounter()
    self.tokens = self.characters = self.bytes = 0

  def write(self, texts: list[tuple[str, bool, bool]]) -> None:
    """Writes pieces of text, each with whether it begins and whether it ends a document."""
    end = self.tokenizer.end_of_document
    parts: list[np.ndarray] = []
    for (text, begins, ends), ids in zip(
      texts, self.tokenizer.encode_batch([t for t, _, _ in texts]), strict=True
    ):
      if begins and (ids.size or end is not None or not ends):
        self.starts.append(self.tokens)
      parts += [ids] if not ends or end is None else [ids, np.array([end])]
      self.tokens += ids.size + (ends and end is not None)
      self.characters += len(text)
    self.file.write(np.concatenate(parts).astype(self.dtype).tobytes())
    encoded = [(text.encode(), begins, ends) for text, begins, ends in texts]
    self.bytes += sum(len(e) for e, _, _ in encoded)
    self.counter.add(encoded)

  def finish(self) -> dict[str, Any]:
    self.file.close()
    if not self.tokens:
      raise InputError(f'the tokenizer makes no tokens of the text for {self.side}')
    np.save(self.folder / f'{self.side}.starts.npy', np.frombuffer(self.starts, np.int64))
    np.save(self.folder / f'{self.side}.pairs.npy', self.counter.pairs)
    counts = {
      'tokens': self.tokens,
      'documents': len(self.starts),
      'characters': self.characters,
      'bytes': self.bytes,
    }
    return counts | {'dtype': self.dtype.str}


def _build(
  folder: Path, key: str, source: Source, tokenizer: Tokenizer, split: Split, log: Log
) -> None:
  log(f'tokenising {source.tag} (once; kept in {folder.parent})')
  with ExitStack() as stack:
    files = {
      side: stack.enter_context(open(folder / f'{side}.tokens', 'wb')) for side in get_args(Side)
    }
    writers = {side: _Writer(folder, side, tokenizer, file) for side, file in files.items()}
    logged = time.monotonic()
    for batch in _batches(divide(source.documents, split, source.tag), tokenizer):
      for side, writer in writers.items():
        if texts := [(text, begins, ends) for s, text, begins, ends in batch if s == side]:
          writer.write(texts)
      if time.monotonic() - logged >= LOG_SECONDS:
        log(f'tokenised {sum(w.bytes for w in writers.values()) / 1e6:,.0f} MB')
        logged = time.monotonic()
    sides = {side: writer.finish() for side, writer in writers.items()}
  log(
    ', '.join(
      f'{side}: {s["tokens"]:,} tokens, {s["documents"]:,} documents' for side, s in sides.items()
    )
  )
  facts = {
    p.name: {'bytes': p.stat().st_size, 'sha256': file_sha256(p)} for p in sorted(folder.iterdir())
  }
  index = {'format': FORMAT, 'key': key, 'sides': sides, 'files': facts}
  (folder / 'index.json').write_text(json.dumps(index, indent=2) + '\n')


def _batches(
  pieces: Iterator[Piece], tokenizer: Tokenizer
) -> Iterator[list[tuple[Side, str, bool, bool]]]:
  """(side, text, begins, ends) in batches of bounded size; a long document comes in several
  texts."""
  batch: list[tuple[Side, str, bool, bool]] = []
  size = 0
  for piece in pieces:
    begins, texts = True, tokenizer.pieces(piece.text)
    text = next(texts)
    while text is not None:
      following = next(texts, None)
      batch.append((piece.side, text, begins, piece.ends and following is None))
      size += len(text)
      begins, text = False, following
      if size >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
        yield batch
        batch, size = [], 0
  if batch:
    yield batch


# ---- opening -----------------------------------------------------------------------------------


def _open(folder: Path, key: str) -> TokenCache | None:
  """The cache in a folder, or None where it is missing, of another format, cut off or damaged."""
  try:
    index = json.loads((folder / 'index.json').read_text())
    if index['format'] != FORMAT or index['key'] != key:
      return None
    for name, file in index['files'].items():
      path = folder / name
      if path.stat().st_size != file['bytes'] or (
        file['bytes'] <= CHECKED_BYTES and file_sha256(path) != file['sha256']
      ):
        return None
    return TokenCache(key, *(_side(folder, side, index) for side in get_args(Side)))
  except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
    return None


def _side(folder: Path, side: str, index: dict[str, Any]) -> SplitTokens:
  facts = index['sides'][side]
  tokens_N = np.memmap(folder / f'{side}.tokens', facts['dtype'], 'r', shape=(facts['tokens'],))
  starts_D, pairs = (
    np.load(folder / f'{side}.starts.npy', mmap_mode='r'),
    np.load(folder / f'{side}.pairs.npy'),
  )
  hashed = sha256(
    *(index['files'][f'{side}.{name}']['sha256'] for name in ('tokens', 'starts.npy'))
  )
  return SplitTokens(
    tokens_N, starts_D, pairs, facts['documents'], facts['characters'], facts['bytes'], hashed
  )
