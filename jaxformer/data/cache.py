"""Tokenized corpora on disk, memory-mapped: built once per corpus, tokenizers and split, found by a
hash of all of them.

A cache is a folder with, for each side of the split and each column of the corpus, the tokens of
all rows one after another (uint16, or uint32 for vocabularies beyond 65,536), the positions where
rows start, and counts of byte pairs for the baselines; the validation rows of a parallel corpus as
text, for scores of translations; and `index.json` with sizes and hashes."""

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32, Int64, UInt

from jaxformer import config
from jaxformer.code_record import code_of, contents
from jaxformer.config import InputError
from jaxformer.data.baselines import PairCounter
from jaxformer.data.cache_folder import build_atomically, file_sha256, sha256
from jaxformer.data.corpora import Corpus
from jaxformer.data.pieces import WINDOW, usual_words
from jaxformer.data.splits import (
  Piece,
  SideName,
  Split,
  Survey,
  divide,
  joined,
  survey_rows,
  used_rows,
)
from jaxformer.data.tokenizer_file import load_tokenizer
from jaxformer.data.tokenizers import Tokenizer, TokenizerConfig

FORMAT = 3
# Texts are encoded in batches of about this size in UTF-8, where a short text counts as SHORT
# bytes. The library takes about 130 bytes of memory per byte of a batch.
BATCH_BYTES = 1 << 22
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
  out, since they hold no text, and `skipped` rows, since they could not be used."""

  train: tuple[CachedColumn, ...]
  validation: tuple[CachedColumn, ...]
  empty: int
  skipped: int
  folder: Path

  def validation_texts(self) -> list[tuple[str, ...]]:
    """Return the validation rows of a parallel corpus, in their order."""
    with open(self.folder / VALIDATION_TEXTS, encoding='utf-8') as file:
      return [tuple(json.loads(line)) for line in file]


def skipped_note(caches: Sequence[TokenCache]) -> str:
  """Return how many rows could not be used, in words; '' for none."""
  skipped = sum(c.skipped for c in caches)
  return f' ({skipped:,} bad rows skipped)' if skipped else ''


# ---- tokenizers --------------------------------------------------------------------------------


def training_texts(
  corpus: Corpus, split: Split, columns: Sequence[int], reads_all: bool = False
) -> Iterator[str]:
  """Yield the texts of some columns that a tokenizer is trained on: of the training rows, or with
  `reads_all` of all rows. A long text comes in pieces that end with a word."""
  parts = corpus.parts()
  if reads_all:
    for part in parts:
      rows = (Piece('train', row.texts, row.ends) for row in used_rows(part.rows()))
      yield from _by_words(rows, columns)
    return
  surveys = joined([survey_rows(part.rows(), part.named) for part in parts])
  for part, survey in zip(parts, surveys, strict=True):
    pieces = divide(part.rows, split, part.named, survey)[1]
    yield from _by_words((p for p in pieces if p.side == 'train'), columns)


def _by_words(found: Iterable[Piece], columns: Sequence[int]) -> Iterator[str]:
  cuts, held = usual_words(), ''
  for piece in found:
    if piece.ends and not held:
      yield from (piece.texts[column] for column in columns)
      continue
    held, start = held + piece.texts[0], 0
    while (end := cuts(held, start)) is not None:
      yield held[start:end]
      start = end
    held = held[start:]
    if piece.ends:
      yield held
      held = ''
  if held:
    yield held


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
    config.digest(tokenizer),
    config.digest(split),
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


def open_parts(
  corpus: Corpus, tokenizers: Sequence[Tokenizer], split: Split, folder: Path, log: Log
) -> list[TokenCache]:
  """Return the tokens of each part of a corpus, from the cache folder or tokenized now. A cache
  that is cut off or corrupt is built again. The parts of a mixture are divided as a whole, so that
  copies of a document share a side; one with few documents can have none for validation.

  Args:
    tokenizers: one per column.

  Raises `InputError` for a corpus that is empty, cannot be divided or changes while it is read, and
  for a cache folder that cannot be written."""
  parts = corpus.parts()
  if len(parts) == 1:
    return [_open_part(parts[0], tokenizers, split, folder, log)]
  surveys = [_open_survey(part, folder) for part in parts]
  return [
    _open_part(part, tokenizers, split, folder, log, own, whole)
    for part, own, whole in zip(parts, surveys, joined(surveys), strict=True)
  ]


def _open_survey(corpus: Corpus, folder: Path) -> Survey:
  fingerprint = corpus.fingerprint(folder)
  key = sha256(f'survey {FORMAT}', fingerprint)[:32]

  def build(into: Path) -> None:
    survey = survey_rows(corpus.rows(), corpus.named)
    _require_unchanged(corpus, fingerprint, folder)
    (into / 'survey.json').write_text(json.dumps(survey._asdict()))

  def load(at: Path) -> Survey | None:
    try:
      found = json.loads((at / 'survey.json').read_text())
      return Survey(**found | {'hashes': tuple(found['hashes'])})
    except (OSError, ValueError, TypeError, KeyError):
      return None

  return build_atomically(folder / f'survey-{key}', build, load)


def _open_part(
  corpus: Corpus,
  tokenizers: Sequence[Tokenizer],
  split: Split,
  folder: Path,
  log: Log,
  own: Survey | None = None,
  whole: Survey | None = None,
) -> TokenCache:
  """Return the tokens of a corpus, or of a part of a mixture with its own survey and that of the
  whole."""
  fingerprint = corpus.fingerprint(folder)
  # A part that is divided as it would be by itself shares the cache.
  bound = None if own is None or whole is None else split.bound(whole)
  shared = own is None or bound == split.bound(own)
  key = sha256(
    f'tokens {FORMAT}',
    fingerprint,
    config.digest(split),
    *(t.fingerprint() for t in tokenizers),
    *(f'code {contents(code)}' for code in map(code_of, map(type, tokenizers)) if code),
    *(() if shared else (f'bound {bound}',)),
  )[:32]

  def build(into: Path) -> None:
    _build(into, key, corpus, tokenizers, split, log, whole)
    _require_unchanged(corpus, fingerprint, folder)

  return build_atomically(folder / f'tokens-{key}', build, lambda at: _open(at, key))


def _require_unchanged(corpus: Corpus, fingerprint: str, folder: Path) -> None:
  if corpus.fingerprint(folder) != fingerprint:
    raise InputError(f'{corpus.named}: its files changed while they were read; start again')


class _Waiting(NamedTuple):
  """A piece that is not encoded yet, after the end of the piece before it; whether it begins and
  whether it ends a document."""

  before: str
  text: str
  utf8: bytes
  begins: bool
  ends: bool


class _Writer:
  """Appends the texts of one column of one side."""

  def __init__(self, path: Path, tokenizer: Tokenizer, beginning: int | None, file: BinaryIO):
    self.path, self.tokenizer, self.file = path, tokenizer, file
    self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    self.starts = array('q')
    self.counter = PairCounter()
    self.tokens = self.characters = self.bytes = 0
    self.beginning, self.end = beginning, tokenizer.end_of_document
    self.waiting: list[_Waiting] = []
    self.size = 0
    # Of the row at hand: text that is not cut yet, and the end of the piece before it.
    self.held, self.before, self.begins = '', '', True

  def add(self, text: str, ends: bool) -> None:
    """Append a text, which continues that of the last call unless this ended its row. `ends`: the
    end of the row is at its end."""
    self.held, start = self.held + text if self.held else text, 0
    while (cut := self.tokenizer.cut(self.held, start)) is not None:
      self._append(start, cut, False)
      start = cut
    if ends:
      self._append(start, len(self.held), True)
      self.held, self.before, self.begins = '', '', True
    else:
      self.held = self.held[start:]

  def _append(self, start: int, stop: int, ends: bool) -> None:
    """Let the piece wait for the next batch."""
    text = self.held[start:stop]
    utf8 = text.encode()
    self.waiting.append(_Waiting(self.before, text, utf8, self.begins, ends))
    self.before, self.begins = text[-WINDOW:], False
    self.size += max(len(utf8), SHORT)
    if self.size >= BATCH_BYTES:
      self.write()

  def write(self) -> None:
    """Encode and write the pieces that wait."""
    if not self.waiting:
      return
    pieces, self.waiting, self.size = self.waiting, [], 0
    ends = [np.array([] if i is None else [i], np.int32) for i in (self.beginning, self.end)]
    (before, after), arrays = ends, []
    encoded = self.tokenizer.encode_pieces([(p.before, p.text) for p in pieces])
    for piece, ids in zip(pieces, encoded, strict=True):
      added = [before[: piece.begins], ids, after[: piece.ends]]
      if piece.begins and (any(map(len, added)) or not piece.ends):
        self.starts.append(self.tokens)
      arrays += added
      self.tokens += sum(map(len, added))
      self.characters += len(piece.text)
      self.bytes += len(piece.utf8)
    self.file.write(np.concatenate(arrays).astype(self.dtype).tobytes())
    self.counter.add([(p.utf8, p.begins, p.ends) for p in pieces])

  def finish(self) -> dict[str, Any]:
    """Write what is left, and return the facts for the index."""
    if self.held:
      self._append(0, len(self.held), False)
    self.write()
    self.file.close()
    if self.characters and not self.tokens:
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
  folder: Path,
  key: str,
  corpus: Corpus,
  tokenizers: Sequence[Tokenizer],
  split: Split,
  log: Log,
  survey: Survey | None,
) -> None:
  log(f'tokenizing {corpus.tag} (once; kept in {folder.parent})')
  survey, pieces = divide(corpus.rows, split, corpus.named, survey)
  if survey.skipped:
    log(f'{corpus.named}: {survey.skipped:,} rows skipped, the first: {survey.problem}')
  columns = range(len(tokenizers))
  with ExitStack() as stack:
    writers: dict[tuple[str, int], _Writer] = {}
    for side in SIDES:
      for c, tokenizer in enumerate(tokenizers):
        path = folder / f'{side}.{c}'
        file = stack.enter_context(open(f'{path}.tokens', 'wb'))
        # A decoder reads the end of a document and then the translation, without a beginning.
        beginning = tokenizer.beginning_of_document if c == 0 else None
        writers[side, c] = _Writer(path, tokenizer, beginning, file)
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
  index = {
    'format': FORMAT,
    'key': key,
    'empty': survey.empty,
    'skipped': survey.skipped,
    'sides': sides,
    'files': files,
  }
  for path in folder.iterdir():
    if path.stat().st_size > CHECKED_BYTES:  # not hashed when opened: it must be on the disk
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
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
    return TokenCache(train, validation, index['empty'], index['skipped'], folder)
  except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
    return None


def _column(folder: Path, name: str, facts: dict[str, Any], files: dict[str, Any]) -> CachedColumn:
  path, count = folder / f'{name}.tokens', facts['tokens']
  content = sha256(*(files[f'{name}.{kind}']['sha256'] for kind in ('tokens', 'starts.npy')))
  return CachedColumn(
    tokens_N=np.memmap(path, f'<u{path.stat().st_size // count}', 'r', shape=(count,))
    if count
    else np.empty(0, np.uint16),  # an empty file cannot be mapped
    starts_R1=np.load(folder / f'{name}.starts.npy', mmap_mode='r'),
    pairs=np.load(folder / f'{name}.pairs.npy'),
    facts=facts | {'sha256': content},
  )
