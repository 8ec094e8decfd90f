"""Pairs of texts as batches by length: every batch is of one bucket, whose shape is one compiled
program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import shuffle
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
from jaxformer.data.corpora import Corpus
from jaxformer.data.dataset import (
  Dataset,
  DatasetConfig,
  Earlier,
  HeldOutPair,
  pair_batch,
  process_rows,
  rows_before,
  spread,
)
from jaxformer.data.missing import Missing, missing_of
from jaxformer.data.shuffle import Index
from jaxformer.data.splits import ByDocument
from jaxformer.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from jaxformer.task_type import Batch, TaskType


class Pairs(DatasetConfig):
  """A corpus of sources and translations, and how it becomes batches.

  Buckets are given by the lengths of their rows, in tokens with the end of the document: a pair
  goes into the first where both its texts fit. A pair that fits none is left out of training and
  validation; the manifest counts them.

  A batch holds rows of one bucket, and its size scales inversely with the lengths of the bucket, so
  that all batches have about the same number of positions: `training.batch_size` is the number of
  rows in the last bucket; a bucket whose rows have 1/k of its positions, source and target
  together, has floor(k) times as many. So a divisor of `training.batch_size` divides every batch.
  Buckets take turns in proportion to the batches that they hold; within each, every epoch is a new
  order.

  Attributes:
    tokenizer: of translations.
    source_tokenizer: of sources; None for the same tokenizer, which is then trained on both.
    source_lengths, target_lengths: of the buckets, ascending.
    split: pairs of one document stay together; where the corpus names no documents, pairs with the
      same source.
  """

  has_text: ClassVar[bool] = True

  corpus: Corpus
  tokenizer: TokenizerConfig = Bytes()
  source_tokenizer: TokenizerConfig | None = None
  source_lengths: tuple[int, ...] = (64, 128, 256)
  target_lengths: tuple[int, ...] = (64, 128, 256)
  split: ByDocument = ByDocument()

  def validate(self) -> None:
    self.require(self.corpus.columns == 2, 'corpus', 'a corpus of pairs: Tsv, TwoFiles or Records')
    for field in ('source_lengths', 'target_lengths'):
      lengths = getattr(self, field)
      self.require(bool(lengths) and min(lengths) >= 2, field, 'one or more lengths of at least 2')
      self.require(list(lengths) == sorted(lengths), field, 'ascending')
    self.require(
      len(self.target_lengths) == len(self.source_lengths),
      'target_lengths',
      f'as many as source_lengths, of which there are {len(self.source_lengths)}',
    )
    self.require(len(set(self.shapes)) == len(self.shapes), 'source_lengths', 'different buckets')

  @property
  def shapes(self) -> list[tuple[int, int]]:
    """(S, T) of each bucket."""
    return list(zip(self.source_lengths, self.target_lengths, strict=True))

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
  def validation_name(self) -> str:
    return f'{self.corpus.tag} validation'

  def training_texts(self) -> Iterator[str]:
    return training_texts(self.corpus, self.split, (0, 1))

  def missing(self) -> dict[str, Missing]:
    return missing_of(
      tokenizer=self.tokenizer, source_tokenizer=self.source_tokenizer, corpus=self.corpus
    )

  def example(self) -> Batch:
    source, target = (np.zeros((1, n), np.int32) for n in self.shapes[-1])
    return Batch(target, target, source_BS=source)

  def open(self, folder: Path, log: Log, tokenizer: Tokenizer | None) -> PairDataset:
    def opened(of: TokenizerConfig, *columns: int) -> Tokenizer:
      return open_tokenizer(of, self.corpus, columns, self.split, folder, log)

    if tokenizer is None:
      source = self.source_tokenizer
      tokenizer = opened(self.tokenizer, *((0, 1) if source is None else (1,)))
      tokenizer = tokenizer if source is None else tokenizer.with_source(opened(source, 0))
    for of, field in ((tokenizer.source, 'source_tokenizer'), (tokenizer, 'tokenizer')):
      if of.end_of_document is None:
        raise InputError(
          f'{self.tag}.{field}: has no token for the end of a document, which every text ends '
          'with; Bytes and BytePairs have one'
        )
    (cache,) = open_parts(self.corpus, [tokenizer.source, tokenizer], self.split, folder, log)
    return PairDataset(self, tokenizer, cache, self.corpus.manifest(folder))


class Buckets:
  """The pairs of one side by length.

  Attributes:
    members: of each bucket, the numbers of its pairs.
    fitting, too_long: how many pairs are in a bucket, and how many in none.
  """

  def __init__(self, data: Pairs, name: str, side: tuple[CachedColumn, ...]):
    self.shapes, self.side = data.shapes, side
    source, target = side
    bucket_R = np.maximum(
      np.searchsorted(data.source_lengths, np.diff(source.starts_R1)),
      np.searchsorted(data.target_lengths, np.diff(target.starts_R1)),
    )
    self.members = [np.flatnonzero(bucket_R == b) for b in range(len(self.shapes))]
    self.fitting = sum(m.size for m in self.members)
    self.too_long = source.rows - self.fitting
    if not self.fitting:
      longest = ' and '.join(map(str, self.shapes[-1]))
      raise InputError(
        f'{data.tag}.source_lengths, target_lengths: none of the {source.rows:,} pairs for {name} '
        f'of {data.corpus.tag} fits {longest} tokens; the last lengths must be larger'
      )

  def batch_rows(self, batch_size: int) -> list[int]:
    """Return the rows of a training batch, by bucket."""
    last = sum(self.shapes[-1])
    return [batch_size * (last // sum(shape)) for shape in self.shapes]

  def batch(self, bucket: int, row_B: Index) -> Batch:
    """Return the pairs with these numbers, in the shape of a bucket."""
    sources, targets = ([c.ids(i) for i in row_B.tolist()] for c in self.side)
    return pair_batch(sources, targets, *self.shapes[bucket])

  def manifest(self) -> dict[str, Any]:
    """Return the counts of pairs and, without ends of documents, of tokens."""
    source, target = (
      {'tokens': c.tokens_N.size - c.rows} | {n: c.facts[n] for n in ('bytes', 'sha256')}
      for c in self.side
    )
    return {
      'pairs': self.side[0].rows,
      'too_long': self.too_long,
      'source': source,
      'target': target,
      'buckets': [
        {'source': s, 'target': t, 'pairs': m.size}
        for (s, t), m in zip(self.shapes, self.members, strict=True)
      ],
    }


class PairDataset(Dataset):
  """A tokenized corpus of pairs. Made by `Pairs.open`."""

  def __init__(self, data: Pairs, tokenizer: Tokenizer, cache: TokenCache, corpus: dict[str, Any]):
    self.config = data
    self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
    self.source_vocab_size = tokenizer.source.vocab_size
    self._cache = cache
    self._train = Buckets(data, 'train', cache.train)
    self._validation = Buckets(data, 'validation', cache.validation)
    # Buckets take turns in proportion to the batches that they hold; one without pairs has none.
    self._used = [b for b, m in enumerate(self._train.members) if m.size]
    rows = self._train.batch_rows(1)
    self._interleaved = shuffle.interleave(
      [self._train.members[b].size / rows[b] for b in self._used]
    )
    left_out = self._train.too_long
    self.size = f'{self._train.fitting:,} pairs of texts' + (
      f' ({left_out:,} left out as too long)' if left_out else ''
    )
    self.size += skipped_note([cache])
    self.manifest: dict[str, Any] = {
      'corpus': corpus,
      'tokenizer': tokenizer.manifest(),
      'source_tokenizer': tokenizer.source.manifest(),
      'split': config.to_json(data.split),
      'empty': cache.empty,
      'skipped': cache.skipped,
      'train': self._train.manifest(),
      'validation': self._validation.manifest(),
    }
    self.identity: dict[str, Any] = {
      'train': [c.facts['sha256'] for c in cache.train],
      'validation': [c.facts['sha256'] for c in cache.validation],
      'tokenizer': tokenizer.fingerprint(),
      'source_lengths': list(data.source_lengths),
      'target_lengths': list(data.target_lengths),
    }
    self.validation_sha256 = sha256(*self.identity['validation'])

  def info(self) -> list[str]:
    lines = [
      f'{self.manifest["corpus"]["type"]}, vocabulary {self.source_vocab_size} to '
      f'{self.vocab_size}; {self._cache.empty:,} pairs left out with an empty text'
      + skipped_note([self._cache])
    ]
    for name in ('train', 'validation'):
      side = self.manifest[name]
      lines.append(
        f'  {name:<10}  {side["pairs"]:,} pairs, {side["source"]["tokens"]:,} tokens to '
        f'{side["target"]["tokens"]:,}; {side["too_long"]:,} left out as too long'
      )
      lines += [f'    {b["pairs"]:>10,} in {b["source"]} x {b["target"]}' for b in side['buckets']]
    return lines

  def train_batch(
    self,
    step: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    earlier: Earlier = (),
  ) -> Batch:
    if step < 0:
      raise InputError('step', step, 'at least 0')
    process_rows(batch_size, process_index, process_count)
    used, turn = self._turn(step)
    bucket = self._used[used]
    # the turns of this bucket before those steps, in place of the steps
    turns = [(self._turns_before(until, used), size) for until, size in earlier]
    k = self._train.batch_rows(1)[bucket]
    low, high = process_rows(k * batch_size, process_index, process_count)
    first = k * rows_before(turn, batch_size, turns)
    position_B = np.int64(first) + np.arange(low, high, dtype=np.int64)
    members = self._train.members[bucket]
    seed_key = shuffle.key(seed, 'pairs', bucket)
    return self._train.batch(bucket, members[shuffle.shuffled(members.size, position_B, seed_key)])

  def _turn(self, step: int) -> tuple[int, int]:
    """Return which of the used buckets has a step, and how many earlier steps it had."""
    (used,), (turn,) = self._interleaved(np.array([step], np.int64))
    return int(used), int(turn)

  def _turns_before(self, step: int, used: int) -> int:
    """Return how many steps before one a bucket had: what its next step, which is at most one cycle
    ahead, says of itself."""
    used_S, turn_S = self._interleaved(step + np.arange(shuffle.SLOTS, dtype=np.int64))
    return int(turn_S[np.argmax(used_S == used)])

  @property
  def validation_rows(self) -> int:
    return self._validation.fitting

  def _validation_plan(self, batch_size: int, limit_batches: int | None) -> Iterable[Index]:
    """Bucket after bucket, in an order without a pattern so that a part of them is a sample."""
    seed_key, plan = shuffle.key(0, 'held out'), []
    for members in self._validation.members:
      for i in range(0, members.size, batch_size):
        position_B = np.arange(i, min(i + batch_size, members.size))
        row_B = members[shuffle.shuffled(members.size, position_B, seed_key)]
        plan.append(np.pad(row_B, (0, batch_size - row_B.size), constant_values=~row_B[0]))
    if spread(self.validation_rows, batch_size, limit_batches).size < self.validation_rows:
      return [plan[i] for i in spread(len(plan), 1, limit_batches)]
    return plan

  def _held_out(self, row_B: Index) -> Batch:
    bucket = next(b for b, m in enumerate(self._validation.members) if row_B[0] in m)
    return self._validation.batch(bucket, row_B)

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    texts, source = self._cache.validation_texts(), self._cache.validation[0]
    row_R = np.sort(np.concatenate(self._validation.members))
    chosen = row_R[spread(row_R.size, 1, limit)].tolist()
    return [HeldOutPair(source.ids(i), *texts[i]) for i in chosen]
