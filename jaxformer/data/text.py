"""Text as batches of tokens: documents, tokenized and packed into rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data import shuffle
from jaxformer.data.baselines import bigram_bits_per_byte, unigram_bits_per_byte
from jaxformer.data.cache import (
  CachedColumn,
  Log,
  TokenCache,
  open_parts,
  open_tokenizer,
  skipped_note,
  training_texts,
)
from jaxformer.data.cache_folder import sha256
from jaxformer.data.corpora import Corpus, StandardLibrary
from jaxformer.data.dataset import Dataset, DatasetConfig
from jaxformer.data.missing import Missing, missing_of
from jaxformer.data.shuffle import Index
from jaxformer.data.splits import ByDocument, Split
from jaxformer.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from jaxformer.task_type import IGNORE, Batch


class Text(DatasetConfig):
  """The text of an experiment, and how it becomes rows of T tokens, each token with the next one as
  target.

  Attributes:
    sequence_length: T.
    packing: how rows are cut from the documents of the corpus, one after another without padding:

      - `packed`: one row after another, with segment ids so that nothing passes from one document
        to the next; the first token of a document is not predicted. A document that a row cuts
        continues in another row as a segment of its own.
      - `stream`: one row after another; the model sees across the ends of documents. A token that
        begins documents is not predicted.
      - `random_windows`: rows start at random positions, drawn with replacement, as in nanoGPT;
        there are no epochs. Validation is as for `stream`.
  """

  length_field: ClassVar[str] = 'sequence_length'
  has_text: ClassVar[bool] = True

  corpus: Corpus = StandardLibrary()
  tokenizer: TokenizerConfig = Bytes()
  sequence_length: int = 256
  split: Split = ByDocument()
  packing: Literal['packed', 'stream', 'random_windows'] = 'packed'

  def validate(self) -> None:
    self.require(self.sequence_length >= 2, 'sequence_length', 'at least 2')
    self.require(self.corpus.columns == 1, 'corpus', 'a corpus of one text per row')

  @property
  def positions(self) -> int:
    return self.sequence_length

  @property
  def title(self) -> str:
    return self.corpus.tag

  @property
  def validation_name(self) -> str:
    return f'{self.corpus.tag} validation'

  def missing(self) -> dict[str, Missing]:
    return missing_of(tokenizer=self.tokenizer, corpus=self.corpus)

  def at_length(self, positions: int) -> Text:
    return self.replace(sequence_length=positions)

  @property
  def segmented(self) -> bool:
    """Whether rows have segment ids."""
    return self.packing == 'packed'

  def train_rows(self, tokens: int) -> int:
    """Return the number of training rows in some tokens; except for random windows they do not
    overlap, and a shorter rest is left out."""
    if self.packing == 'random_windows':
      return max(tokens - self.sequence_length, 0)
    return (tokens - 1) // self.sequence_length

  def row_starts(self, tokens: int, position_N: Index, seed_key: np.uint64) -> Index:
    """Return where the rows at some positions of training start, every row once per epoch."""
    rows = self.train_rows(tokens)
    if self.packing == 'random_windows':
      return shuffle.random_below(rows, position_N, seed_key)
    return shuffle.shuffled(rows, position_N, seed_key) * self.sequence_length

  def training_texts(self) -> Iterator[str]:
    return training_texts(self.corpus, self.split, (0,))

  def example(self) -> Batch:
    ids = np.zeros((1, self.sequence_length), np.int32)
    return Batch(ids, ids, ids if self.segmented else None)

  def open(self, folder: Path, log: Log, tokenizer: Tokenizer | None) -> TextDataset:
    corpora = self.corpus.parts()
    for corpus in corpora:
      corpus.check_cache(folder)
    tokenizer = tokenizer or open_tokenizer(
      self.tokenizer, self.corpus, (0,), self.split, folder, log
    )
    caches = open_parts(self.corpus, [tokenizer], self.split, folder, log)
    for corpus, cache in zip(corpora, caches, strict=True):
      self._check_train(corpus, cache.train[0])
    self._check_validation([c.validation[0] for c in caches], self.masks_starts(tokenizer))
    return TextDataset(self, tokenizer, caches, self.corpus.manifest(folder))

  def masks_starts(self, tokenizer: Tokenizer) -> bool:
    """Whether the first tokens of documents are no targets."""
    return self.segmented or tokenizer.beginning_of_document is not None

  def _check_train(self, corpus: Corpus, train: CachedColumn) -> None:
    if not train.rows:
      raise InputError(
        f'{corpus.named}: all its documents are on the validation side; {self.split.tag}.fraction '
        'must be smaller, or the corpus larger'
      )
    if self.train_rows(train.tokens_N.size) < 1:
      raise InputError(
        f'{self.tag}.sequence_length',
        self.sequence_length,
        problem=f'the training side of {corpus.named} has {train.tokens_N.size} tokens; must be at '
        f'most {train.tokens_N.size - 1}, or the corpus larger',
      )

  def _check_validation(self, columns: Sequence[CachedColumn], masked: bool) -> None:
    tokens = sum(c.tokens_N.size for c in columns)
    if tokens <= sum(c.rows if masked else min(c.rows, 1) for c in columns):
      raise InputError(
        f'{self.corpus.tag}: the validation side has {tokens} tokens, too few to predict one; '
        f'{self.split.tag}.fraction must be larger'
      )


class DataSection(Config):
  """The section `data` of an experiment alone, for commands that need no model."""

  data: DatasetConfig = Text()


class TextDataset(Dataset):
  """A tokenized text corpus, or a mixture of them. Made by `Text.open`."""

  def __init__(
    self, data: Text, tokenizer: Tokenizer, caches: Sequence[TokenCache], corpus: dict[str, Any]
  ):
    self.config = self.text = data
    self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
    self._ends = tokenizer.end_of_document is not None
    self._caches = caches
    self._masked = data.masks_starts(tokenizer)
    self._train = [c.train[0] for c in caches]
    # A small part of a mixture can have no validation text.
    self._validation = [c.validation[0] for c in caches if c.validation[0].rows]
    weights = data.corpus.part_weights()
    self._interleaved = shuffle.interleave(weights)
    self.train_tokens = sum(c.tokens_N.size for c in self._train)
    sides = [c.train for c in caches], [c.validation for c in caches]
    self.size = f'{self.train_tokens:,} tokens of text' + skipped_note(caches)
    train, validation = ([columns[0].facts for columns in side] for side in sides)
    self._facts: dict[str, Any] = {
      'corpus': corpus,
      'tokenizer': tokenizer.manifest(),
      'sequence_length': data.sequence_length,
      'split': config.to_json(data.split),
      'packing': data.packing,
      'empty': sum(c.empty for c in caches),
      'skipped': sum(c.skipped for c in caches),
      'train': train if len(train) > 1 else train[0],
      'validation': validation if len(validation) > 1 else validation[0],
    }
    self.identity: dict[str, Any] = {
      'train': [f['sha256'] for f in train],
      'validation': [f['sha256'] for f in validation],
      'weights': list(weights),
      'tokenizer': tokenizer.fingerprint(),
      'sequence_length': data.sequence_length,
      'packing': data.packing,
    }
    self.validation_sha256 = sha256(*self.identity['validation'])

  def _train_rows(self, position_B: Index, seed: int) -> Batch:
    part_B, index_B = np.zeros_like(position_B), position_B
    if len(self._train) > 1:
      part_B, index_B = self._interleaved(position_B)
    start_B = np.zeros_like(position_B)
    for k in np.unique(part_B):
      chosen = part_B == k
      tokens, seed_key = self._train[k].tokens_N.size, shuffle.key(seed, 'train', int(k))
      start_B[chosen] = self.text.row_starts(tokens, index_B[chosen], seed_key)
    return self._cut(self._train, part_B, start_B)

  @property
  def validation_rows(self) -> int:
    return sum(self._rows_K)

  @property
  def _rows_K(self) -> list[int]:
    """Validation rows of each part: every token is a target once, apart from the first of the
    stream, or of each document where that is no target."""
    return [-(-(c.tokens_N.size - 1) // self.text.sequence_length) for c in self._validation]

  def _validation_batch(self, row_B: Index) -> Batch:
    ends_K = np.cumsum(self._rows_K)
    part_B = np.where(row_B < 0, 0, np.searchsorted(ends_K, row_B, side='right'))
    start_B = (row_B - (ends_K - self._rows_K)[part_B]) * self.text.sequence_length
    unused = self._validation[0].tokens_N.size  # a row that starts here is padding
    return self._cut(self._validation, part_B, np.where(row_B < 0, unused, start_B))

  def info(self) -> list[str]:
    at = self.baselines()
    tokens, size = (sum(c.facts[n] for c in self._validation) for n in ('tokens', 'bytes'))
    return [
      f'{self.text.title}, {self.text.tokenizer.tag} (vocabulary {self.vocab_size})'
      + skipped_note(self._caches),
      f'  training    {self.train_tokens:,} tokens',
      f'  validation  {tokens:,} tokens, {size:,} bytes',
      '  bits per byte of the validation text: unigram model '
      f'{at["unigram_bits_per_byte"]:.3f}, bigram {at["bigram_bits_per_byte"]:.3f}',
    ]

  @functools.cached_property
  def manifest(self) -> dict[str, Any]:
    return self._facts | self.baselines()

  def baselines(self) -> dict[str, float]:
    return self._baselines

  @functools.cached_property
  def _baselines(self) -> dict[str, float]:
    train, validation = (
      np.sum([c.pairs for c in side], axis=0) for side in (self._train, self._validation)
    )
    return {
      'unigram_bits_per_byte': unigram_bits_per_byte(train, validation, self._ends),
      'bigram_bits_per_byte': bigram_bits_per_byte(train, validation, self._ends),
    }

  def _cut(self, columns: Sequence[CachedColumn], part_B: Index, start_B: Index) -> Batch:
    """Return the rows that start at some positions of some parts; positions after the last token
    are padding."""
    B, T = start_B.size, self.text.sequence_length
    inputs_BT, targets_BT = np.empty((B, T), np.int32), np.empty((B, T), np.int32)
    segments_BT = np.empty((B, T), np.int32) if self.text.segmented else None
    for k in np.unique(part_B):
      chosen, column = part_B == k, columns[k]
      last = column.tokens_N.size - 1
      position_NS = start_B[chosen, None] + np.arange(T + 1)
      tokens_NS = column.tokens_N[np.minimum(position_NS, last)].astype(np.int32)
      inside_NS = position_NS <= last
      target_NT = inside_NS[:, 1:]
      if self._masked:
        document_NS = np.searchsorted(column.starts_R1, position_NS, side='right')
        target_NT = target_NT & (document_NS[:, 1:] == document_NS[:, :-1])
      if segments_BT is not None:
        segment_NS = np.where(inside_NS, document_NS - document_NS[:, :1] + 1, 0)
        segments_BT[chosen] = segment_NS[:, :-1]
      inputs_BT[chosen] = np.where(inside_NS, tokens_NS, 0)[:, :-1]
      targets_BT[chosen] = np.where(target_NT, tokens_NS[:, 1:], IGNORE)
    return Batch(inputs_BT, targets_BT, segments_BT)
