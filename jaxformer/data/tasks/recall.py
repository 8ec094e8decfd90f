"""The two synthetic languages of H3 (Fu et al. 2022, section 3.1): remember a token, and compare
tokens across a sequence.

As in the paper, models are trained to predict every token, most of which are unpredictable, and
scored on the last alone."""

import numpy as np

from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import Side, TokenTask, integers, target_last_only
from jaxformer.task_type import Batch


class InductionHead(TokenTask):
  """Recall the token that followed a special one: `a b c => d e f ... x y =>`, with target d.

  `length` random symbols, of which one at a uniform position (not among the last two) is replaced
  by the special token; then the special token once more, where the symbol that followed the first
  is the target. The vocabulary holds `vocab_size - 2` symbols, the special token, and one more that
  never occurs (the authors share the vocabulary with associative recall).

  Mamba is trained on endless sequences of 2^8 positions, `length=255, vocab_size=16`, and scored at
  2^6 to 2^20 (Gu and Dao 2023, section 4.1.2 and appendix E.1)."""

  length: int = 30
  vocab_size: int = 20

  def validate(self) -> None:
    self.require(self.length >= 3, 'length', 'at least 3')
    self.require(self.vocab_size >= 4, 'vocab_size', 'at least 4')
    super().validate()

  @property
  def positions(self) -> int:
    return self.length + 1

  def rows(self, side: Side, index_N: Index) -> Batch:
    special, each = self.vocab_size - 2, np.arange(index_N.size)
    bits = self.random_bits(side, index_N, self.length + 1)
    tokens = np.concatenate(
      [integers(special, bits[:, 1:]), np.full((index_N.size, 1), special)], axis=1
    )
    place = integers(self.length - 2, bits[:, 0])
    tokens[each, place] = special
    return target_last_only(tokens, tokens[each, place + 1], side)


class AssociativeRecall(TokenTask):
  """Recall the value of a key: `a 2 c 4 b 3 a 2 ... => b`, with target 3.

  In each sequence every key has a value of its own, drawn at random; `length` / 2 pairs of a random
  key and its value follow each other, then the special token and one of the keys that occurred (all
  equally likely), whose value is the target. Of `vocab_size` tokens one is special and one never
  occurs (the authors reserve it for keys that did not occur, which are never queried); of the
  others the first half are keys, the rest values."""

  length: int = 20
  vocab_size: int = 10

  def validate(self) -> None:
    self.require(self.length >= 2 and self.length % 2 == 0, 'length', 'even and at least 2')
    self.require(self.vocab_size >= 4, 'vocab_size', 'at least 4')
    super().validate()

  @property
  def positions(self) -> int:
    return self.length + 2

  def rows(self, side: Side, index_N: Index) -> Batch:
    special, pairs, N = self.vocab_size - 2, self.length // 2, index_N.size
    keys = special // 2
    bits = self.random_bits(side, index_N, 2 * keys + pairs)
    value_NK = keys + integers(special - keys, bits[:, :keys])
    key_NP = integers(keys, bits[:, keys : keys + pairs])
    shown_NK = np.zeros((N, keys), bool)
    np.put_along_axis(shown_NK, key_NP, True, axis=1)
    # Of the keys shown, the one with the largest random number.
    weight_NK = np.where(shown_NK, bits[:, keys + pairs :] >> np.uint64(1), np.uint64(0))
    asked_N1 = weight_NK.argmax(axis=1)[:, None]
    value_NP = np.take_along_axis(value_NK, key_NP, axis=1)
    shown_NT = np.stack([key_NP, value_NP], axis=2).reshape(N, self.length)
    answer_N = np.take_along_axis(value_NK, asked_N1, axis=1)[:, 0]
    tokens = np.concatenate([shown_NT, np.full((N, 1), special), asked_N1], axis=1)
    return target_last_only(tokens, answer_N, side)
