"""Tasks: sequences that a program generates or a package ships.

A task is one file in this folder: a config type whose `rows` gives the sequences with some numbers,
as a pure function of the config, the side and the numbers. Everything else (order, hosts, resuming,
a last batch that is not full) is here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import shuffle
from jaxformer.data.cache import Log
from jaxformer.data.cache_folder import sha256
from jaxformer.data.dataset import Dataset, DatasetConfig, HeldOutPair, pair_batch, spread
from jaxformer.data.shuffle import Index
from jaxformer.data.tokenizers import ByteTokenizer, Tokenizer
from jaxformer.task_type import IGNORE, Batch, TaskType

Side = Literal['train', 'test']
ENDLESS = 2**62  # training sequences of an endless task: none comes twice
HASHED = 2**20  # positions of each side that a fingerprint is of, at most
BYTES, END = ByteTokenizer(), 256
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class TaskConfig(DatasetConfig, abstract=True):
  """Base of the tasks. A new one defines `task`, `positions`, `train_rows`, `test_rows` and
  `rows`."""

  @property
  def train_rows(self) -> int | None:
    """Number of training sequences, which every epoch shows in another order; None where they are
    generated without end."""
    raise NotImplementedError

  @property
  def test_rows(self) -> int:
    """Number of sequences that score a model."""
    raise NotImplementedError

  def rows(self, side: Side, index_N: Index) -> Batch:
    """Return the sequences of a side with these numbers, from 0: the same in every batch and on
    every machine."""
    raise NotImplementedError

  def held_out_pairs(self, index_N: Index) -> list[HeldOutPair]:
    """Return test sequences as texts. Raises `InputError` for a task that is not of pairs."""
    raise InputError('data', self.tag, problem='holds no pairs of texts to translate')

  def fingerprint(self) -> str:
    """Return a hash (hex) that changes when the sequences do: of the first of each side, fewer of
    very long ones."""
    return hash_of(self.rows('train', np.arange(self._hashed)), self._first_tests())

  def test_fingerprint(self) -> str:
    """Return a hash (hex) that changes when the test sequences do: of their number and of the
    first."""
    return sha256(str(self.test_rows), hash_of(self._first_tests()))

  @property
  def _hashed(self) -> int:
    return min(64, max(1, HASHED // self.positions))

  def _first_tests(self) -> Batch:
    return self.rows('test', np.arange(min(self._hashed, self.test_rows)))

  def open(self, folder: Path, log: Log, tokenizer: Tokenizer | None) -> TaskDataset:
    return TaskDataset(self)


class GeneratedTask(TaskConfig, abstract=True):
  """Base of the tasks whose sequences a program generates.

  Many have a `length`. The same task at another length is `replace(length=...)`, and `jaxformer
  eval RUN --data.length N` scores a trained model there.

  Attributes:
    train_sequences: number of training sequences, shown repeatedly; None for an endless task.
    test_sequences: number of sequences that score a model.
    seed: of all sequences.
  """

  train_sequences: int | None = None
  test_sequences: int = 1000
  seed: int = 0

  def validate(self) -> None:
    self.require_positive('train_sequences', 'test_sequences')

  @property
  def train_rows(self) -> int | None:
    return self.train_sequences

  @property
  def test_rows(self) -> int:
    return self.test_sequences

  def random_bits(
    self, side: Side, index_N: Index, count: int, *purpose: str
  ) -> UInt64[np.ndarray, 'N count']:
    """Return the random words of the sequences with these numbers; other words for each
    `purpose`."""
    return random_bits(shuffle.key(self.seed, self.tag, side, *purpose), index_N, count)


class TokenTask(GeneratedTask, abstract=True):
  """Base of the generated tasks of token sequences.

  Attributes:
    vocab_size: with every special token.
    length: T, the tokens of a sequence.
  """

  vocab_size: int
  length: int

  @property
  def positions(self) -> int:
    return self.length

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)


class PairTask(GeneratedTask, abstract=True):
  """Base of the tasks of short source and target texts, whose tokens are bytes. A new one defines
  `texts`, and as `source_positions` and `positions` the lengths of the longest with their ends."""

  has_text: ClassVar[bool] = True

  @property
  def source_positions(self) -> int:
    """S, the positions of every source."""
    raise NotImplementedError

  @property
  def max_len(self) -> int:
    return max(self.source_positions, self.positions)

  @property
  def task(self) -> TaskType:
    V = BYTES.vocab_size
    return TaskType(inputs='pairs', vocab_size=V, source_vocab_size=V)

  def texts(self, side: Side, index_N: Index) -> list[tuple[str, str]]:
    """Return the sources and targets of a side with these numbers. No source is on both sides."""
    raise NotImplementedError

  def rows(self, side: Side, index_N: Index) -> Batch:
    sources, targets = zip(*self.texts(side, index_N), strict=True)
    return pair_batch(
      [_ended(t) for t in sources],
      [_ended(t) for t in targets],
      self.source_positions,
      self.positions,
    )

  def held_out_pairs(self, index_N: Index) -> list[HeldOutPair]:
    return [HeldOutPair(_ended(s), s, t) for s, t in self.texts('test', index_N)]


def _ended(text: str) -> Int32[np.ndarray, ' T']:
  return np.append(BYTES.encode(text), np.int32(END))


class TaskDataset(Dataset):
  """A task as a dataset. Made by `TaskConfig.open`."""

  def __init__(self, task: TaskConfig):
    self.config = self.task = task
    self.tokenizer = BYTES if task.has_text else None
    self.vocab_size, self.source_vocab_size = task.task.vocab_size, task.task.source_vocab_size
    rows, sha256 = task.train_rows, task.fingerprint()
    self.size = f'{"endless" if rows is None else f"{rows:,}"} sequences of {task.tag}'
    self.identity: dict[str, Any] = {'task': config.to_json(task), 'sha256': sha256}
    self.validation_sha256 = task.test_fingerprint()
    self.manifest: dict[str, Any] = self.identity | {'train': rows, 'test': task.test_rows}

  def _train_rows(self, position_B: Index, seed: int) -> Batch:
    seed_key, rows = shuffle.key(seed, 'task'), self.task.train_rows
    if rows is None:
      return self.task.rows('train', shuffle.random_below(ENDLESS, position_B, seed_key))
    return self.task.rows('train', shuffle.shuffled(rows, position_B, seed_key))

  @property
  def validation_rows(self) -> int:
    return self.task.test_rows

  def _held_out(self, row_B: Index) -> Batch:
    return self.task.rows('test', row_B)

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    return self.task.held_out_pairs(spread(self.validation_rows, 1, limit))


# ---- building blocks ---------------------------------------------------------------------------


def labelled(
  inputs: Int32[np.ndarray, 'B T'] | Float32[np.ndarray, 'B T F'],
  label_B: Index,
  length_B: Index | None = None,
) -> Batch:
  """Return sequences to classify: the label is the target at the last position of each; positions
  after its length are padding."""
  rows, length = inputs.shape[:2]
  last_B = np.full(rows, length) - 1 if length_B is None else length_B - 1
  targets_BT = np.full((rows, length), IGNORE, np.int32)
  targets_BT[np.arange(rows), last_B] = label_B
  segments_BT = (
    None if length_B is None else (np.arange(length)[None] < length_B[:, None]).astype(np.int32)
  )
  return Batch(inputs, targets_BT, segments_BT)


def target_last_only(tokens_BT: Int64[np.ndarray, 'B T'], answer_B: Index, side: Side) -> Batch:
  """Return sequences whose last target is the answer. In training every next token is a target, as
  in text; in tests the answer is the only one."""
  targets_BT = np.concatenate([tokens_BT[:, 1:], answer_B[:, None]], axis=1).astype(np.int32)
  if side == 'test':
    targets_BT[:, :-1] = IGNORE
  return Batch(tokens_BT.astype(np.int32), targets_BT, None)


def random_bits(key: np.uint64, index_N: Index, count: int) -> UInt64[np.ndarray, 'N count']:
  """Return `count` random words for each number: SplitMix64 streams, by integer arithmetic alone,
  so the same with every library."""
  start_N = shuffle.scramble(shuffle.scramble(index_N.astype(np.uint64)) ^ key)
  at_NC = start_N[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None]
  return shuffle.scramble(at_NC.reshape(-1)).reshape(at_NC.shape)


def integers(bound: int, bits: UInt64[np.ndarray, '*N']) -> Int64[np.ndarray, '*N']:
  """Return integers in 0..bound-1 from random words; the bias is below bound / 2^64."""
  return (bits % np.uint64(bound)).astype(np.int64)


def distinct(bound: int, bits_NC: UInt64[np.ndarray, 'N C']) -> Int64[np.ndarray, 'N C']:
  """Return C different integers in 0..bound-1 for each row, every choice and order of them equally
  likely."""
  C = bits_NC.shape[1]
  # A Lehmer code: each is first an index into the integers that those before it have left.
  drawn_NC = (bits_NC % (np.uint64(bound) - np.arange(C, dtype=np.uint64))).astype(np.int64)
  for c in range(C - 2, -1, -1):
    later_NC = drawn_NC[:, c + 1 :]
    later_NC += later_NC >= drawn_NC[:, c : c + 1]
  return drawn_NC


def hash_of(*batches: Batch) -> str:
  """Return the SHA-256 (hex) of the arrays of batches, their shapes and dtypes."""
  total = hashlib.sha256()
  arrays = (a for b in batches for a in (b.source_BS, b.inputs, b.targets_BT, b.segments_BT))
  for array in (a for a in arrays if a is not None):
    total.update(f'{array.dtype.str}{array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
  return total.hexdigest()
