"""Tokenized corpora on disk, memory-mapped: built once per corpus, tokenizers and split, found by a
hash of all of them.

A cache is a folder with, for each side of the split and each column of the corpus, the tokens of
all rows one after another (uint16, or uint32 for vocabularies beyond 65,536), the positions where
rows start, and counts of byte pairs for the baselines; the validation rows of a parallel corpus as
text, for scores of translations; and `index.json` with sizes and hashes."""

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32, Int64, UInt

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data.baselines import PairCounter
from jaxformer.data.cache_folder import build_atomically, file_sha256, sha256
from jaxformer.data.corpora import Corpus
from jaxformer.data.splits import SideName, Split, divide
from jaxformer.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer

FORMAT = 2
# Texts are encoded in batches of about this size, where a short text counts as SHORT characters.
BATCH_CHARACTERS = 1 << 22
SHORT = 1 << 10
# Larger files are checked by size alone when a cache is opened.
CHECKED_BYTES = 256 << 20
LOG_SECONDS = 10.0
VALIDATION_TEXTS = 'validation.jsonl'
SIDES: tuple[SideName, ...] = get_args(SideName)

Log = Callable[[str], None]


class CachedColumn(NamedTuple):
  """One column of one side. Every row ends with the end of a document where the tokenizer has
  one."""

  tokens_N: UInt[np.ndarray, ' N']  # uint16 or uint32, memory-mapped
  starts_R1: Int64[np.ndarray, ' R1']  # where each of R rows starts, and where the last ends
  # How often a byte (or 256, the boundary of a document) follows another.
  pairs: Int64[np.ndarray, '257 257']
  # Counts of tokens, documents, characters, and bytes of the text in UTF-8; `sha256` of the tokens
  # and starts as stored.
  facts: dict[str, Any]

  @property
  def rows(self) -> int:
    return self.starts_R1.size - 1

  def ids(self, row: int) -> Int32[np.ndarray, ' T']:
    """Return the tokens of a row."""
    return self.tokens_N[self.starts_R1[row] : self.starts_R1[row + 1]].astype(np.int32)


class TokenCache(NamedTuple):
  """An opened cache: the columns of each side of the split. `empty` rows of the corpus were left
  out, since they hold no text."""

  train: tuple[CachedColumn, ...]
  validation: tuple[CachedColumn, ...]
  empty: int
  folder: Path

  def validation_texts(self) -> list[tuple[str, ...]]:
    """Return the validation rows of a parallel corpus, in their order."""
    with open(self.folder / VALIDATION_TEXTS, encoding='utf-8') as file:
      return [tuple(json.loads(line)) for line in file]


# ---- tokenizers --------------------------------------------------------------------------------


def training_texts(
  corpus: Corpus, split: Split, columns: Sequence[int], reads_all: bool = False
) -> Iterator[str]:
  """Yield the texts of some columns that a tokenizer is trained on: of the training rows, or with
  `reads_all` of all rows."""
  if reads_all:
    rows = (row.texts for row in corpus.rows())
  else:
    rows = (p.texts for p in divide(corpus.rows, split, corpus.tag)[1] if p.side == 'train')
  for texts in rows:
    yield from (texts[column] for column in columns)


def open_tokenizer(
  tokenizer: TokenizerConfig,
  corpus: Corpus,
  columns: Sequence[int],
  split: Split,
  folder: Path,
  log: Log,
) -> Tokenizer:
  """Return the tokenizer of a config. One that needs training is trained once, on the given columns
  of the corpus, and kept in the cache folder."""
  if not tokenizer.needs_training:
    return tokenizer.train(())
  key = sha256(
    f'tokenizer {FORMAT}',
    config.text(tokenizer),
    config.text(split),
    str(tuple(columns)),
    corpus.fingerprint(folder),
  )[:32]

  def build(into: Path) -> None:
    log(f'training the tokenizer {tokenizer.tag} on {corpus.tag}')
    tokenizer.train(training_texts(corpus, split, columns, tokenizer.reads_all)).save(into)

  def load(at: Path) -> Tokenizer | None:
    try:
      return load_tokenizer(at)
    except InputError:
      return None

  return build_atomically(folder / f'tokenizer-{key}', build, load)


# ---- building ----------------------------------------------------------------------------------


def open_corpus(
  corpus: Corpus, tokenizers: Sequence[Tokenizer], split: Split, folder: Path, log: Log
) -> TokenCache:
  """Return the tokens of a corpus, from the cache folder or tokenized now. A cache that is cut off
  or corrupt is built again.

  Args:
    tokenizers: one per column.

  Raises `InputError` for a corpus that is empty or cannot be divided, and for a cache folder that
  cannot be written."""
  key = sha256(
    f'tokens {FORMAT}',
    corpus.fingerprint(folder),
    config.text(split),
    *(t.fingerprint() for t in tokenizers),
  )[:32]
  return build_atomically(
    folder / f'tokens-{key}',
    lambda into: _build(into, key, corpus, tokenizers, split, log),
    lambda at: _open(at, key),
  )


