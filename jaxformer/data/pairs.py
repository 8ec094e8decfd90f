"""Parallel text as batches of pairs, by length: every batch is of one bucket, whose shape is one
compiled program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import order
from jaxformer.data.cache import Log
from jaxformer.data.dataset import Dataset, DatasetConfig, HeldOutPair, process_rows, spread
from jaxformer.data.pair_cache import PairCache, PairSide, open_pairs, open_tokenizers
from jaxformer.data.pair_tokenizer import source_of
from jaxformer.data.parallel import PairCorpus
from jaxformer.data.splits import ByDocument
from jaxformer.data.storage import cache_dir as default_cache_dir
from jaxformer.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from jaxformer.task_type import IGNORE, Batch, TaskType


class Pairs(DatasetConfig):
  """A parallel corpus, and how it becomes batches.

  Buckets are given by the lengths of their rows, in tokens with the end of the document: a pair
  goes into the first where both its texts fit. A pair that fits none is left out of training and
  validation; the manifest counts them.

  A batch holds rows of one bucket. `training.batch_size` is the number of rows in the last bucket;
  one whose rows have a k-th of the last one's positions, source and target together, has floor(k)
  times as many. So all batches have about the same number of positions, and what divides
  `training.batch_size` divides every batch. Buckets take turns in proportion to the batches that
  they hold; within each, every epoch is a new order.

  Attributes:
    tokenizer: of translations.
    source_tokenizer: of the texts to translate; None for the same tokenizer, which is then learned
      on both.
    source_lengths, target_lengths: of the buckets, ascending.
    split: pairs of one document stay together; where the corpus names no documents, pairs with the
      same source.
  """

  corpus: PairCorpus
  tokenizer: TokenizerConfig = Bytes()
  source_tokenizer: TokenizerConfig | None = None
  source_lengths: tuple[int, ...] = (64, 128, 256)
  target_lengths: tuple[int, ...] = (64, 128, 256)
  split: ByDocument = ByDocument()

  def validate(self) -> None:
    for field in ('source_lengths', 'target_lengths'):
      lengths = getattr(self, field)
      self.require(bool(lengths) and min(lengths) >= 2, field, 'one or more lengths of at least 2')
      self.require(list(lengths) == sorted(lengths), field, 'ascending')
    self.require(
      len(self.target_lengths) == len(self.source_lengths),
      'target_lengths',
      f'as many as source_lengths, of which there are {len(self.source_lengths)}',
    )
    shapes = list(zip(self.source_lengths, self.target_lengths, strict=True))
    self.require(len(set(shapes)) == len(shapes), 'source_lengths', 'different buckets')

  @property
  def positions(self) -> int:
    return self.target_lengths[-1]

  @property
  def max_len(self) -> int:
    return max(self.source_lengths[-1], self.target_lengths[-1])

  @property
  def one_shape(self) -> bool:
    return len(self.source_lengths) == 1

  @property
  def task(self) -> TaskType:
    return TaskType(inputs='pairs')

  @property
  def held_out(self) -> str:
    return f'{self.corpus.tag} validation'

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> PairDataset:
    """The corpus, tokenised: from the cache where it is there, else built now. The arguments are
    those of `open_data`.

    Raises `InputError` for a corpus that cannot be read, is empty, cannot be divided, or has no
    pair that fits a bucket."""
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    log = log or logging.getLogger('jaxformer.data').info
    tokenizer = tokenizer or open_tokenizers(
      self.source_tokenizer, self.tokenizer, self.corpus, self.split, folder, log
    )
    cache = open_pairs(self.corpus, tokenizer, self.split, folder, log)
    return PairDataset(self, tokenizer, cache, self.corpus.manifest(folder))


class Buckets:
  """The pairs of one side by length."""

  def __init__(self, data: Pairs, side: PairSide):
    self.shapes = list(zip(data.source_lengths, data.target_lengths, strict=True))
    self.side = side
    of_source_P = np.searchsorted(data.source_lengths, side.source.lengths_P + 1)
    bucket_P = np.maximum(
      of_source_P, np.searchsorted(data.target_lengths, side.target.lengths_P + 1)
    )
    # Of each bucket, the numbers of its pairs.
    self.members = [np.flatnonzero(bucket_P == b) for b in range(len(self.shapes))]
    self.fitting = sum(m.size for m in self.members)
    self.too_long = side.pairs - self.fitting

  def rows(self, batch_size: int) -> list[int]:
    """Rows of a training batch, by bucket."""
    last = sum(self.shapes[-1])
    return [batch_size * (last // sum(shape)) for shape in self.shapes]

  def facts(self) -> dict[str, Any]:
    side = self.side
    return {
      'pairs': side.pairs,
      'too_long': self.too_long,
      'source': {'tokens': int(side.source.tokens_N.size), 'bytes': side.source.bytes},
      'target': {'tokens': int(side.target.tokens_N.size), 'bytes': side.target.bytes},
      'buckets': [
        {'source': s, 'target': t, 'pairs': int(m.size)}
        for (s, t), m in zip(self.shapes, self.members, strict=True)
      ],
      'sha256': side.sha256,
    }


class PairDataset(Dataset):
  """A tokenised parallel corpus with its two sides. Made by `Pairs.open`."""

  def __init__(self, data: Pairs, tokenizer: Tokenizer, cache: PairCache, corpus: dict[str, Any]):
    self.config = self.data = data
    self.tokenizer, self.source_tokenizer = tokenizer, source_of(tokenizer)
    self.vocab_size, self.source_vocab_size = (
      self.tokenizer.vocab_size,
      self.source_tokenizer.vocab_size,
    )
    self._ends = end_of(self.source_tokenizer, 'source_tokenizer'), end_of(tokenizer, 'tokenizer')
    self._cache = cache
    self._train, self._validation = Buckets(data, cache.train), Buckets(data, cache.validation)
    for name, side in (('train', self._train), ('validation', self._validation)):
      if not side.fitting:
        longest = ' and '.join(map(str, side.shapes[-1]))
        raise InputError(
          f'Pairs.source_lengths, target_lengths: none of the {side.side.pairs:,} pairs for {name} '
          'of '
          f'{data.corpus.tag} fits {longest} tokens; the last lengths must be larger'
        )
    # Batches that each bucket holds, up to a factor that all share: a bucket without pairs never
    # has its turn.
    self._used = [b for b, m in enumerate(self._train.members) if m.size]
    multiples = self._train.rows(1)
    self._deal = order.Interleave([self._train.members[b].size / multiples[b] for b in self._used])
    left = self._train.too_long
    self.size = f'{self._train.fitting:,} pairs of texts' + (
      f' ({left:,} left out as too long)' if left else ''
    )
    self.manifest: dict[str, Any] = {
      'corpus': corpus,
      'tokenizer': _tokenizer_facts(self.tokenizer),
      'source_tokenizer': _tokenizer_facts(self.source_tokenizer),
      'split': config.to_json(data.split),
      'empty': cache.empty,
      'train': self._train.facts(),
      'validation': self._validation.facts(),
    }
    # What the batches depend on; a checkpoint holds it.
    self.identity: dict[str, Any] = {
      'train': cache.train.sha256,
      'validation': cache.validation.sha256,
      'tokenizer': tokenizer.fingerprint(),
      'source_lengths': list(data.source_lengths),
      'target_lengths': list(data.target_lengths),
    }

  # ---- training --------------------------------------------------------------------------------

  def epoch_steps(self, batch_size: int) -> float:
    """Steps in which training shows as many pairs as there are."""
    return sum(
      m.size / r for m, r in zip(self._train.members, self._train.rows(batch_size), strict=True)
    )

  def train_batch(
    self, step: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
  ) -> Batch:
    if step < 0:
      raise InputError(f'step = {step}: must be 0 or more')
    (used,), (turn,) = self._deal(np.array([step], np.int64))
    bucket = self._used[int(used)]
    members, rows = self._train.members[bucket], self._train.rows(batch_size)[bucket]
    process_rows(batch_size, process_index, process_count)
    low, high = process_rows(rows, process_index, process_count)
    position_B = np.int64(turn) * rows + np.arange(low, high, dtype=np.int64)
    return self._batch(
      self._train,
      bucket,
      members[order.shuffled(members.size, position_B, order.key(seed, 'pairs', bucket))],
    )

  # ---- validation ------------------------------------------------------------------------------

  def validation_batches(
    self,
    batch_size: int,
    limit_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """Bucket after bucket, of `batch_size` rows each, in an order without a pattern so that a part
    of them is a sample."""
    low, high = process_rows(batch_size, process_index, process_count)
    key = order.key(0, 'held out')
    batches = [
      (b, m[order.shuffled(m.size, np.arange(i, min(i + batch_size, m.size)), key)])
      for b, m in enumerate(self._validation.members)
      for i in range(0, m.size, batch_size)
    ]
    if spread(self._validation.fitting, batch_size, limit_batches) is not None:
      chosen = spread(len(batches), 1, limit_batches)
      batches = batches if chosen is None else [batches[i] for i in chosen]
    for bucket, index in batches:
      filled = np.concatenate([index, np.repeat(index[:1], batch_size - index.size)])[low:high]
      batch = self._batch(self._validation, bucket, filled)
      batch.targets_BT[max(index.size - low, 0) :] = IGNORE
      yield batch

  @property
  def validation_rows(self) -> int:
    return self._validation.fitting

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    texts, source = self._cache.held_out_texts(), self._cache.validation.source
    index = np.sort(np.concatenate(self._validation.members))
    if (chosen := spread(index.size, 1, limit)) is not None:
      index = index[chosen]
    end = np.int32(self._ends[0])
    return [
      HeldOutPair(np.append(source.ids(i), end), texts[i].source, texts[i].target)
      for i in index.tolist()
    ]

  def _batch(self, buckets: Buckets, bucket: int, index_B: Int64[np.ndarray, ' B']) -> Batch:
    """The pairs with these numbers, as rows of a bucket."""
    side, (S, T) = buckets.side, buckets.shapes[bucket]
    return pair_batch(
      *([t.ids(i) for i in index_B.tolist()] for t in (side.source, side.target)),
      (S, T),
      self._ends,
    )


def end_of(tokenizer: Tokenizer, field: str) -> int:
  """The token that texts and translations end with. Raises `InputError` where there is none."""
  if tokenizer.end_of_document is None:
    raise InputError(
      f'Pairs.{field}: has no token for the end of a document, which every text ends with; Bytes '
      'and BytePairs do'
    )
  return tokenizer.end_of_document


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
  return {
    'type': type(tokenizer).__name__,
    'vocab_size': tokenizer.vocab_size,
    'fingerprint': tokenizer.fingerprint(),
  }


def pair_batch(
  sources: list[np.ndarray],
  targets: list[np.ndarray],
  shape: tuple[int, int],
  ends: tuple[int, int],
) -> Batch:
  """Texts and their translations, without ends, as rows of S and T tokens with the ends of source
  and target."""
  source_BS = np.full((len(sources), shape[0]), IGNORE, np.int32)
  tokens_BT = np.zeros((len(sources), shape[1]), np.int32)
  targets_BT = np.full(tokens_BT.shape, IGNORE, np.int32)
  tokens_BT[:, 0] = ends[1]
  for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
    source_BS[row, : source.size], source_BS[row, source.size] = source, ends[0]
    tokens_BT[row, 1 : target.size + 1] = target
    targets_BT[row, : target.size], targets_BT[row, target.size] = target, ends[1]
  return Batch(tokens_BT, targets_BT, source_BS=source_BS)
