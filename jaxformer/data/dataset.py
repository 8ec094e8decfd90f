"""What every experiment trains and validates on: text and tasks have one face, `Dataset`.

Training is random access: a batch is a pure function of the seed and the step. To resume is to ask
  for the next step, and how
many hosts there are changes who loads a sequence, never which sequences a step sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data.cache import Log
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.task_type import Batch, TaskType


class HeldOutPair(NamedTuple):
  """A text that scores a model, as it reads it (with the end of the document), and what it should
  make of it."""

  source_ids: Int32[np.ndarray, ' S']
  source: str
  reference: str


class DatasetConfig(Config, abstract=True):
  """Base of what an experiment can train on: the text of `DataConfig`, or a task."""

  @property
  def positions(self) -> int:
    """T, the positions of every row; of pairs, those of the longest translations."""
    raise NotImplementedError

  @property
  def max_len(self) -> int:
    """The positions that a model needs: T, or of pairs the longest sources' where they have
    more."""
    return self.positions

  @property
  def one_shape(self) -> bool:
    """Whether all batches of training have one shape, and so one compiled program."""
    return True

  @property
  def task(self) -> TaskType:
    """What these data provide and what is to be predicted; sizes that only reading the data tells
    (of text) are None."""
    return TaskType()

  @property
  def held_out(self) -> str:
    """What the sequences that score a model are called."""
    return f'{self.tag} test'

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> Dataset:
    """The data, ready to be read; the arguments are those of `open_data`."""
    raise NotImplementedError


def open_data(
  data: DatasetConfig,
  cache_dir: Path | str | None = None,
  log: Log | None = None,
  tokenizer: Tokenizer | None = None,
) -> Dataset:
  """The data of a config: text is tokenised into a cache (see `DataConfig.open`), a task is there
  at once.

  Args:
    cache_dir: `$JAXFORMER_CACHE`, `$XDG_CACHE_HOME/jaxformer` or `~/.cache/jaxformer` by default.
    log: takes lines about the progress.
    tokenizer: for text, replaces that of the config.
  """
  return data.open(cache_dir, log, tokenizer)


class Dataset:
  """Sequences to train on, and others to score a model by.

  Attributes:
    config: what it was made of.
    tokenizer: of text (of pairs, of the translations); None for a task whose tokens stand for
      nothing else.
    vocab_size: ids of tokens are below it; None where inputs are numbers.
    source_vocab_size: of pairs, ids of the texts to translate are below it; None for other data.
    train_tokens: of text, the number of distinct training tokens; None for other data.
    size: how much there is to train on, in words.
    manifest: what a run records about the data, as JSON data.
    identity: what the batches depend on, as JSON data; a checkpoint holds it.
  """

  config: DatasetConfig
  tokenizer: Tokenizer | None
  vocab_size: int | None
  source_vocab_size: int | None = None
  train_tokens: int | None = None
  size: str
  manifest: dict[str, Any]
  identity: dict[str, Any]

  # ---- training --------------------------------------------------------------------------------

  def train_batch(
    self, step: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
  ) -> Batch:
    """The rows that process `process_index` of `process_count` has of the global batch of
    `batch_size` rows at a step (from 0). The rows of all processes, in their order, are those of
    the one process of a run without others. Thread-safe."""
    raise NotImplementedError

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
  ) -> TrainBatches:
    """`train_batch` of `start_step` and all steps after it, without end, up to `prefetch` of them
    made ahead by a thread."""
    process_rows(batch_size, process_index, process_count)

    def make(step: int) -> Batch:
      return self.train_batch(step, batch_size, seed, process_index, process_count)

    return TrainBatches(make, lambda step: self.state(step, batch_size, seed), start_step, prefetch)

  def state(self, next_step: int, batch_size: int, seed: int) -> dict[str, Any]:
    """What a checkpoint stores about the data, as JSON data."""
    return {
      'next_step': next_step,
      'batch_size': batch_size,
      'seed': seed,
      'data': dict(self.identity),
    }

  def resume_step(self, state: dict[str, Any], batch_size: int, seed: int) -> int:
    """The step to go on with. Raises `InputError` that names what differs from the `state` stored,
    since the rest of the run would then not be the one that was interrupted. The number of
    processes may differ."""
    changed = config.differences(state, self.state(state['next_step'], batch_size, seed))
    if changed:
      raise InputError(
        f'not the data of the checkpoint ({"; ".join(changed)}): use the same, or start anew from '
        'the weights'
      )
    return int(state['next_step'])

  @staticmethod
  def _positions(
    step: int, batch_size: int, process_index: int, process_count: int
  ) -> Int64[np.ndarray, ' B']:
    """Where a process's rows of a step stand in the endless sequence of training rows."""
    low, high = process_rows(batch_size, process_index, process_count)
    if step < 0:
      raise InputError(f'step = {step}: must be 0 or more')
    return np.int64(step) * batch_size + np.arange(low, high, dtype=np.int64)

  # ---- validation ------------------------------------------------------------------------------

  @property
  def validation_rows(self) -> int:
    """How many rows `validation_batches` gives in all."""
    raise NotImplementedError

  def validation_batches(
    self,
    batch_size: int,
    limit_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """The rows that score a model once, in order. All batches have the same shape (of pairs, all of
    a bucket); rows that fill the last one up have no targets. With `limit_batches`, at most so many
    batches of rows spread evenly over all, always the same ones."""
    raise NotImplementedError

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    """Of pairs, what `validation_batches` holds as texts, at most `limit` of them spread evenly
    over all. Raises `InputError` for other data."""
    raise InputError(f'data = {self.config.tag}: holds no pairs of texts to translate')


def spread(rows: int, batch_size: int, limit_batches: int | None) -> Int64[np.ndarray, ' R'] | None:
  """The rows that a limit leaves, spread evenly over all; None for all of them."""
  if limit_batches is None or limit_batches * batch_size >= rows:
    return None
  if limit_batches < 1:
    raise InputError(f'limit_batches = {limit_batches}: must be positive or none')
  return np.arange(limit_batches * batch_size) * rows // (limit_batches * batch_size)


def process_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
  """The first of a process's rows of a batch, and the one after the last."""
  if process_count < 1 or not 0 <= process_index < process_count:
    raise InputError(
      f'process_index = {process_index}: must be at least 0 and below process_count = '
      f'{process_count}'
    )
  if batch_size < 1 or batch_size % process_count:
    raise InputError(
      f'batch_size = {batch_size}: must be a positive multiple of the {process_count} processes'
    )
  size = batch_size // process_count
  return process_index * size, (process_index + 1) * size


class TrainBatches:
  """Batches of training without end. An iterator and a context manager; `close` stops the thread
  that makes batches ahead."""

  def __init__(
    self,
    make: Callable[[int], Batch],
    state: Callable[[int], dict[str, Any]],
    start_step: int,
    prefetch: int,
  ):
    if prefetch < 0:
      raise InputError(f'prefetch = {prefetch}: must be 0 or more')
    self.next_step = start_step
    self._make, self._state = make, state
    self._ahead: deque[Future[Batch]] = deque()
    self._pool = ThreadPoolExecutor(1, 'jaxformer-data') if prefetch else None
    self._prefetch = prefetch
    self._closed = False

  def __iter__(self) -> TrainBatches:
    return self

  def __next__(self) -> Batch:
    if self._closed:
      raise StopIteration
    if self._pool is None:
      batch = self._make(self.next_step)
    else:
      while len(self._ahead) <= self._prefetch:
        self._ahead.append(self._pool.submit(self._make, self.next_step + len(self._ahead)))
      try:
        batch = self._ahead.popleft().result()
      except BaseException:
        self.close()
        raise
    self.next_step += 1
    return batch

  def state(self) -> dict[str, Any]:
    """What a checkpoint stores: batches made ahead but not taken are still to come."""
    return self._state(self.next_step)

  def close(self) -> None:
    """Stops the thread. Safe to call twice; iteration ends."""
    self._closed = True
    self._ahead.clear()
    if self._pool is not None:
      self._pool.shutdown(wait=True, cancel_futures=True)

  def __enter__(self) -> TrainBatches:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
