"""Text as batches of tokens: documents, tokenized and packed into rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data import shuffle
from jaxformer.data.baselines import bigram_bits_per_byte, unigram_bits_per_byte
from jaxformer.data.cache import (
  CachedColumn,
  Log,
  TokenCache,
  open_corpus,
  open_tokenizer,
  training_texts,
)
from jaxformer.data.cache_folder import cache_dir as default_cache_dir
from jaxformer.data.corpora import Corpus, StandardLibrary
from jaxformer.data.dataset import Dataset, DatasetConfig
from jaxformer.data.shuffle import Index
from jaxformer.data.splits import ByDocument, Split
from jaxformer.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from jaxformer.task_type import IGNORE, Batch

LOG = logging.getLogger('jaxformer.data')


class Packing(Config, abstract=True):
  """How the tokens of a corpus become rows of T tokens, each token with the next one as target."""

  segmented: ClassVar[bool] = False

  def rows(self, tokens: int, length: int) -> int:
    """Return the number of training rows; they do not overlap, and a shorter rest is left out."""
    return (tokens - 1) // length

  def starts(self, seed_key: np.uint64, index_N: Index, tokens: int, length: int) -> Index:
    """Return where the rows at positions `index_N` of training start, every row once per epoch."""
    return shuffle.shuffled(self.rows(tokens, length), index_N, seed_key) * length


class Packed(Packing):
  """Documents one after another, cut into rows, with segment ids so that nothing passes from one
  document to the next; the first token of a document is not predicted. No padding: a document that
  a row cuts continues in another row as a segment of its own."""

  segmented: ClassVar[bool] = True


class Stream(Packing):
  """Documents one after another, cut into rows; the model sees across the ends of documents."""


class RandomWindows(Packing):
  """Rows that start at random positions of the stream, drawn with replacement, as in nanoGPT; there
  are no epochs. Validation is as for `Stream`."""

  def rows(self, tokens: int, length: int) -> int:
    return max(tokens - length, 0)

  def starts(self, seed_key: np.uint64, index_N: Index, tokens: int, length: int) -> Index:
    return shuffle.random_below(self.rows(tokens, length), index_N, seed_key)


class Text(DatasetConfig):
  """The text of an experiment, and how it becomes rows."""

  corpus: Corpus = StandardLibrary()
  tokenizer: TokenizerConfig = Bytes()
  sequence_length: int = 256
  split: Split = ByDocument()
  packing: Packing = Packed()

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

  @property
  def has_text(self) -> bool:
    return True

  @property
  def length_field(self) -> str:
    return 'sequence_length'

  def at_length(self, positions: int) -> Text:
    return self.replace(sequence_length=positions)

  def training_texts(self) -> Iterator[str]:
    return training_texts(self.corpus, self.split, (0,))

  def example(self) -> Batch:
    ids = np.zeros((1, self.sequence_length), np.int32)
    return Batch(ids, ids, ids if self.packing.segmented else None)

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> TextDataset:
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    log = log or LOG.info
    parts = self.corpus.weighted_parts()
    for part in parts:
      part.corpus.check_cache(folder)
    tokenizer = tokenizer or open_tokenizer(
      self.tokenizer, self.corpus, (0,), self.split, folder, log
    )
    caches = [open_corpus(p.corpus, [tokenizer], self.split, folder, log) for p in parts]
    for part, cache in zip(parts, caches, strict=True):
      self._check_length(part.corpus, cache)
    weights, manifest = [p.weight for p in parts], self.corpus.manifest(folder)
    return TextDataset(self, tokenizer, caches, weights, manifest)

  def _check_length(self, corpus: Corpus, cache: TokenCache) -> None:
    train, validation = (side.columns[0] for side in (cache.train, cache.validation))
    if self.packing.rows(train.tokens_N.size, self.sequence_length) < 1:
      raise InputError(
        f'{self.tag}.sequence_length',
        self.sequence_length,
        problem=f'the training side of {corpus.tag} has {train.tokens_N.size} tokens; must be at '
        f'most {train.tokens_N.size - 1}, or the corpus larger',
      )
    if _targets(validation, self.packing.segmented) < 1:
      raise InputError(
        f'{corpus.tag}: the validation side has {validation.tokens_N.size} tokens, too few to '
        f'predict one; {self.split.tag}.fraction must be larger'
      )


class DataSection(Config):
  """The section `data` of an experiment alone, for commands that need no model."""

  data: DatasetConfig = Text()


def _targets(column: CachedColumn, segmented: bool) -> int:
  """Return how many tokens are targets when the whole side is read once."""
  return column.tokens_N.size - (column.starts_R1.size - 1 if segmented else 1)


class TextDataset(Dataset):
  """A tokenized text corpus, or a mixture of them. Made by `Text.open`."""

  def __init__(
    self,
    data: Text,
    tokenizer: Tokenizer,
    caches: Sequence[TokenCache],
    weights: Sequence[float],
    corpus: dict[str, Any],
  ):
    self.config = self.text = data
    self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
    self._ends = tokenizer.end_of_document is not None
    sides = {'train': [c.train for c in caches], 'validation': [c.validation for c in caches]}
    self._train = [side.columns[0] for side in sides['train']]
    self._validation = [side.columns[0] for side in sides['validation']]
    self._interleave = shuffle.Interleave(weights)
    self.train_tokens = sum(c.tokens_N.size for c in self._train)
    self.validation_tokens = sum(c.tokens_N.size for c in self._validation)
    self.validation_bytes = sum(c.facts['bytes'] for c in self._validation)
    self.validation_targets = sum(_targets(c, data.packing.segmented) for c in self._validation)
    self.size = f'{self.train_tokens:,} tokens of text'
    facts = {n: [s.columns[0].facts | {'sha256': s.sha256} for s in of] for n, of in sides.items()}
    self.manifest: dict[str, Any] = {
      'corpus': corpus,
      'tokenizer': tokenizer.manifest(),
      'sequence_length': data.sequence_length,
      'split': config.to_json(data.split),
      'packing': config.to_json(data.packing),
      **{name: of if len(of) > 1 else of[0] for name, of in facts.items()},
    }
    self.identity: dict[str, Any] = {
      'train': [s.sha256 for s in sides['train']],
      'validation': [s.sha256 for s in sides['validation']],
      'weights': list(weights),
      'tokenizer': tokenizer.fingerprint(),
      'sequence_length': data.sequence_length,
      'packing': data.packing.tag,
    }

  @property
  def epoch_sequences(self) -> int:
    """The training rows of all parts. With one part and a packing that shuffles, that many
    consecutive rows show each once."""
    length = self.text.sequence_length
    return sum(self.text.packing.rows(c.tokens_N.size, length) for c in self._train)

  def _train_rows(self, position_B: Index, seed: int) -> Batch:
    part_B, index_B = np.zeros_like(position_B), position_B
    if len(self._train) > 1:
      part_B, index_B = self._interleave(position_B)
    start_B = np.zeros_like(position_B)
    for k in np.unique(part_B):
      chosen = part_B == k
      tokens, length = self._train[k].tokens_N.size, self.text.sequence_length
      seed_key = shuffle.key(seed, 'train', int(k))
      start_B[chosen] = self.text.packing.starts(seed_key, index_B[chosen], tokens, length)
    return self._cut(self._train, part_B, start_B)

  @property
  def validation_rows(self) -> int:
    return sum(self._rows_K)

  @property
  def _rows_K(self) -> list[int]:
    """Validation rows of each part: every token is a target once, apart from the first of the
    stream (`Packed`: of each document)."""
    return [-(-(c.tokens_N.size - 1) // self.text.sequence_length) for c in self._validation]

  def _validation_batch(self, row_B: Index) -> Batch:
    ends_K = np.cumsum(self._rows_K)
    part_B = np.where(row_B < 0, 0, np.searchsorted(ends_K, row_B, side='right'))
    start_B = (row_B - (ends_K - self._rows_K)[part_B]) * self.text.sequence_length
    unused = self._validation[0].tokens_N.size  # a row that starts here is padding
    return self._cut(self._validation, part_B, np.where(row_B < 0, unused, start_B))

  def info(self) -> list[str]:
    at = self.baselines()
    return [
      f'{self.text.title}, {self.text.tokenizer.tag} (vocabulary {self.vocab_size})',
      f'  training    {self.train_tokens:,} tokens',
      f'  validation  {self.validation_tokens:,} tokens, {self.validation_bytes:,} bytes',
      '  bits per byte of the validation text: unigram model '
      f'{at["unigram_bits_per_byte"]:.3f}, bigram {at["bigram_bits_per_byte"]:.3f}',
    ]

  def baselines(self) -> dict[str, float]:
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
    segments_BT = np.empty((B, T), np.int32) if self.text.packing.segmented else None
    for k in np.unique(part_B):
      chosen, column = part_B == k, columns[k]
      last = column.tokens_N.size - 1
      position_NS = start_B[chosen, None] + np.arange(T + 1)
      tokens_NS = column.tokens_N[np.minimum(position_NS, last)].astype(np.int32)
      inside_NS = position_NS <= last
      target_NT = inside_NS[:, 1:]
      if segments_BT is not None:
        document_NS = np.searchsorted(column.starts_R1, position_NS, side='right')
        target_NT = target_NT & (document_NS[:, 1:] == document_NS[:, :-1])
        segment_NS = np.where(inside_NS, document_NS - document_NS[:, :1] + 1, 0)
        segments_BT[chosen] = segment_NS[:, :-1]
      inputs_BT[chosen] = np.where(inside_NS, tokens_NS, 0)[:, :-1]
      targets_BT[chosen] = np.where(target_NT, tokens_NS[:, 1:], IGNORE)
    return Batch(inputs_BT, targets_BT, segments_BT)
