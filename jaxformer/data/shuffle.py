"""The order of training as a stateless permutation: which row is at a position of the endless
sequence of training rows.

All functions are pure, vectorized over positions, and use integer arithmetic only, so the order
never changes with a library: a run resumed years later sees the same data. Positions are counted
over the global batch, so the order is independent of the number of hosts."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

Index = Int64[np.ndarray, ' N']  # numbers of rows, or positions in a sequence of them
SLOTS = 4096
ROUNDS = 6


def key(seed: int, *path: int | str) -> np.uint64:
  """Return a 64-bit key for one purpose; different paths give unrelated keys for all seeds."""
  digest = hashlib.blake2b(repr((int(seed), *path)).encode(), digest_size=8).digest()
  return np.uint64(int.from_bytes(digest, 'little'))


def scramble(x_N: UInt64[np.ndarray, ' N']) -> UInt64[np.ndarray, ' N']:
  """Apply the finalizer of SplitMix64 (Steele et al. 2014), a bijection on uint64 without visible
  structure."""
  x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_N ^ (x_N >> np.uint64(31))


def random_below(bound: int, position_N: Index, seed_key: np.uint64) -> Index:
  """Return a number in 0..bound-1, drawn independently for each position. The bias is below bound /
  2^64."""
  mixed_N = scramble(scramble(position_N.astype(np.uint64)) ^ seed_key)
  return (mixed_N % np.uint64(bound)).astype(np.int64)


def shuffled(count: int, position_N: Index, seed_key: np.uint64) -> Index:
  """Return the element of 0..count-1 at each position of an endless pass over them, with a new
  permutation every epoch.

  The permutation is a Feistel network on the smallest even number of bits that holds `count`,
  iterated until it is in range (cycle walking, Black and Rogaway 2002), so it needs no memory."""
  epoch_N, inside_N = np.divmod(position_N.astype(np.int64), count)
  half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
  mask = np.uint64((1 << int(half)) - 1)
  keys_N = scramble(scramble(epoch_N.astype(np.uint64)) ^ seed_key)
  x_N = inside_N.astype(np.uint64)
  todo = np.arange(x_N.size)
  while todo.size:
    left, right, keys = x_N[todo] >> half, x_N[todo] & mask, keys_N[todo]
    for round_ in range(ROUNDS):
      salt = np.array([round_], np.uint64) << np.uint64(56)
      left, right = right, left ^ (scramble(right ^ keys ^ salt) & mask)
    x_N[todo] = (left << half) | right
    todo = todo[x_N[todo] >= count]
  return x_N.astype(np.int64)


def interleave(weights: Sequence[float]) -> Callable[[Index], tuple[Index, Index]]:
  """Return a function that assigns positions to parts in proportion to weights, as evenly as
  possible, in a pattern that repeats after 4096 positions. It returns the part of each position,
  and how many earlier positions have the same part.

  Every part gets at least one position of the pattern; shares are exact to 1 in 4096.
  """
  share = np.asarray(weights, np.float64) / np.sum(weights) * SLOTS
  quota_K = np.maximum(np.floor(share).astype(np.int64), 1)
  while (excess := int(quota_K.sum()) - SLOTS) != 0:  # largest remainders, both ways
    worst = (
      np.argmax(share - quota_K)
      if excess < 0
      else np.argmax(np.where(quota_K > 1, quota_K - share, -np.inf))
    )
    quota_K[worst] += 1 if excess < 0 else -1
  # The j-th of q positions belongs at time (j + 1/2) / q of the pattern.
  part = np.repeat(np.arange(quota_K.size), quota_K)
  rank = np.concatenate([np.arange(q) for q in quota_K])
  by_time = np.argsort((rank + 0.5) / quota_K[part], kind='stable')
  part_S, rank_S = part[by_time], rank[by_time]

  def interleaved(position_N: Index) -> tuple[Index, Index]:
    cycle_N, slot_N = np.divmod(position_N.astype(np.int64), SLOTS)
    part_N = part_S[slot_N]
    return part_N, cycle_N * quota_K[part_N] + rank_S[slot_N]

  return interleaved
