"""Tokenised pairs on disk, memory-mapped: built once for a corpus, its tokenizers and split, found
by a hash of all of them.

A cache is a folder with, for each side of the split and for texts and translations each, the tokens
one after another (uint16, or uint32 for vocabularies beyond 65,536) and the position where every
text starts; the held-out pairs as text, for scores of translations; and `index.json` with sizes and
hashes."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, get_args

import numpy as np
from jaxtyping import Int32, Int64, UInt

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data.cache import CHECKED_BYTES, LOG_SECONDS, Log
from jaxformer.data.pair_tokenizer import PairTokenizer, source_of
from jaxformer.data.parallel import Pair, PairCorpus
from jaxformer.data.splits import HASH_RANGE, ByDocument, Side, content_hash
from jaxformer.data.storage import file_sha256, published, sha256
from jaxformer.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer

FORMAT = 1
BATCH_PAIRS = 4096
HELD_OUT = 'validation.pairs.jsonl'


class Texts(NamedTuple):
  """The texts or the translations of one side of the split, without ends of documents."""

  tokens_N: UInt[np.ndarray, ' N']  # uint16 or uint32, memory-mapped
  starts_P1: Int64[np.ndarray, ' P1']  # where each of P texts starts, and where the last ends
  bytes: int  # in UTF-8

  def ids(self, index: int) -> Int32[np.ndarray, ' T']:
    """The tokens of a text."""
    return self.tokens_N[self.starts_P1[index] : self.starts_P1[index + 1]].astype(np.int32)

  @property
  def lengths_P(self) -> Int64[np.ndarray, ' P']:
    return np.diff(self.starts_P1)


class PairSide(NamedTuple):
  """One side of the split."""

  source: Texts
  target: Texts
  sha256: str  # of the tokens and starts as stored

  @property
  def pairs(self) -> int:
    return self.source.starts_P1.size - 1


class PairCache(NamedTuple):
  """An opened cache. `empty` pairs were left out, since one of their texts was blank."""

  train: PairSide
  validation: PairSide
  empty: int
  held_out: Path

  def held_out_texts(self) -> list[Pair]:
    """The pairs of the validation side, in their order."""
    with open(self.held_out, encoding='utf-8') as file:
      return [Pair(*json.loads(line)) for line in file]


def divide_pairs(corpus: PairCorpus, split: ByDocument) -> Iterator[tuple[Side | None, Pair]]:
  """The pairs of a corpus in order, each with its side; None where one of its texts is blank. Pairs
  of a document share a side, and where the corpus names no documents, pairs with the same source.
  Reads the corpus twice.

  Raises `InputError` where the corpus is empty or cannot be divided.
  """
  lowest, highest = HASH_RANGE, -1
  for pair in corpus.pairs():
    if _filled(pair):
      value = content_hash(pair.document or pair.source)
      lowest, highest = min(lowest, value), max(highest, value)
  if highest < 0:
    raise InputError(f'{corpus.tag}: the corpus holds no pair of texts')
  if lowest == highest:
    raise InputError(
      f'{corpus.tag}: all pairs are of one document (or have one source), which cannot be divided '
      f'by {split.tag}'
    )
  bound = split.bound(lowest, highest)
  for pair in corpus.pairs():
    if not _filled(pair):
      yield None, pair
    else:
      yield 'validation' if content_hash(pair.document or pair.source) < bound else 'train', pair


def _filled(pair: Pair) -> bool:
  return bool(pair.source.strip() and pair.target.strip())


# ---- tokenizers --------------------------------------------------------------------------------


def training_texts(
  corpus: PairCorpus, split: ByDocument, source: bool, target: bool
) -> Iterator[str]:
  """The texts to learn a vocabulary from: of the pairs to train on the sources, the targets, or
  both."""
  for side, pair in divide_pairs(corpus, split):
    if side == 'train':
      yield from (pair.source,) * source + (pair.target,) * target


def open_tokenizers(
  source: TokenizerConfig | None,
  target: TokenizerConfig,
  corpus: PairCorpus,
  split: ByDocument,
  folder: Path,
  log: Log,
) -> Tokenizer:
  """The tokenizer of both sides where `source` is None, else one for each (a `PairTokenizer`)."""
  if source is None:
    return _open_tokenizer(target, corpus, split, (True, True), folder, log)
  return PairTokenizer(
    _open_tokenizer(source, corpus, split, (True, False), folder, log),
    _open_tokenizer(target, corpus, split, (False, True), folder, log),
  )


def _open_tokenizer(
  tokenizer: TokenizerConfig,
  corpus: PairCorpus,
  split: ByDocument,
  sides: tuple[bool, bool],
  folder: Path,
  log: Log,
) -> Tokenizer:
  """One that is learned is learned once and kept in the cache folder."""
  if not tokenizer.learned:
    return tokenizer.learn(iter(()))
  key = sha256(
    f'pair tokenizer {FORMAT}',
    config.text(tokenizer),
    config.text(split),
    str(sides),
    corpus.fingerprint(folder),
  )[:32]

  def build(into: Path) -> None:
    log(f'learning the vocabulary of {tokenizer.tag} from {corpus.tag}')
    tokenizer.learn(training_texts(corpus, split, *sides)).save(into)

  def load(at: Path) -> Tokenizer | None:
    try:
      return load_tokenizer(at)
    except InputError:
      return None

  return published(folder / f'tokenizer-{key}', build, load)


# ---- building ----------------------------------------------------------------------------------


def open_pairs(
  corpus: PairCorpus, tokenizer: Tokenizer, split: ByDocument, folder: Path, log: Log
) -> PairCache:
  """The tokens of a corpus, from the cache folder or tokenised now. A cache that is cut off or
  damaged is built again.

  Raises `InputError` for a corpus that is empty or cannot be divided, and for a cache folder that
  cannot be written."""
  key = sha256(
    f'pairs {FORMAT}', corpus.fingerprint(folder), tokenizer.fingerprint(), config.text(split)
  )[:32]
  place = folder / f'pairs-{key}'
  return published(
    place, lambda into: _build(into, key, corpus, tokenizer, split, log), lambda at: _open(at, key)
  )


class _Writer:
  """Appends the texts, or the translations, of one side."""

  def __init__(self, tokenizer: Tokenizer, file: BinaryIO):
    self.tokenizer, self.file = tokenizer, file
    self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')
    self.starts = array('q', [0])
    self.bytes = 0

  def write(self, texts: list[str]) -> None:
    encoded = self.tokenizer.encode_batch(texts)
    self.file.write(np.concatenate(encoded).astype(self.dtype).tobytes())
    for ids in encoded:
      self.starts.append(self.starts[-1] + ids.size)
    self.bytes += sum(len(t.encode()) for t in texts)

  def finish(self, starts: Path) -> dict[str, Any]:
    self.file.close()
    if not self.starts[-1]:
      raise InputError(
        f'the tokenizer makes no tokens of any text for {starts.name.partition(".starts")[0]}'
      )
    np.save(starts, np.frombuffer(self.starts, np.int64))
    return {'tokens': self.starts[-1], 'bytes': self.bytes, 'dtype': self.dtype.str}


def _build(
  folder: Path, key: str, corpus: PairCorpus, tokenizer: Tokenizer, split: ByDocument, log: Log
) -> None:
  log(f'tokenising {corpus.tag} (once; kept in {folder.parent})')
  ways = {'source': source_of(tokenizer), 'target': tokenizer}
  waiting: dict[str, list[Pair]] = {side: [] for side in get_args(Side)}
  empty, logged = 0, time.monotonic()
  with ExitStack() as stack:
    writers = {
      (side, way): _Writer(of, stack.enter_context(open(folder / f'{side}.{way}.tokens', 'wb')))
      for side in waiting
      for way, of in ways.items()
    }
    held_out = stack.enter_context(open(folder / HELD_OUT, 'w', encoding='utf-8'))
    for side, pair in divide_pairs(corpus, split):
      if side is None:
        empty += 1
        continue
      waiting[side].append(pair)
      if len(waiting[side]) == BATCH_PAIRS:
        _write(writers, side, waiting[side], held_out)
        waiting[side] = []
      if time.monotonic() - logged >= LOG_SECONDS:
        log(f'tokenised {sum(w.bytes for w in writers.values()) / 1e6:,.0f} MB')
        logged = time.monotonic()
    for side, pairs in waiting.items():
      _write(writers, side, pairs, held_out)
    sides: dict[str, dict[str, Any]] = {side: {} for side in waiting}
    for (side, way), writer in writers.items():
      sides[side][way] = writer.finish(folder / f'{side}.{way}.starts.npy')
  facts = {
    p.name: {'bytes': p.stat().st_size, 'sha256': file_sha256(p)} for p in sorted(folder.iterdir())
  }
  index = {'format': FORMAT, 'key': key, 'empty': empty, 'sides': sides, 'files': facts}
  (folder / 'index.json').write_text(json.dumps(index, indent=2) + '\n')


def _write(
  writers: dict[tuple[str, str], _Writer], side: str, pairs: list[Pair], held_out: TextIO
) -> None:
  if not pairs:
    return
  writers[side, 'source'].write([p.source for p in pairs])
  writers[side, 'target'].write([p.target for p in pairs])
  if side == 'validation':
    held_out.writelines(json.dumps(p, ensure_ascii=False) + '\n' for p in pairs)


# ---- opening -----------------------------------------------------------------------------------


def _open(folder: Path, key: str) -> PairCache | None:
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
    return PairCache(
      *(_side(folder, side, index) for side in get_args(Side)), index['empty'], folder / HELD_OUT
    )
  except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
    return None


def _side(folder: Path, side: str, index: dict[str, Any]) -> PairSide:
  texts = []
  for way in ('source', 'target'):
    facts = index['sides'][side][way]
    tokens_N = np.memmap(
      folder / f'{side}.{way}.tokens', facts['dtype'], 'r', shape=(facts['tokens'],)
    )
    texts.append(
      Texts(tokens_N, np.load(folder / f'{side}.{way}.starts.npy', mmap_mode='r'), facts['bytes'])
    )
  names = (
    f'{side}.{way}.{part}' for way in ('source', 'target') for part in ('tokens', 'starts.npy')
  )
  return PairSide(*texts, sha256(*(index['files'][name]['sha256'] for name in names)))
