"""Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, definition 3.1),
as in the authors' code."""

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
  . .`, with the value as target at every key of the second part.

  The first 2 `pairs` tokens are different keys and their values, all different. Of the places that
  follow, every second one is a slot, numbered i = 1, 2, ...; each key in turn comes once more, in a
  slot drawn in proportion to i^(`power` - 1) among those still free, so that few come late; 1 is
  uniform. The rest is token 0, or with `random_filler` random tokens. Keys are
  1..`vocab_size`/2 - 1, values the tokens above them. The only targets are the values at the
  repeated keys, in training and in tests: the score is the accuracy on them.

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
    self.require_positive('pairs')
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
  """Return i^(power - 1) for i = 1..slots, in units of 2^-40. Decimal arithmetic, since
  floating-point powers differ between machines."""
  with decimal.localcontext(decimal.Context(prec=28)):
    exponent = decimal.Decimal(repr(power)) - 1
    return tuple(
      int((decimal.Decimal(i) ** exponent * SCALE).to_integral_value()) for i in range(1, slots + 1)
    )


def drawn(weights: tuple[int, ...], bits_NC: UInt64[np.ndarray, 'N C']) -> Int64[np.ndarray, 'N C']:
  """Return C different integers below `len(weights)` for each row, drawn one after another with
  probabilities proportional to the weights of those left."""
  N, C = bits_NC.shape
  left_NS = np.tile(np.array(weights, np.uint64), (N, 1))
  drawn_NC = np.empty((N, C), np.int64)
  for c in range(C):
    sums_NS = np.cumsum(left_NS, axis=1)
    at_N1 = bits_NC[:, c : c + 1] % sums_NS[:, -1:]
    drawn_NC[:, c] = (at_N1 >= sums_NS).sum(axis=1)
    left_NS[np.arange(N), drawn_NC[:, c]] = 0
  return drawn_NC
