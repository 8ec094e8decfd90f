"""The MAD suite (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures", arXiv
2403.17844, section 3.1 and appendix B): what a sequence mixer should be able to do, one small task
each.

Defaults are the suite's baseline, and `mad_suite` gives the harder settings that its score is the
mean over. The multi-query forms of recall are the ones that the suite scores: models learn to
predict every next token, and are scored by the values of keys that came before. The authors' code
takes the accuracy of each token that is asked for and then their mean, and here it is that of all
targets; uniform answers make the two much the same. Selective copying stands in `copying.py`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from jaxformer.data import shuffle
from jaxformer.data.tasks.copying import MadSelectiveCopying
from jaxformer.data.tasks.task import (
  GeneratedTask,
  Side,
  TaskConfig,
  bernoulli,
  distinct,
  integers,
  random_bits,
  seen_before,
)
from jaxformer.task_type import IGNORE, Batch, TaskType


class MadTask(GeneratedTask, abstract=True):
  """Base of the suite's tasks: as many sequences as there.

  Attributes:
    vocab_size: with every special token.
    length: tokens of a sequence, with the last answer.
  """

  vocab_size: int = 16
  length: int = 128
  train_sequences: int | None = 12_800
  test_sequences: int = 1280

  @property
  def positions(self) -> int:
    return self.length

  @property
  def task(self) -> TaskType:
    return TaskType(vocab_size=self.vocab_size)


# ---- recall ------------------------------------------------------------------------------------


class RecallTask(MadTask, abstract=True):
  """Base of the tasks whose keys and values are one token each."""

  def validate(self) -> None:
    self.require(self.length >= 4 and self.length % 2 == 0, 'length', 'even and at least 4')
    special = self.vocab_size - self.symbols
    self.require(
      self.symbols >= 4,
      'vocab_size',
      f'at least {special + 4}, of which two are keys and two values',
    )
    super().validate()

  @property
  def positions(self) -> int:
    return self.length - 1

  @property
  def symbols(self) -> int:
    """Tokens that are keys (the first half) or values."""
    return self.vocab_size

  def _recall(
    self,
    side: Side,
    index_N: Int64[np.ndarray, ' N'],
    noise_NP: Bool[np.ndarray, 'N P'],
    noise_NP2: Int64[np.ndarray, 'N P 2'],
  ) -> Batch:
    """Pairs, with noise in the place of some."""
    (N, P), keys = noise_NP.shape, self.symbols // 2
    bits = self.random_bits(side, index_N, 2 * keys + P)
    value_NK = keys + integers(self.symbols - keys, bits[:, :keys])
    key_NP = integers(keys, bits[:, keys : keys + P])
    came_NK = np.zeros((N, keys + 1), bool)
    np.put_along_axis(came_NK, np.where(noise_NP, keys, key_NP), True, axis=1)
    # Of the keys that came the one with the largest random number.
    last_N = np.where(came_NK[:, :keys], bits[:, keys + P :] >> np.uint64(1), np.uint64(0)).argmax(
      axis=1
    )
    key_NQ = np.concatenate([key_NP, last_N[:, None]], axis=1)
    tokens, asked = (
      np.stack([key_NQ, np.take_along_axis(value_NK, key_NQ, axis=1)], axis=2),
      np.zeros((N, P + 1, 2), bool),
    )
    tokens[:, :P] = np.where(noise_NP[:, :, None], noise_NP2, tokens[:, :P])
    noise_NQ = np.pad(noise_NP, ((0, 0), (0, 1)))
    asked[:, :, 1] = seen_before(np.where(noise_NQ, keys, key_NQ)) & ~noise_NQ
    return next_token_targets(tokens.reshape(N, self.length), asked.reshape(N, self.length), side)


class InContextRecall(RecallTask):
  """Say the value of a key again: `a 2 c 4 a 2 b 3 c 4 ...`, asked for the value at every key that
  came before.

  In each sequence every key has a value of its own, drawn at random. `length` / 2 pairs of a random
  key and its value follow each other; the last is of a key that came, each of those as likely. The
  first half of the vocabulary are keys, the rest values. The score is the fraction right of the
  values of keys that came before."""

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    shape = index_N.size, self.length // 2 - 1
    return self._recall(side, index_N, np.zeros(shape, bool), np.zeros((*shape, 2), np.int64))


class NoisyInContextRecall(RecallTask):
  """`InContextRecall` among noise: `a 2 # % c 4 a 2 % % ...`, asked as there.

  Each pair but the last is, with probability `noise`, two random tokens of a vocabulary of their
  own instead, the last `noise_vocab_size` tokens; one of them, drawn anew for each sequence, never
  is (the authors' may also be the last pair)."""

  vocab_size: int = 32
  noise: float = 0.2
  noise_vocab_size: int = 16

  def validate(self) -> None:
    self.require(0 < self.noise < 1, 'noise', 'above 0 and below 1')
    self.require(self.noise_vocab_size > 0, 'noise_vocab_size', 'positive')
    super().validate()

  @property
  def symbols(self) -> int:
    return self.vocab_size - self.noise_vocab_size

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    N, P = index_N.size, self.length // 2 - 1
    bits = self.random_bits(side, index_N, 1 + 3 * P, 'noise')
    noise_NP = bernoulli(self.noise, bits[:, 1 : 1 + P])
    noise_NP[np.arange(N), integers(P, bits[:, 0])] = False
    return self._recall(
      side,
      index_N,
      noise_NP,
      self.symbols + integers(self.noise_vocab_size, bits[:, 1 + P :]).reshape(N, P, 2),
    )


class FuzzyInContextRecall(MadTask):
  """`InContextRecall` with keys and values of several tokens: `a c 2 b 4 3 1 a c 2 ...`, asked for
  every token of the value of a key that came before.

  Keys are 1 to `key_tokens` different tokens (in tests always `key_tokens`, else nothing would say
  where they end), values 1 to `value_tokens`, every length as likely and every choice of tokens of
  a length. In each sequence every key has a value of its own, drawn at random. Pairs follow each
  other while they leave room for the longest; the last is that of one of the pairs that came. Token
  `vocab_size` - 1 fills up at the left; the first half of the others are in keys, the rest in
  values. Ours is how the last
  pair is drawn: the authors place it by its position, at times where the sequence has ended before.
  """

  key_tokens: int = 3
  value_tokens: int = 3

  def validate(self) -> None:
    # of an odd number of symbols values have one more
    least = max(2 * self.key_tokens, 2 * self.value_tokens - 1, 4) + 1
    self.require(self.key_tokens > 0, 'key_tokens', 'positive')
    self.require(self.value_tokens > 0, 'value_tokens', 'positive')
    self.require(
      self.vocab_size >= least,
      'vocab_size',
      f'at least {least}, for keys of {self.key_tokens} different tokens, '
      f'values of {self.value_tokens}, and one that fills up',
    )
    self.require(
      self.vocab_size**self.key_tokens < 2**62,
      'key_tokens',
      f'fewer: there are 2^62 keys of {self.vocab_size} tokens',
    )
    longest = self.key_tokens + self.value_tokens
    self.require(
      self.length >= 2 * longest, 'length', f'at least {2 * longest}, for two of the longest pairs'
    )
    super().validate()

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    N, k, keys = index_N.size, self.key_tokens, (self.vocab_size - 1) // 2
    room, shortest = self.length + 1 - k - self.value_tokens, 2 if side == 'train' else k + 1
    P = room // shortest
    bits = self.random_bits(side, index_N, 2 + P * (k + 1))
    word_MK = bits[:, 2:].reshape(N * P, k + 1)
    size_M = 1 + integers(k, word_MK[:, 0]) if side == 'train' else np.full(N * P, k)
    key_MK = motifs(size_M, keys, word_MK[:, 1:])
    number_M = ((key_MK + 1) * self.vocab_size ** np.arange(k)).sum(axis=1)
    # Words that the sequence and the key decide, so the same for a key wherever it comes.
    of_key_M = (shuffle.scramble(number_M.astype(np.uint64)) ^ np.repeat(bits[:, 0], P)).view(
      np.int64
    )
    word_MV = random_bits(
      shuffle.key(self.seed, self.tag, 'values'), of_key_M, 1 + self.value_tokens
    )
    value_MV = motifs(
      1 + integers(self.value_tokens, word_MV[:, 0]), self.vocab_size - 1 - keys, word_MV[:, 1:]
    )
    pair_NPL = np.concatenate(
      [key_MK, np.where(value_MV < 0, -1, keys + value_MV)], axis=1
    ).reshape(N, P, -1)
    shown_NP = np.cumsum((pair_NPL >= 0).sum(axis=2), axis=1) <= room
    last_N = (bits[:, 1] % shown_NP.sum(axis=1).astype(np.uint64)).astype(np.int64)[:, None]
    number_NP = number_M.reshape(N, P)
    pair_NQL = np.concatenate(
      [
        np.where(shown_NP[:, :, None], pair_NPL, -1),
        np.take_along_axis(pair_NPL, last_N[:, :, None], axis=1),
      ],
      axis=1,
    )
    again_NQ = seen_before(
      np.concatenate([number_NP, np.take_along_axis(number_NP, last_N, axis=1)], axis=1)
    )
    asked_NQL = again_NQ[:, :, None] & (np.arange(pair_NQL.shape[2]) >= k)
    return next_token_targets(
      *self._packed(pair_NQL.reshape(N, -1), asked_NQL.reshape(N, -1)), side
    )

  def _packed(
    self, cell_NC: Int64[np.ndarray, 'N C'], asked_NC: Bool[np.ndarray, 'N C']
  ) -> tuple[Int64[np.ndarray, 'N T'], Bool[np.ndarray, 'N T']]:
    """The cells that hold a token, next to each other at the right, and which of them are asked."""
    shape, full_NC = (len(cell_NC), self.length + 1), cell_NC >= 0
    rank_NC = np.cumsum(full_NC, axis=1)
    row, place = np.nonzero(full_NC)[0], (rank_NC + self.length - rank_NC[:, -1:])[full_NC]
    tokens, asked = np.full(shape, self.vocab_size - 1), np.zeros(shape, bool)
    tokens[row, place], asked[row, place] = cell_NC[full_NC], asked_NC[full_NC]
    return tokens, asked


def motifs(
  size_M: Int64[np.ndarray, ' M'], symbols: int, bits_MK: UInt64[np.ndarray, 'M K']
) -> Int64[np.ndarray, 'M K']:
  """As many different numbers of 0..symbols-1 as the sizes say, then -1."""
  return np.where(np.arange(bits_MK.shape[1]) < size_M[:, None], distinct(symbols, bits_MK), -1)


def next_token_targets(
  tokens_NS: Int64[np.ndarray, 'N S'], asked_NS: Bool[np.ndarray, 'N S'], side: Side
) -> Batch:
  """Sequences learned from as text is, every next token a target; in tests those asked alone
  are."""
  targets = tokens_NS[:, 1:].astype(np.int32)
  if side == 'test':
    targets = np.where(asked_NS[:, 1:], targets, np.int32(IGNORE))
  return Batch(tokens_NS[:, :-1].astype(np.int32), targets, None)


# ---- compression and memorization --------------------------------------------------------------


class Compression(MadTask):
  """Tell a whole sequence from its last position: random tokens, then a special one, asked for all
  of them.

  A model reads the sequence, and every token is to be told from its vector at the last position and
  the place asked for, by an MLP: it takes an `Autoencoder`, since a language model would see at
  each position what it is asked for. The special token is `vocab_size` - 1. As in the authors' code
  it is asked for too, so that the score is the fraction right of `length` tokens, one of them
  always the same."""

  length: int = 32

  def validate(self) -> None:
    self.require(self.length >= 2, 'length', 'at least 2')
    self.require(self.vocab_size >= 3, 'vocab_size', 'at least 3')
    super().validate()

  @property
  def task(self) -> TaskType:
    return TaskType(predicts='sequence', vocab_size=self.vocab_size)

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    special = self.vocab_size - 1
    tokens = integers(special, self.random_bits(side, index_N, self.length)).astype(np.int32)
    tokens[:, -1] = special
    return Batch(tokens, tokens.copy(), None)


class Memorization(MadTask):
  """Learn facts by heart: `a _ c _ b _ ...`, asked at each `_` for the value of the key before it,
  which is never shown.

  Each key has one value for good (no two the same), drawn with the `seed`, on both sides: to be
  learned from the targets of training. `length` / 2 random keys are each followed by the special
  token, `vocab_size` - 1; the first half of the other tokens are keys, the rest values. The score
  is the fraction of values that are right. With the larger vocabularies of the suite some keys come
  in no training sequence."""

  vocab_size: int = 256
  length: int = 32
  train_sequences: int | None = 256

  def validate(self) -> None:
    self.require(self.length >= 2 and self.length % 2 == 0, 'length', 'even and at least 2')
    self.require(
      self.vocab_size >= 5, 'vocab_size', 'at least 5: two keys, two values and the token that asks'
    )
    super().validate()

  def rows(self, side: Side, index_N: Int64[np.ndarray, ' N']) -> Batch:
    keys, special = (self.vocab_size - 1) // 2, self.vocab_size - 1
    value_K = keys + shuffle.shuffled(
      special - keys, np.arange(keys), shuffle.key(self.seed, self.tag, 'values')
    )
    key_NP = integers(keys, self.random_bits(side, index_N, self.length // 2))
    tokens = np.full((index_N.size, self.length), special, np.int32)
    targets = np.full(tokens.shape, IGNORE, np.int32)
    tokens[:, ::2], targets[:, 1::2] = key_NP, value_K[key_NP]
    return Batch(tokens, targets, None)


# ---- the suite ---------------------------------------------------------------------------------

_FEWER = (6400, 3200, 1600, 800)
_HARDER: dict[type[TaskConfig], dict[str, tuple[float, ...]]] = {
  InContextRecall: {
    'vocab_size': (32, 64, 128),
    'length': (256, 512, 1024),
    'train_sequences': _FEWER,
  },
  FuzzyInContextRecall: {
    'vocab_size': (32, 64, 128),
    'length': (256, 512, 1024),
    'train_sequences': _FEWER,
  },
  NoisyInContextRecall: {
    'vocab_size': (48, 80, 144),
    'length': (256, 512, 1024),
    'train_sequences': _FEWER,
    'noise': (0.4, 0.6, 0.8),
  },
  MadSelectiveCopying: {
    'vocab_size': (32, 64, 128),
    'length': (512, 1024),
    'train_sequences': _FEWER,
    'copied': (32, 64, 96),
  },
  Compression: {'vocab_size': (32, 64, 128), 'length': (64, 128, 256), 'train_sequences': _FEWER},
  Memorization: {'vocab_size': (512, 1024, 2048, 4096, 8192)},
}


def mad_suite() -> list[TaskConfig]:
  """The tasks of the suite, each at its baseline and then harder in one way at a time. A task's
  score is the mean over its own."""
  return [
    t
    for kind, ways in _HARDER.items()
    for t in (
      kind(),
      *(kind().replace(**{field: value}) for field, values in ways.items() for value in values),
    )
  ]
