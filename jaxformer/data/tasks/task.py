"""What a task is: sequences that a program makes or a package brings, and what is asked of them.

A task is one file in this folder: a config type whose `rows` gives the sequences at some numbers,
  as a pure function of the
config, the side and the numbers. Everything else (order, hosts, resuming, a last batch that is not
full) is here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt64

from jaxformer import config
from jaxformer.data import order
from jaxformer.data.cache import Log
from jaxformer.data.dataset import Dataset, DatasetConfig, process_rows, spread
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.task_type import IGNORE, Batch

Side = Literal['train', 'test']
ENDLESS = 2**62  # numbers of training sequences where a task has no end of them: none comes twice
HASHED = 2**20  # positions of each side that a fingerprint is of, at most
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class TaskConfig(DatasetConfig, abstract=True):
  """Base of the tasks. A new one says `task`, `positions`, `train_rows`, `test_rows` and `rows`."""

  @property
  def train_rows(self) -> int | None:
    """How many training sequences there are, shown in another order every epoch; None where they
    are made without end."""
    raise NotImplementedError

  @property
  def test_rows(self) -> int:
    """How many sequences score a model."""
    raise NotImplementedError

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    """The sequences of a side with these numbers, from 0. The same whatever else is asked for, and
    on any machine."""
    raise NotImplementedError

  def fingerprint(self) -> str:
    """A hash (hex) that changes when the sequences do: of the first of each side, fewer of very
    long ones."""
    count = min(64, max(1, HASHED // self.positions))
    return hash_of(
      self.rows('train', np.arange(count)), self.rows('test', np.arange(min(count, self.test_rows)))
    )

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> TaskDataset:
    return TaskDataset(self)


class GeneratedTask(TaskConfig, abstract=True):
  """Base of the tasks whose sequences a program makes.

  Many have a `length`. The same task at another length is `replace(length=...)`, and `jaxformer
  eval RUN --data.length N` scores a trained model there.

  Attributes:
    train_sequences: how many are shown over and over; None for no end of them.
    test_sequences: how many score a model.
    seed: of all of them.
  """

  train_sequences: int | None = None
  test_sequences: int = 1000
  seed: int = 0

  def validate(self) -> None:
    endless = self.train_sequences is None
    self.require(
      endless or self.train_sequences > 0, 'train_sequences', 'positive, or none for no end of them'
    )
    self.require(self.test_sequences > 0, 'test_sequences', 'positive')

  @property
  def train_rows(self) -> int | None:
    return self.train_sequences

  @property
  def test_rows(self) -> int:
    return self.test_sequences


class TaskDataset(Dataset):
  """A task as something to train on and to be scored by. Made by `TaskConfig.open`."""

  def __init__(self, task: TaskConfig):
    self.config = self.task = task
    self.tokenizer, self.vocab_size = None, task.task.vocab_size
    rows, sha256 = task.train_rows, task.fingerprint()
    self.size = (
      f'sequences of {task.tag} without end'
      if rows is None
      else f'{rows:,} sequences of {task.tag}'
    )
    self.manifest: dict[str, Any] = {
      'task': config.to_json(task),
      'train': rows,
      'test': task.test_rows,
      'sha256': sha256,
    }
    self.identity: dict[str, Any] = {'task': config.to_json(task), 'sha256': sha256}

  def train_batch(
    self, step: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
  ) -> Batch:
    position_B = self._positions(step, batch_size, process_index, process_count)
    key, rows = order.key(seed, 'task'), self.task.train_rows
    index_B = (
      order.random_below(ENDLESS, position_B, key)
      if rows is None
      else order.shuffled(rows, position_B, key)
    )
    return self.task.rows('train', index_B)

  @property
  def validation_rows(self) -> int:
    return self.task.test_rows

  def validation_batches(
    self,
    batch_size: int,
    limit_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    low, high = process_rows(batch_size, process_index, process_count)
    index_R = np.arange(self.validation_rows)
    if (chosen := spread(index_R.size, batch_size, limit_batches)) is not None:
      index_R = index_R[chosen]
    index_R = np.concatenate([index_R, np.full(-index_R.size % batch_size, -1)])
    return (self._test(index_R[i + low : i + high]) for i in range(0, index_R.size, batch_size))

  def _test(self, index_B: Int64[np.ndarray, ' B']) -> Batch:
    """Test sequences by number; -1 stands for a row without targets."""
    batch = self.task.rows('test', np.maximum(index_B, 0))
    return batch._replace(
      targets_BT=np.where(index_B[:, None] >= 0, batch.targets_BT, np.int32(IGNORE))
    )


# ---- what tasks are made with ------------------------------------------------------------------


def labelled(
  inputs: Int32[np.ndarray, 'B T'] | Float32[np.ndarray, 'B T F'],
  label_B: Int64[np.ndarray, ' B'],
  length_B: Int64[np.ndarray, ' B'] | None = None,
) -> Batch:
  """Sequences to classify: the label stands at the last position of each; what follows its length
  is padding."""
  rows, length = inputs.shape[:2]
  last_B = np.full(rows, length) - 1 if length_B is None else length_B - 1
  targets_BT = np.full((rows, length), IGNORE, np.int32)
  targets_BT[np.arange(rows), last_B] = label_B
  segments_BT = (
    None if length_B is None else (np.arange(length)[None] < length_B[:, None]).astype(np.int32)
  )
  return Batch(inputs, targets_BT, segments_BT)


def target_last_only(
  tokens_BT: Int64[np.ndarray, 'B T'], answer_B: Int64[np.ndarray, ' B'], side: Side
) -> Batch:
  """Sequences after which one token is asked for. They are learned from as text is, every next
  token a target; in tests there is no target before the last."""
  targets_BT = np.concatenate([tokens_BT[:, 1:], answer_B[:, None]], axis=1).astype(np.int32)
  if side == 'test':
    targets_BT[:, :-1] = IGNORE
  return Batch(tokens_BT.astype(np.int32), targets_BT, None)


def random_bits(
  key: np.uint64, index_N: Int64[np.ndarray, ' N'], count: int
) -> UInt64[np.ndarray, 'N count']:
  """`count` random words for each number: SplitMix64 streams, integer arithmetic alone, so the same
  with every library."""
  start_N = order.scramble(order.scramble(index_N.astype(np.uint64)) ^ key)
  at_NC = start_N[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None]
  return order.scramble(at_NC.reshape(-1)).reshape(at_NC.shape)


def below(bound: int, bits: UInt64[np.ndarray, '*N']) -> Int64[np.ndarray, '*N']:
  """Numbers in 0..bound-1 from random words; the bias is below bound / 2^64."""
  return (bits % np.uint64(bound)).astype(np.int64)


def chance(probability: float, bits: UInt64[np.ndarray, '*N']) -> Bool[np.ndarray, '*N']:
  """True with a probability, which is taken to 53 bits."""
  return (bits >> np.uint64(11)) < np.uint64(int(probability * 2**53))


def distinct(bound: int, bits_NC: UInt64[np.ndarray, 'N C']) -> Int64[np.ndarray, 'N C']:
  """C different numbers of 0..bound-1 for each row, every choice and order of them as likely."""
  C = bits_NC.shape[1]
  # At first each says which of the numbers that those before it have left it is (a Lehmer code).
  drawn_NC = (bits_NC % (np.uint64(bound) - np.arange(C, dtype=np.uint64))).astype(np.int64)
  for c in range(C - 2, -1, -1):
    later_NC = drawn_NC[:, c + 1 :]
    later_NC += later_NC >= drawn_NC[:, c : c + 1]
  return drawn_NC


def came_before(number_NP: Int64[np.ndarray, 'N P']) -> Bool[np.ndarray, 'N P']:
  """Whether the number at each place stands at an earlier place of its row too."""
  order_NP = np.argsort(number_NP, axis=1, kind='stable')
  sorted_NP = np.take_along_axis(number_NP, order_NP, axis=1)
  again_NP = np.pad(sorted_NP[:, 1:] == sorted_NP[:, :-1], ((0, 0), (1, 0)))
  before_NP = np.empty_like(again_NP)
  np.put_along_axis(before_NP, order_NP, again_NP, axis=1)
  return before_NP


def hash_of(*batches: Batch) -> str:
  """The SHA-256 (hex) of the arrays of batches, their shapes and dtypes."""
  total = hashlib.sha256()
  arrays = (a for b in batches for a in (b.source_BS, b.inputs, b.targets_BT, b.segments_BT))
  for array in (a for a in arrays if a is not None):
    total.update(f'{array.dtype.str}{array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
  return total.hexdigest()