class _Writer:
  """Appends the texts of one column of one side."""

  def __init__(self, path: Path, tokenizer: Tokenizer, file: BinaryIO):
    self.path, self.tokenizer, self.file = path, tokenizer, file
    self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    self.starts = array('q')
    self.counter = PairCounter()
    self.tokens = self.characters = self.bytes = 0
    self.waiting: list[tuple[str, bool, bool]] = []
    self.size = 0

  def add(self, text: str, ends: bool) -> None:
    """Append the text of a row, in pieces; `ends`: the end of the row is on this side."""
    pieces, begins = self.tokenizer.pieces(text), True
    piece = next(pieces)
    while piece is not None:
      following = next(pieces, None)
      self.waiting.append((piece, begins, ends and following is None))
      self.size += max(len(piece), SHORT)
      if self.size >= BATCH_CHARACTERS:
        self.write()
      begins, piece = False, following

  def write(self) -> None:
    """Encode and write the pieces that wait, each with whether it begins and ends a document."""
    if not self.waiting:
      return
    texts, self.waiting, self.size = self.waiting, [], 0
    end, arrays = self.tokenizer.end_of_document, []
    encoded = self.tokenizer.encode_batch([t for t, _, _ in texts])
    for (text, begins, ends), ids in zip(texts, encoded, strict=True):
      if begins and (ids.size or end is not None or not ends):
        self.starts.append(self.tokens)
      arrays += [ids] if not ends or end is None else [ids, np.array([end])]
      self.tokens += ids.size + (ends and end is not None)
      self.characters += len(text)
    self.file.write(np.concatenate(arrays).astype(self.dtype).tobytes())
    utf8 = [(text.encode(), begins, ends) for text, begins, ends in texts]
    self.bytes += sum(len(e) for e, _, _ in utf8)
    self.counter.add(utf8)

  def finish(self) -> dict[str, Any]:
    """Write what is left, and return the facts for the index."""
    self.write()
    self.file.close()
    if not self.tokens:
      raise InputError(f'the tokenizer gives no tokens for the text of {self.path.name}')
    self.starts.append(self.tokens)
    np.save(f'{self.path}.starts.npy', np.frombuffer(self.starts, np.int64))
    np.save(f'{self.path}.pairs.npy', self.counter.pairs)
    return {
      'documents': len(self.starts) - 1,
      'characters': self.characters,
      'bytes': self.bytes,
      'tokens': self.tokens,
    }


def _build(
  folder: Path, key: str, corpus: Corpus, tokenizers: Sequence[Tokenizer], split: Split, log: Log
) -> None:
  log(f'tokenizing {corpus.tag} (once; kept in {folder.parent})')
  survey, pieces = divide(corpus.rows, split, corpus.tag)
  columns = range(len(tokenizers))
  with ExitStack() as stack:
    writers: dict[tuple[str, int], _Writer] = {}
    for side in SIDES:
      for c, tokenizer in enumerate(tokenizers):
        path = folder / f'{side}.{c}'
        file = stack.enter_context(open(f'{path}.tokens', 'wb'))
        writers[side, c] = _Writer(path, tokenizer, file)
    texts = stack.enter_context(open(folder / VALIDATION_TEXTS, 'w', encoding='utf-8'))
    logged = time.monotonic()
    for piece in pieces:
      if piece.side == 'validation' and len(columns) > 1:
        texts.write(json.dumps(piece.texts) + '\n')
      for c in columns:
        writers[piece.side, c].add(piece.texts[c], piece.ends)
      if time.monotonic() - logged >= LOG_SECONDS:
        log(f'tokenized {sum(w.bytes for w in writers.values()) / 1e6:,.0f} MB')
        logged = time.monotonic()
    sides = {side: [writers[side, c].finish() for c in columns] for side in SIDES}
  for side, facts in sides.items():
    tokens = ' and '.join(f'{f["tokens"]:,}' for f in facts)
    log(f'{side}: {facts[0]["documents"]:,} documents, {tokens} tokens')
  files = {
    p.name: {'bytes': p.stat().st_size, 'sha256': file_sha256(p)} for p in sorted(folder.iterdir())
  }
  index = {'format': FORMAT, 'key': key, 'empty': survey.empty, 'sides': sides, 'files': files}
  (folder / 'index.json').write_text(json.dumps(index, indent=2) + '\n')


# ---- opening -----------------------------------------------------------------------------------


def _open(folder: Path, key: str) -> TokenCache | None:
  """Return the cache in a folder, or None where it is missing, of another format, cut off or
  corrupt."""
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
    train, validation = (
      tuple(
        _column(folder, f'{side}.{c}', facts, index['files']) for c, facts in enumerate(columns)
      )
      for side, columns in index['sides'].items()
    )
    return TokenCache(train, validation, index['empty'], folder)
  except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
    return None


def _column(folder: Path, name: str, facts: dict[str, Any], files: dict[str, Any]) -> CachedColumn:
  path, count = folder / f'{name}.tokens', facts['tokens']
  dtype = f'<u{path.stat().st_size // count}'
  content = sha256(*(files[f'{name}.{kind}']['sha256'] for kind in ('tokens', 'starts.npy')))
  return CachedColumn(
    tokens_N=np.memmap(path, dtype, 'r', shape=(count,)),
    starts_R1=np.load(folder / f'{name}.starts.npy', mmap_mode='r'),
    pairs=np.load(folder / f'{name}.pairs.npy'),
    facts=facts | {'sha256': content},
  )
