"""Tasks of pairs: a text goes in, another is to come out. Texts are short, and their tokens are
bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from jaxformer.data.cache import Log
from jaxformer.data.dataset import HeldOutPair, spread
from jaxformer.data.pairs import pair_batch
from jaxformer.data.tasks.task import GeneratedTask, Side, TaskDataset
from jaxformer.data.tokenizers import ByteTokenizer, Tokenizer
from jaxformer.task_type import Batch, TaskType

BYTES = ByteTokenizer()
END = 256


class PairTask(GeneratedTask, abstract=True):
  """Base of the tasks of pairs. One says `texts` and the lengths of the longest, with their
  ends."""

  @property
  def source_positions(self) -> int:
    """S, the positions of every text to read."""
    raise NotImplementedError

  @property
  def max_len(self) -> int:
    return max(self.source_positions, self.positions)

  @property
  def task(self) -> TaskType:
    return TaskType(inputs='pairs', vocab_size=BYTES.vocab_size, source_vocab_size=BYTES.vocab_size)

  def texts(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> list[tuple[str, str]]:
    """The sources and targets of a side with these numbers. No source of one side is on the
    other."""
    raise NotImplementedError

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    texts = self.texts(side, index_N)
    sources, targets = ([BYTES.encode(t[i]) for t in texts] for i in (0, 1))
    return pair_batch(sources, targets, (self.source_positions, self.positions), (END, END))

  def open(
    self,
    cache_dir: Path | str | None = None,
    log: Log | None = None,
    tokenizer: Tokenizer | None = None,
  ) -> TaskDataset:
    return PairTaskDataset(self)


class PairTaskDataset(TaskDataset):
  """A task of pairs as something to train on and to be scored by. Made by `PairTask.open`."""

  def __init__(self, task: PairTask):
    super().__init__(task)
    self.pairs = task
    self.tokenizer, self.source_vocab_size = BYTES, BYTES.vocab_size

  def held_out_pairs(self, limit: int | None = None) -> list[HeldOutPair]:
    index = spread(self.validation_rows, 1, limit)
    texts = self.pairs.texts('test', np.arange(self.validation_rows) if index is None else index)
    return [
      HeldOutPair(np.append(BYTES.encode(source), np.int32(END)), source, target)
      for source, target in texts
    ]
