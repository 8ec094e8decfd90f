"""What every experiment trains and validates on: text, pairs of texts and tasks have one interface,
`Dataset`.

Training is random access: a batch is a pure function of the seed and the step. To resume is to ask
for the next step, and the number of hosts changes who loads a row, never which rows a step sees.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data.cache import Log
from jaxformer.data.cache_folder import cache_dir as default_cache_dir
from jaxformer.data.missing import Missing, check_given
from jaxformer.data.shuffle import Index
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.files import user_path
from jaxformer.task_type import IGNORE, Batch, TaskType

LOG = logging.getLogger('jaxformer.data')
PREFETCH = 2  # batches made ahead by a thread
Earlier = Sequence[Sequence[int]]
"""(step, batch size) in ascending order: the batch size of the steps before that one, and after the
one before, where the batch size of a run has changed."""


class HeldOutPair(NamedTuple):
  """A source that scores a model, as the model reads it (with the end of the document), and its
  reference translation."""

  source_ids: Int32[np.ndarray, ' S']
  source: str
  reference: str


class DatasetConfig(Config, abstract=True):
  """Base of what an experiment can train on: text, pairs of texts, or a task.

  Attributes:
    length_field: the field that sets `max_len`: 'sequence_length' of text; 'positions' of other
      data stands for several.
    has_text: whether token ids stand for text, so that the dataset has a tokenizer.
  """

  length_field: ClassVar[str] = 'positions'
  has_text: ClassVar[bool] = False

  @property
  def task(self) -> TaskType:
    """What these data provide and what is to be predicted. Sizes that are known only once the data
    are read (of text) are None."""
    return TaskType()

  @property
  def positions(self) -> int:
    """T, the positions of every row; of pairs, those of the longest translations."""
    raise NotImplementedError

  @property
  def max_len(self) -> int:
    """The positions that a model needs: T, or of pairs those of the longest sources where they have
    more."""
    return self.positions

  @property
  def one_shape(self) -> bool:
    """Whether all training batches have one shape, and so one compiled program."""
    return True

  @property
  def title(self) -> str:
    """A short name: of text the type of its corpus, else the type."""
    return self.tag

  @property
  def validation_name(self) -> str:
    """What the rows that score a model are called."""
    return f'{self.tag} test'

  def missing(self) -> dict[str, Missing]:
    """Return what has to be given before the data can be read, by field; {} where nothing has."""
    return {}

  def example(self) -> Batch:
    """Return one row in the largest shape of a training batch; a corpus is not read for it."""
    return open_data(self).train_batch(0, 1, 0)

  def at_length(self, positions: int) -> DatasetConfig:
    """Return the same text in rows of another length; other data as they are."""
    return self

  def training_texts(self) -> Iterator[str]:
    """Yield the training texts, to train a tokenizer on. Raises `InputError` for data without a
    corpus."""
    raise InputError('data', self.tag, problem='a task, which has no corpus; Text and Pairs have')

  def open(self, folder: Path, log: Log, tokenizer: Tokenizer | None) -> Dataset:
    """Return the data, ready to be read, with the defaults of `open_data` filled in."""
    raise NotImplementedError


def open_data(
  data: DatasetConfig,
  cache_dir: Path | str | None = None,
  log: Log | None = None,
  tokenizer: Tokenizer | None = None,
) -> Dataset:
  """Return the data of a config. Text is tokenized into a cache, or found there.

  Args:
    cache_dir: `$JAXFORMER_CACHE`, `$XDG_CACHE_HOME/jaxformer` or `~/.cache/jaxformer` by default.
    log: takes lines about the progress.
    tokenizer: of text, replaces that of the config, to score a model on other text.

  Raises `InputError` for a corpus that cannot be read, is empty, cannot be divided, is too short
  for one row, or has to be given first.
  """
  missing = data.missing()
  check_given({f: m for f, m in missing.items() if tokenizer is None or f == 'corpus'})
  folder = default_cache_dir() if cache_dir is None else user_path(cache_dir, 'cache_dir')
  return data.open(folder, log or LOG.info, tokenizer)


class Dataset:
  """Training and validation rows.

  Attributes:
    config: what it was opened from.
    tokenizer: of text (of pairs: of the translations, with that of the sources as its `source`);
      None for a task whose tokens stand for no text.
    vocab_size: ids of tokens are below it; None where inputs are features.
    source_vocab_size: of pairs, ids of the sources are below it; None for other data.
    train_tokens: of text, the number of distinct training tokens; None for other data.
    size: human-readable amount of training data.
    manifest: what a run records about the data, as JSON data, `baselines` included.
    identity: what the batches depend on, as JSON data; a checkpoint holds it. Of a corpus it holds
      hashes of the tokens and settings of the rows, never a path: the same text elsewhere is equal.
    validation_sha256: hash (hex) of the rows that score a model: of a corpus of the validation
      tokens and of where documents start, whatever the length of rows; of a task of its test
      sequences. None if unknown.
  """

  config: DatasetConfig
  tokenizer: Tokenizer | None
  vocab_size: int | None
  source_vocab_size: int | None = None
  train_tokens: int | None = None
  size: str
  manifest: dict[str, Any]
  identity: dict[str, Any]
  validation_sha256: str | None = None

  def info(self) -> list[str]:
    """Return lines that describe the splits of a corpus. Raises `InputError` for a task."""
    raise InputError('data', self.config.tag, problem='a task, which has no corpus')

  def baselines(self) -> dict[str, float]:
    """Return bits per byte of the validation text under frequencies of bytes and of byte pairs of
    the training text (see `baselines.py`); nothing for other data."""
    return {}

  # ---- training --------------------------------------------------------------------------------

  def train_batch(
    self,
    step: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    earlier: Earlier = (),
  ) -> Batch:
    """Return the rows that process `process_index` of `process_count` has of the global batch of
    `batch_size` rows at a step (from 0). The rows of all processes, in their order, are those of a
    run with one process; they follow those of `earlier` steps. Thread-safe."""
    low, high = process_rows(batch_size, process_index, process_count)
    if step < 0:
      raise InputError('step', step, 'at least 0')
    first = rows_before(step, batch_size, earlier)
    return self._train_rows(np.int64(first) + np.arange(low, high, dtype=np.int64), seed)

  def _train_rows(self, position_B: Index, seed: int) -> Batch:
    """Return the rows at some positions of the endless sequence of training rows."""
    raise NotImplementedError

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    earlier: Earlier = (),
    skipped: Sequence[range] = (),
  ) -> TrainBatches:
    """Return `train_batch` of `start_step` and all later steps but those that are `skipped`,
    without end, made ahead by a thread."""
    process_rows(batch_size, process_index, process_count)

    def make(step: int) -> Batch:
      more = {'earlier': earlier} if earlier else {}  # which a user's own dataset may not know
      return self.train_batch(step, batch_size, seed, process_index, process_count, **more)

    def state(step: int) -> dict[str, Any]:
      return self.state(step, batch_size, seed, earlier)

    steps = (s for s in itertools.count(start_step) if not any(s in r for r in skipped))
    return TrainBatches(make, state, steps)

  def state(
    self, next_step: int, batch_size: int, seed: int, earlier: Earlier = ()
  ) -> dict[str, Any]:
    """Return what a checkpoint stores about the data, as JSON data."""
    return {
      'next_step': next_step,
      'batch_size': batch_size,
      'seed': seed,
      'data': dict(self.identity),
      'validation_sha256': self.validation_sha256,
    } | ({'earlier': [list(e) for e in earlier]} if earlier else {})

  def resume_step(self, state: dict[str, Any], batch_size: int, seed: int) -> int:
    """Return the step to resume at. Raises `InputError` that names what differs from the stored
    `state`, since the rest of the run would not be that of the interrupted run. The number of
    processes may differ."""
    now = self.state(state['next_step'], batch_size, seed, state.get('earlier', ()))
    changed = config.differences(state, {k: v for k, v in now.items() if k in state})
    if changed:
      raise InputError(
        f"data differ from the checkpoint's ({'; '.join(changed)}): use the same data, or start a "
        'new run with --init-from'
      )
    return int(state['next_step'])

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
    """Return the rows that score a model once, in order. All batches have the same shape (of pairs,
    all of a bucket); the last one is filled up with rows without targets. With `limit_batches`, at
    most that many batches of rows spread evenly over all, always the same ones."""
    low, high = process_rows(batch_size, process_index, process_count)
    plan = self._validation_plan(batch_size, limit_batches)
    return (self._validation_batch(row_B[low:high]) for row_B in plan)

  def _validation_plan(self, batch_size: int, limit_batches: int | None) -> Iterable[Index]:
    """Return the numbers of the rows of each batch; ~n stands for row n without targets."""
    row_R = spread(self.validation_rows, batch_size, limit_batches)
    return np.pad(row_R, (0, -row_R.size % batch_size), constant_values=~0).reshape(-1, batch_size)

  def _validation_batch(self, row_B: Index) -> Batch:
    """Return the rows of a part of the plan."""
    unused_B = row_B < 0
    batch = self._held_out(np.where(unused_B, ~row_B, row_B))
    return batch._replace(
      targets_BT=np.where(unused_B[:, None], np.int32(IGNORE), batch.targets_BT)
    )

  def _held_out(self, row_B: Index) -> Batch:
    """Return the validation rows with these numbers."""
    raise NotImplementedError

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    """Return the validation pairs as texts, at most `limit` of them spread evenly over all. Raises
    `InputError` for data that are not pairs."""
    raise InputError('data', self.config.tag, problem='holds no pairs of texts to translate')


def rows_before(step: int, batch_size: int, earlier: Earlier) -> int:
  """Return the number of rows in the batches before a step. Raises `InputError` for a step that is
  not after the `earlier` ones."""
  rows, begin = 0, 0
  for until, size in earlier:
    rows, begin = rows + (until - begin) * size, until
  if step < begin:
    raise InputError('step', step, f'at least {begin}, where the batch size changed')
  return rows + (step - begin) * batch_size


def spread(rows: int, batch_size: int, limit_batches: int | None) -> Index:
  """Return the rows that a limit leaves, spread evenly over all."""
  if limit_batches is not None and limit_batches < 1:
    raise InputError('limit_batches', limit_batches, 'positive or none')
  if limit_batches is None or limit_batches * batch_size >= rows:
    return np.arange(rows)
  return np.arange(limit_batches * batch_size) * rows // (limit_batches * batch_size)


def process_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
  """Return the first row of a batch that a process has, and the one after the last."""
  if process_count < 1 or not 0 <= process_index < process_count:
    raise InputError(
      'process_index', process_index, f'at least 0 and below process_count = {process_count}'
    )
  if batch_size < 1 or batch_size % process_count:
    raise InputError(
      'batch_size', batch_size, f'a positive multiple of the {process_count} processes'
    )
  size = batch_size // process_count
  return process_index * size, (process_index + 1) * size


def pair_batch(
  sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], S: int, T: int
) -> Batch:
  """Return sources and targets, each with the token that ends it, as rows of S and T tokens. The
  decoder reads that token and then the translation."""
  source_BS = np.full((len(sources), S), IGNORE, np.int32)
  inputs_BT = np.zeros((len(sources), T), np.int32)
  targets_BT = np.full(inputs_BT.shape, IGNORE, np.int32)
  for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
    source_BS[row, : source.size] = source
    inputs_BT[row, : target.size] = np.roll(target, 1)
    targets_BT[row, : target.size] = target
  return Batch(inputs_BT, targets_BT, source_BS=source_BS)


class TrainBatches(Iterator[Batch], AbstractContextManager['TrainBatches']):
  """Endless training batches: an iterator and a context manager. `close` stops the thread that
  makes batches ahead."""

  def __init__(
    self, make: Callable[[int], Batch], state: Callable[[int], dict[str, Any]], steps: Iterator[int]
  ):
    self._make, self._state, self._steps = make, state, steps
    self._ahead: deque[tuple[int, Future[Batch]]] = deque()
    self._pool = ThreadPoolExecutor(1, 'jaxformer-data')
    self._closed = False

  def __next__(self) -> Batch:
    if self._closed:
      raise StopIteration
    self._fill(1 + PREFETCH)
    try:
      return self._ahead.popleft()[1].result()
    except BaseException:
      self.close()
      raise

  def _fill(self, count: int) -> None:
    while len(self._ahead) < count:
      step = next(self._steps)
      self._ahead.append((step, self._pool.submit(self._make, step)))

  def state(self) -> dict[str, Any]:
    """Return what a checkpoint stores; batches made ahead but not taken are still to come."""
    self._fill(1)
    return self._state(self._ahead[0][0])

  def close(self) -> None:
    """Stop the thread. Safe to call twice; iteration ends."""
    self._closed = True
    self._ahead.clear()
    self._pool.shutdown(wait=True, cancel_futures=True)

  def __exit__(self, *_: object) -> None:
    self.close()
