"""Recall of values that change: each key is bound several times, and its latest value is asked
for."""

import numpy as np

from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import Side, TokenTask, distinct, integers
from jaxformer.task_type import IGNORE, Batch

CERTAIN = 2**32  # of probabilities as whole numbers


class RebindingRecall(TokenTask):
  """Recall the latest value of every key: `k1 v1 k2 v2 k1 v3 k2 v4 k2 k1`, with v4 and v3 as the
  targets at the last two tokens.

  A sequence binds keys to values (length - `keys`) / 2 times, in an order in which every key is
  bound at least once and all orders are equally likely otherwise, and then asks for each key once,
  in random order. A key that is bound again has a new value with probability `changes`, and else
  keeps the one that it has; at 0 the task is plain recall, with repetition. All new values of a
  sequence are different, so that an outdated value is a wrong one. Keys are 1..`vocab_size`/2 - 1,
  values the tokens above them. The only targets are the values at the keys that are asked for, in
  training and in tests: the score is the accuracy on them.

  Attributes:
    keys: number of different keys of a sequence.
    changes: probability that a key which is bound again has a new value.
  """

  keys: int = 4
  changes: float = 1.0
  vocab_size: int = 64
  length: int = 36

  def validate(self) -> None:
    self.require_positive('keys')
    least = 3 * self.keys
    self.require(
      self.length >= least and (self.length - self.keys) % 2 == 0,
      'length',
      f'at least {least} and {"odd" if self.keys % 2 else "even"}: each of {self.keys} keys once '
      'with a value and once alone, and further bindings of two tokens',
    )
    values = max(self.bindings, self.keys + 1)
    self.require(
      self.vocab_size >= 2 * values,
      'vocab_size',
      f'at least {2 * values}, for {self.bindings} values',
    )
    self.require(0 <= self.changes <= 1, 'changes', 'at least 0 and at most 1')
    super().validate()

  @property
  def bindings(self) -> int:
    """How often a sequence binds a key to a value."""
    return (self.length - self.keys) // 2

  def rows(self, side: Side, index_N: Index) -> Batch:
    V, K, W, N = self.vocab_size, self.keys, self.bindings, index_N.size
    bits = self.random_bits(side, index_N, 2 * K + 4 * W)
    key_NK, bits = 1 + distinct(V // 2 - 1, bits[:, :K]), bits[:, K:]
    asked_NK, bits = distinct(K, bits[:, :K]), bits[:, K:]
    fresh_NW, extra, order_NW, change = (bits[:, i * W : (i + 1) * W] for i in range(4))
    fresh_NW, order_NW = V // 2 + distinct(V - V // 2, fresh_NW), distinct(W, order_NW)
    bound_NW = integers(K, extra)
    bound_NW[:, :K] = np.arange(K)
    bound_NW = np.take_along_axis(bound_NW, order_NW, axis=1)
    changed_NW = integers(CERTAIN, change) < round(self.changes * CERTAIN)
    value_NW, latest_NK = fresh_NW, np.full((N, K), -1)
    for w in range(W):
      key_N1 = bound_NW[:, w : w + 1]
      before_N = np.take_along_axis(latest_NK, key_N1, axis=1)[:, 0]
      keeps_N = (before_N >= 0) & ~changed_NW[:, w]
      value_NW[keeps_N, w] = before_N[keeps_N]
      np.put_along_axis(latest_NK, key_N1, value_NW[:, w : w + 1], axis=1)
    tokens = np.empty((N, self.length), np.int32)
    tokens[:, 0 : 2 * W : 2] = np.take_along_axis(key_NK, bound_NW, axis=1)
    tokens[:, 1 : 2 * W : 2] = value_NW
    tokens[:, 2 * W :] = np.take_along_axis(key_NK, asked_NK, axis=1)
    targets = np.full((N, self.length), IGNORE, np.int32)
    targets[:, 2 * W :] = np.take_along_axis(latest_NK, asked_NK, axis=1)
    return Batch(tokens, targets, None)
