"""The two synthetic languages of H3 (Fu et al. 2022, section 3.1): remember a token, and compare
tokens across a sequence.

As the authors do, models learn to predict every token of them, most of which nothing foretells, and
are scored by the last alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from jaxformer.data.tasks.task import GeneratedTask, Side, integers, target_last_only
from jaxformer.task_type import Batch, TaskType


class InductionHead(GeneratedTask):
  """Recall the token that followed a special one: `a b c => d e f ... x y =>`, asked for d.

  `length` random symbols, of which one at a uniform place (not among the last two) is replaced by
  the special token; then the special token once more, after which the symbol that followed it is
  asked for. The vocabulary holds `vocab_size - 2` symbols, the special token, and one more that
  never comes here (the authors' vocabulary is shared with associative recall).

  Mamba learns it without end at 2^8 positions, `length=255, vocab_size=16`, and is scored at 2^6 to
  2^20 (Gu and Dao 2023, section 4.1.2 and appendix E.1)."""

  length: int = 30
  vocab_size: int = 20

  def validate(self) -> None:
    self.require(self.length >= 3, 'length', 'at least 3')
    self.require(self.vocab_size >= 4, 'vocab_size', 'at least 4')
    super().validate()

  @property
  def positions(self) -> int:
    return self.length + 1

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    special, each = self.vocab_size - 2, np.arange(index_N.size)
    bits = self.random_bits(side, index_N, self.length + 1)
    tokens = np.concatenate(
      [integers(special, bits[:, 1:]), np.full((index_N.size, 1), special)], axis=1
    )
    place = integers(self.length - 2, bits[:, 0])
    tokens[each, place] = special
    return target_last_only(tokens, tokens[each, place + 1], side)


class AssociativeRecall(GeneratedTask):
  """Recall the value of a key: `a 2 c 4 b 3 a 2 ... => b`, asked for 3.

  In each sequence every key has a value of its own, drawn at random; `length` / 2 pairs of a random
  key and its value follow each other, then the special token and one of the keys that came (each as
  likely), whose value is asked for. Of `vocab_size` tokens one is special and one never comes (the
  authors answer with it for keys that did not come, which they do not ask for); of the others the
  first half are keys, the rest values."""

  length: int = 20
  vocab_size: int = 10

  def validate(self) -> None:
    self.require(self.length >= 2 and self.length % 2 == 0, 'length', 'even and at least 2')
    self.require(self.vocab_size >= 4, 'vocab_size', 'at least 4')
    super().validate()

  @property
  def positions(self) -> int:
    return self.length + 2

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    special, pairs, N = self.vocab_size - 2, self.length // 2, index_N.size
    keys = special // 2
    bits = self.random_bits(side, index_N, 2 * keys + pairs)
    value_NK = keys + integers(special - keys, bits[:, :keys])
    key_NP = integers(keys, bits[:, keys : keys + pairs])
    came_NK = (key_NP[:, :, None] == np.arange(keys)[None, None]).any(axis=1)
    # Of the keys that came the one with the largest random number.
    query_N = np.where(came_NK, bits[:, keys + pairs :] >> np.uint64(1), np.uint64(0)).argmax(
      axis=1
    )
    pair_NP2 = np.stack([key_NP, np.take_along_axis(value_NK, key_NP, axis=1)], axis=2)
    tokens = np.concatenate(
      [pair_NP2.reshape(N, self.length), np.full((N, 1), special), query_N[:, None]], axis=1
    )
    return target_last_only(tokens, value_NK[np.arange(N), query_N], side)
