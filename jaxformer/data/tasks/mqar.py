"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, definition 3.1),
as in the authors' code."""

from __future__ import annotations

import decimal
import functools

import numpy as np
from jaxtyping import Int64, UInt64

from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import Side, TokenTask, distinct, integers
from jaxformer.task_type import IGNORE, Batch

SCALE = 2**40  # of the power law's weights as whole numbers


class MultiQueryRecall(TokenTask):
  """Recall the values of many keys, some soon and some late: `k1 v1 k2 v2 k3 v3 . k2 . . . k1 . k3
  . .`, asked for the value at every key of the second part.

  The first 2 `pairs` tokens are different keys and their values, all different. Of the places that
  follow, every second one is a slot, numbered i = 1, 2, ...; each key in turn comes once more, in a
  slot drawn in proportion to i^(`power` - 1) among those still free, so that few come late; 1 is
  uniform. Token 0 fills the rest, or with `random_filler` tokens at random. Keys are
  1..`vocab_size`/2 - 1, values the tokens above them. There is no target but the values at the
  repeated keys, in training as in
  tests: the score is the fraction of them that are right.

  The defaults are the easiest of the sizes in figure 2 of the paper, which go with (`length`,
  `pairs`) = (64, 4), (128, 8), (256, 16) and (512, 64), and the number of sequences, power and
  filler of its code."""

  pairs: int = 4
  vocab_size: int = 8192
  length: int = 64
  power: float = 0.01
  random_filler: bool = False
  train_sequences: int | None = 100_000
  test_sequences: int = 3000

  def validate(self) -> None:
    self.require(self.pairs > 0, 'pairs', 'positive')
    self.require(
      self.length % 2 == 0 and self.length >= 4 * self.pairs,
      'length',
      f'even and at least {4 * self.pairs}: {self.pairs} pairs, and a slot for each key',
    )
    self.require(
      self.vocab_size >= 2 * self.pairs + 2,
      'vocab_size',
      f'at least {2 * self.pairs + 2}, for {self.pairs} pairs',
    )
    self.require(0 < self.power <= 1, 'power', 'above 0 and at most 1')
    super().validate()

  def rows(self, side: Side, index_N: Index) -> Batch:
    V, P, N = self.vocab_size, self.pairs, index_N.size
    filler = self.length if self.random_filler else 0
    bits = self.random_bits(side, index_N, 3 * P + filler)
    key_NP = 1 + distinct(V // 2 - 1, bits[:, :P])
    value_NP = V // 2 + distinct(V - V // 2, bits[:, P : 2 * P])
    place_NP = 2 * (P + drawn(power_law(self.length // 2 - P, self.power), bits[:, 2 * P : 3 * P]))
    tokens = (
      integers(V, bits[:, 3 * P :]) if self.random_filler else np.zeros((N, self.length), np.int64)
    )
    tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = key_NP, value_NP
    np.put_along_axis(tokens, place_NP, key_NP, axis=1)
    targets = np.full((N, self.length), IGNORE, np.int32)
    np.put_along_axis(targets, place_NP, value_NP.astype(np.int32), axis=1)
    return Batch(tokens.astype(np.int32), targets, None)


@functools.lru_cache(maxsize=64)
def power_law(slots: int, power: float) -> tuple[int, ...]:
  """i^(power - 1) for i = 1..slots, in 2^40ths. Decimal arithmetic, since floating-point powers
  differ between machines."""
  with decimal.localcontext(decimal.Context(prec=28)):
    exponent = decimal.Decimal(repr(power)) - 1
    return tuple(
      int((decimal.Decimal(i) ** exponent * SCALE).to_integral_value()) for i in range(1, slots + 1)
    )


def drawn(weights: tuple[int, ...], bits_NC: UInt64[np.ndarray, 'N C']) -> Int64[np.ndarray, 'N C']:
  """C different numbers below `len(weights)` for each row, one after the other, each in proportion
  to the weights of those left.

  Each row has a binary tree of sums (the parent of nodes 2i and 2i + 1 is i) that a draw is looked
  up in from the root, and that it is taken out of."""
  (N, C), depth = bits_NC.shape, (len(weights) - 1).bit_length()
  leaves = 1 << depth
  sums = np.zeros(2 * leaves, np.uint64)
  sums[leaves : leaves + len(weights)] = weights
  for node in range(leaves - 1, 0, -1):
    sums[node] = sums[2 * node] + sums[2 * node + 1]
  trees, root_N, up = np.tile(sums, N), 2 * leaves * np.arange(N), np.arange(depth + 1)
  drawn_NC = np.empty((N, C), np.int64)
  for c in range(C):
    at_N, node_N = bits_NC[:, c] % trees[root_N + 1], np.ones(N, np.int64)
    for _ in range(depth):
      node_N *= 2
      left_N = trees[root_N + node_N]
      right_N = at_N >= left_N
      at_N -= left_N * right_N
      node_N += right_N
    drawn_NC[:, c] = node_N - leaves
    trees[root_N[:, None] + (node_N[:, None] >> up)] -= trees[root_N + node_N][:, None]
  return drawn_NC
