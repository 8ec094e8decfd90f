"""Text as batches of tokens: documents, tokenised and packed into rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data import baselines, order
from jaxformer.data.cache import Log, SplitTokens, TokenCache, open_tokenizer, open_tokens
from jaxformer.data.dataset import Dataset, DatasetConfig, process_rows, spread
from jaxformer.data.sources import Mixture, Part, Source, StandardLibrary
from jaxformer.data.splits import ByDocument, Split
from jaxformer.data.storage import cache_dir as default_cache_dir
from jaxformer.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from jaxformer.task_type import IGNORE, Batch


class Packing(Config, abstract=True):
  """How the tokens of a corpus become rows of T tokens, each with the token after it."""

  segmented: ClassVar[bool] = False

  def rows(self, tokens: int, length: int) -> int:
    """How many training rows there are; none overlap, and what is left at the end is too short for
    one."""
    return (tokens - 1) // length

  def starts(
    self, seed_key: np.uint64, index_N: Int64[np.ndarray, ' N'], tokens: int, length: int
  ) -> Int64[np.ndarray, ' N']:
    """Where the rows at positions `index_N` of training start, every row once in an epoch."""
    return order.shuffled(self.rows(tokens, length), index_N, seed_key) * length


class Packed(Packing):
  """Documents one after another, cut into rows, with segment ids so that nothing passes from one
  document to the next; the first token of a document is not predicted. No padding: a document that
  a row cuts goes on in another row as a segment of its own."""

  segmented: ClassVar[bool] = True


class Stream(Packing):
  """Documents one after another, cut into rows; the model sees across the ends of documents."""


class RandomWindows(Packing):
  """Rows that start at random places of the stream, drawn with replacement, as in nanoGPT; there
  are no epochs. Validation is as for `Stream`."""

  def rows(self, tokens: int, length: int) -> int:
    return max(tokens - length, 0)

  def starts(
    self, seed_key: np.uint64, index_N: Int64[np.ndarray, ' N'], tokens: int, length: int
  ) -> Int64[np.ndarray, ' N']:
    return order.random_below(self.rows(tokens, length), index_N, seed_key)


class DataConfig(DatasetConfig):
  """The text of an experiment, and how it becomes sequences."""

  source: Source = StandardLibrary()
  tokenizer: TokenizerConfig = Bytes()
  sequence_length: int = 256
  split: Split = ByDocument()
  packing: Packing = Packed()

  def validate(self) -> None:
    self.require(self.sequence_length >= 2, 'sequence_length', 'at least 2')

  @property
  def positions(self) -> int:
    return self.sequence_length

  @property
  def held_out(self) -> str:
    return f'{self.source.tag} validation'

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> TextDataset:
    """The corpus, tokenised: from the cache where it is there, else built now. `cache_dir` defaults
    to `$JAXFORMER_CACHE`, `$XDG_CACHE_HOME/jaxformer` or `~/.cache/jaxformer`; `log` takes lines
    about the progress. A `tokenizer` given replaces that of the config, to evaluate a run on other
    text.

    Raises `InputError` for a corpus that cannot be read, is empty, cannot be divided, or is shorter
    than one sequence."""
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    log = log or logging.getLogger('jaxformer.data').info
    parts = self.source.parts if isinstance(self.source, Mixture) else (Part(source=self.source),)
    for part in parts:
      part.source.check_cache(folder)
    tokenizer = tokenizer or open_tokenizer(self.tokenizer, self.source, self.split, folder, log)
    caches = [open_tokens(p.source, tokenizer, self.split, folder, log) for p in parts]
    for part, cache in zip(parts, caches):
      _check_length(self, part.source, cache)
    return TextDataset(
      self, tokenizer, caches, [p.weight for p in parts], self.source.manifest(folder)
    )


class DataSection(Config):
  """The section `data` of an experiment alone, for commands that need no model."""

  data: DatasetConfig = DataConfig()


def _check_length(data: DataConfig, source: Source, cache: TokenCache) -> None:
  train, validation = cache.train.tokens_N.size, cache.validation.tokens_N.size
  if data.packing.rows(train, data.sequence_length) < 1:
    raise InputError(
      f'DataConfig.sequence_length = {data.sequence_length}: the training side of {source.tag} has '
      f'{train} tokens; '
      f'must be at most {train - 1}, or the corpus larger'
    )
  if _predicted(cache.validation, data.packing.segmented) < 1:
    raise InputError(
      f'{source.tag}: the validation side has {validation} tokens, too few to predict one; '
      f'{data.split.tag}.fraction must be larger'
    )


def _predicted(side: SplitTokens, segmented: bool) -> int:
  """How many tokens are targets when the whole side is read once."""
  return side.tokens_N.size - (side.starts_D.size if segmented else 1)


class TextDataset(Dataset):
  """A tokenised corpus with its two sides. Made by `DataConfig.open`."""

  def __init__(
    self,
    data: DataConfig,
    tokenizer: Tokenizer,
    caches: Sequence[TokenCache],
    weights: Sequence[float],
    source: dict[str, Any],
  ):
    self.config = self.text = data
    self.tokenizer, self.vocab_size, self._ends = (
      tokenizer,
      tokenizer.vocab_size,
      tokenizer.end_of_document is not None,
    )
    self._train = [c.train for c in caches]
    self._validation = [c.validation for c in caches]
    self._deal = order.Interleave(weights)
    self.train_tokens = sum(s.tokens_N.size for s in self._train)
    self.validation_tokens = sum(s.tokens_N.size for s in self._validation)
    self.validation_bytes = sum(s.bytes for s in self._validation)
    self.validation_targets = sum(_predicted(s, data.packing.segmented) for s in self._validation)
    self.size = f'{self.train_tokens:,} tokens of text'
    sides = {'train': self._train, 'validation': self._validation}
    self.manifest: dict[str, Any] = {
      'source': source,
      'tokenizer': {
        'type': type(tokenizer).__name__,
        'vocab_size': self.vocab_size,
        'fingerprint': tokenizer.fingerprint(),
      },
      'sequence_length': data.sequence_length,
      'split': config.to_json(data.split),
      'packing': config.to_json(data.packing),
      **{
        name: [_facts(s) for s in side] if len(side) > 1 else _facts(side[0])
        for name, side in sides.items()
      },
    }
    # What the batches depend on; a checkpoint holds it.
    self.identity: dict[str, Any] = {
      'train': [s.sha256 for s in self._train],
      'validation': [s.sha256 for s in self._validation],
      'weights': list(weights),
      'tokenizer': tokenizer.fingerprint(),
      'sequence_length': data.sequence_length,
      'packing': data.packing.tag,
    }

  # ---- training --------------------------------------------------------------------------------

  @property
  def epoch_sequences(self) -> int:
    """The training rows of all parts; with one part and a packing that shuffles, so many
    consecutive rows show each once."""
    return sum(
      self.text.packing.rows(s.tokens_N.size, self.text.sequence_length) for s in self._train
    )

  def train_batch(
    self, step: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
  ) -> Batch:
    position_B = self._positions(step, batch_size, process_index, process_count)
    part_B, index_B = (
      self._deal(position_B) if len(self._train) > 1 else (np.zeros_like(position_B), position_B)
    )
    start_B = np.zeros_like(position_B)
    for k in np.unique(part_B):
      mine = part_B == k
      start_B[mine] = self.text.packing.starts(
        order.key(seed, 'train', int(k)),
        index_B[mine],
        self._train[k].tokens_N.size,
        self.text.sequence_length,
      )
    return self._cut(self._train, part_B, start_B)

  # ---- validation ------------------------------------------------------------------------------

  def validation_batches(
    self,
    batch_size: int,
    limit_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """Of the validation side every token is a target once, apart from the first of the stream
    (`Packed`: of each document)."""
    low, high = process_rows(batch_size, process_index, process_count)
    length, rows_K = self.text.sequence_length, self._rows_K
    part_R = np.repeat(np.arange(len(rows_K)), rows_K)
    start_R = np.concatenate([np.arange(r, dtype=np.int64) * length for r in rows_K])
    if (chosen := spread(part_R.size, batch_size, limit_batches)) is not None:
      part_R, start_R = part_R[chosen], start_R[chosen]
    missing = -part_R.size % batch_size
    part_R = np.concatenate([part_R, np.zeros(missing, part_R.dtype)])
    start_R = np.concatenate([start_R, np.full(missing, self._validation[0].tokens_N.size)])
    rows = (slice(i + low, i + high) for i in range(0, part_R.size, batch_size))
    return (self._cut(self._validation, part_R[r], start_R[r]) for r in rows)

  @property
  def validation_rows(self) -> int:
    return sum(self._rows_K)

  @property
  def _rows_K(self) -> list[int]:
    return [-(-(s.tokens_N.size - 1) // self.text.sequence_length) for s in self._validation]

  def unigram_bits_per_byte(self) -> float:
    """Bits per byte of the validation text under byte frequencies of the training text; see
    `baselines`."""
    return baselines.unigram_bits_per_byte(*self._pairs())

  def bigram_bits_per_byte(self) -> float:
    """Bits per byte of the validation text under frequencies of byte pairs of the training text;
    see `baselines`."""
    return baselines.bigram_bits_per_byte(*self._pairs())

  def _pairs(self) -> tuple[np.ndarray, np.ndarray, bool]:
    train, validation = (
      np.sum([s.pairs for s in side], axis=0) for side in (self._train, self._validation)
    )
    return train, validation, self._ends

  def _cut(self, sides: Sequence[SplitTokens], part_B: np.ndarray, start_B: np.ndarray) -> Batch:
    """The rows that start at given positions of given parts; what lies behind the last token is
    padding."""
    shape = (start_B.size, self.text.sequence_length)
    batch = Batch(
      np.empty(shape, np.int32),
      np.empty(shape, np.int32),
      np.empty(shape, np.int32) if self._segmented else None,
    )
    for k in np.unique(part_B):
      mine, side = part_B == k, sides[k]
      last = side.tokens_N.size - 1
      position_NS = start_B[mine, None] + np.arange(shape[1] + 1)
      tokens_NS = side.tokens_N[np.minimum(position_NS, last)].astype(np.int32)
      inside_NS = position_NS <= last
      target_NT = inside_NS[:, 1:]
      if batch.segments_BT is not None:
        document_NS = np.searchsorted(side.starts_D, position_NS, side='right')
        target_NT = target_NT & (document_NS[:, 1:] == document_NS[:, :-1])
        batch.segments_BT[mine] = np.where(inside_NS, document_NS - document_NS[:, :1] + 1, 0)[
          :, :-1
        ]
      batch.inputs[mine] = np.where(inside_NS, tokens_NS, 0)[:, :-1]
      batch.targets_BT[mine] = np.where(target_NT, tokens_NS[:, 1:], IGNORE)
    return batch

  @property
  def _segmented(self) -> bool:
    return self.text.packing.segmented


def _facts(side: SplitTokens) -> dict[str, Any]:
  return {
    'documents': side.documents,
    'characters': side.characters,
    'bytes': side.bytes,
    'tokens': int(side.tokens_N.size),
    'sha256': side.sha256,
  }
