"""The MAD suite (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures", arXiv
2403.17844, section 3.1 and appendix B): small tasks, one for each ability of a sequence mixer.

Question: which of these abilities does an architecture have? The tasks are of this one paper, so
they stand here and not in the package: an example of a user's own data, which a command names as
FILE.py:NAME and a Python file loads with `load_file`.

    jaxformer train llama2-tiny --data experiments/mad_tasks.py:InContextRecall
    jaxformer train llama2-tiny --data experiments/mad_tasks.py:Memorization --data.vocab-size 64
    jaxformer compare quickstart --study.tasks.0 experiments/mad_tasks.py:MadSelectiveCopying

Defaults are the baseline of the suite, and `mad_suite` gives the harder settings over which its
score is the mean. The multi-query forms of recall are the ones that the suite scores: models are
trained to predict every next token and scored by the values of keys that occurred before. The
authors' code takes the accuracy per token and then the mean over tokens, here it is that of all
targets; since answers are uniform the two are nearly equal.

Cost: a minute for a tiny model on two CPU cores."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from jaxformer.data import shuffle
from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.copying import SelectiveCopying
from jaxformer.data.tasks.task import Side, TaskConfig, TokenTask, distinct, integers, random_bits
from jaxformer.task_type import IGNORE, Batch, TaskType


class MadTask(TokenTask, abstract=True):
  """Base of the tasks of the suite, with its number of sequences."""

  vocab_size: int = 16
  length: int = 128
  train_sequences: int | None = 12_800
  test_sequences: int = 1280


# ---- recall ------------------------------------------------------------------------------------


class InContextRecall(MadTask):
  """Repeat the value of a key: `a 2 c 4 a 2 b 3 c 4 ...`, with the value as target at every key
  that occurred before.

  In each sequence every key has a value of its own, drawn at random. `length` / 2 pairs of a random
  key and its value follow each other; the last is of a key that occurred, all equally likely. The
  first half of the vocabulary are keys, the rest values. The score is the accuracy on the values of
  keys that occurred before."""

  def validate(self) -> None:
    self.require(self.length >= 4 and self.length % 2 == 0, 'length', 'even and at least 4')
    special = self.vocab_size - self.symbols
    accepted = f'at least {special + 4}, of which two are keys and two values'
    self.require(self.symbols >= 4, 'vocab_size', accepted)
    super().validate()

  @property
  def positions(self) -> int:
    return self.length - 1

  @property
  def symbols(self) -> int:
    """Number of tokens that are keys (the first half) or values."""
    return self.vocab_size

  def _noise(
    self, side: Side, index_N: Index
  ) -> tuple[Bool[np.ndarray, 'N P'], Int64[np.ndarray, 'N P 2']]:
    """Return which pairs, apart from the last, are noise, and the tokens of noise."""
    shape = index_N.size, self.length // 2 - 1
    return np.zeros(shape, bool), np.zeros((*shape, 2), np.int64)

  def rows(self, side: Side, index_N: Index) -> Batch:
    noise_NP, noise_NP2 = self._noise(side, index_N)
    (N, P), keys = noise_NP.shape, self.symbols // 2
    bits = self.random_bits(side, index_N, 2 * keys + P)
    key_NQ, pair_NQ2 = drawn_pairs(bits, keys, self.symbols - keys, noise_NP)
    pair_NQ2[:, :P] = np.where(noise_NP[:, :, None], noise_NP2, pair_NQ2[:, :P])
    noise_NQ = np.pad(noise_NP, ((0, 0), (0, 1)))
    scored = np.zeros(pair_NQ2.shape, bool)
    scored[:, :, 1] = seen_before(np.where(noise_NQ, keys, key_NQ)) & ~noise_NQ
    return next_token_targets(pair_NQ2.reshape(N, -1), scored.reshape(N, -1), side)


class NoisyInContextRecall(InContextRecall):
  """`InContextRecall` among noise: `a 2 # % c 4 a 2 % % ...`, with the same targets.

  Each pair but the last is, with probability `noise`, two random tokens of a separate vocabulary
  instead, the last `noise_vocab_size` tokens; one of them, drawn for each sequence, never is (in
  the authors' code this may also be the last pair)."""

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

  def _noise(
    self, side: Side, index_N: Index
  ) -> tuple[Bool[np.ndarray, 'N P'], Int64[np.ndarray, 'N P 2']]:
    N, P = index_N.size, self.length // 2 - 1
    bits = self.random_bits(side, index_N, 1 + 3 * P, 'noise')
    noise_NP = bernoulli(self.noise, bits[:, 1 : 1 + P])
    noise_NP[np.arange(N), integers(P, bits[:, 0])] = False
    noise_NP2 = self.symbols + integers(self.noise_vocab_size, bits[:, 1 + P :]).reshape(N, P, 2)
    return noise_NP, noise_NP2


class FuzzyInContextRecall(MadTask):
  """`InContextRecall` with keys and values of several tokens: `a c 2 b 4 3 1 a c 2 ...`, with every
  token of the value of a key that occurred before as target.

  Keys are 1 to `key_tokens` different tokens (in tests always `key_tokens`, else nothing would show
  where they end), values 1 to `value_tokens`; lengths, and tokens of a length, are equally likely.
  In each sequence every key has a value of its own, drawn at random. Pairs follow each other while
  there is space for the longest; the last repeats one of them. Token `vocab_size` - 1 is padding at
  the left; the first half of the others are in keys, the rest in values. The last pair is drawn
  differently from the authors' code, which draws its position, at times after the end of the
  sequence."""

  key_tokens: int = 3
  value_tokens: int = 3

  def validate(self) -> None:
    # With an odd number of symbols there is one more for values.
    least = max(2 * self.key_tokens, 2 * self.value_tokens - 1, 4) + 1
    self.require(self.key_tokens > 0, 'key_tokens', 'positive')
    self.require(self.value_tokens > 0, 'value_tokens', 'positive')
    self.require(
      self.vocab_size >= least,
      'vocab_size',
      f'at least {least}, for keys of {self.key_tokens} different tokens, '
      f'values of {self.value_tokens}, and padding',
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

  def rows(self, side: Side, index_N: Index) -> Batch:
    N, k, keys = index_N.size, self.key_tokens, (self.vocab_size - 1) // 2
    space = self.length + 1 - k - self.value_tokens  # for all pairs but the last
    P = space // (2 if side == 'train' else k + 1)
    bits = self.random_bits(side, index_N, 2 + P * (k + 1))
    bits_MK = bits[:, 2:].reshape(N * P, k + 1)
    size_M = 1 + integers(k, bits_MK[:, 0]) if side == 'train' else np.full(N * P, k)
    key_MK = motifs(size_M, keys, bits_MK[:, 1:])
    number_M = ((key_MK + 1) * self.vocab_size ** np.arange(k)).sum(axis=1)
    value_MV = self._values(number_M, np.repeat(bits[:, 0], P), keys)
    pair_NPL = np.concatenate([key_MK, value_MV], axis=1).reshape(N, P, -1)
    shown_NP = np.cumsum((pair_NPL >= 0).sum(axis=2), axis=1) <= space
    last_N = (bits[:, 1] % shown_NP.sum(axis=1).astype(np.uint64)).astype(np.int64)[:, None]
    number_NP = number_M.reshape(N, P)
    last_NL = np.take_along_axis(pair_NPL, last_N[:, :, None], axis=1)
    pair_NQL = np.concatenate([np.where(shown_NP[:, :, None], pair_NPL, -1), last_NL], axis=1)
    number_NQ = np.concatenate([number_NP, np.take_along_axis(number_NP, last_N, axis=1)], axis=1)
    is_value_L = np.arange(pair_NQL.shape[2]) >= k
    scored_NQL = seen_before(number_NQ)[:, :, None] & is_value_L
    tokens, scored = self._right_aligned(pair_NQL.reshape(N, -1), scored_NQL.reshape(N, -1))
    return next_token_targets(tokens, scored, side)

  def _values(
    self, number_M: Int64[np.ndarray, ' M'], sequence_M: UInt64[np.ndarray, ' M'], keys: int
  ) -> Int64[np.ndarray, 'M V']:
    """Return the values of keys. The random words follow from the sequence and the key, so a key
    has the same value wherever it occurs."""
    mixed_M = shuffle.scramble(number_M.astype(np.uint64)) ^ sequence_M
    seed_key = shuffle.key(self.seed, self.tag, 'values')
    bits_MV = random_bits(seed_key, mixed_M.view(np.int64), 1 + self.value_tokens)
    size_M = 1 + integers(self.value_tokens, bits_MV[:, 0])
    value_MV = motifs(size_M, self.vocab_size - 1 - keys, bits_MV[:, 1:])
    return np.where(value_MV < 0, -1, keys + value_MV)

  def _right_aligned(
    self, cell_NC: Int64[np.ndarray, 'N C'], scored_NC: Bool[np.ndarray, 'N C']
  ) -> tuple[Int64[np.ndarray, 'N T'], Bool[np.ndarray, 'N T']]:
    """Return the cells that hold a token, moved together to the right, and which are scored."""
    shape, full_NC = (len(cell_NC), self.length + 1), cell_NC >= 0
    rank_NC = np.cumsum(full_NC, axis=1)
    row, place = np.nonzero(full_NC)[0], (rank_NC + self.length - rank_NC[:, -1:])[full_NC]
    tokens, scored = np.full(shape, self.vocab_size - 1), np.zeros(shape, bool)
    tokens[row, place], scored[row, place] = cell_NC[full_NC], scored_NC[full_NC]
    return tokens, scored


def motifs(
  size_M: Int64[np.ndarray, ' M'], symbols: int, bits_MK: UInt64[np.ndarray, 'M K']
) -> Int64[np.ndarray, 'M K']:
  """Return rows of `size_M` different integers in 0..symbols-1, then -1."""
  return np.where(np.arange(bits_MK.shape[1]) < size_M[:, None], distinct(symbols, bits_MK), -1)


def next_token_targets(
  tokens_NS: Int64[np.ndarray, 'N S'], scored_NS: Bool[np.ndarray, 'N S'], side: Side
) -> Batch:
  """Return sequences as for language modeling: in training every next token is a target, in tests
  only those that are scored."""
  targets = tokens_NS[:, 1:].astype(np.int32)
  if side == 'test':
    targets = np.where(scored_NS[:, 1:], targets, np.int32(IGNORE))
  return Batch(tokens_NS[:, :-1].astype(np.int32), targets)


# ---- selective copying -------------------------------------------------------------------------


class MadSelectiveCopying(SelectiveCopying):
  """`. a . . b . c => . . .`, with targets a b c at the last positions (Poli et al. 2024, section
  3.1 and appendix B; the MAD suite).

  Each blank goes before one of the tokens to copy, all equally likely, so the last of them is
  followed at once by the marker; then one more blank per token. `vocab_size` - 2 is the blank,
  `vocab_size` - 1 the marker, those below are copied. The defaults are the baseline of the
  suite."""

  length: int = 256
  train_sequences: int | None = 12_800
  test_sequences: int = 1280

  def rows(self, side: Side, index_N: Index) -> Batch:
    M, blank, N = self.copied, self.vocab_size - 2, index_N.size
    blanks = self.length - 2 * M - 1
    bits = self.random_bits(side, index_N, M + blanks)
    tokens = np.full((N, self.length), blank, np.int32)
    tokens[:, M + blanks] = blank + 1
    before_NC = np.bincount(
      (np.arange(N)[:, None] * M + integers(M, bits[:, M:])).reshape(-1), minlength=N * M
    ).reshape(N, M)
    copy_NC = integers(blank, bits[:, :M]).astype(np.int32)
    np.put_along_axis(tokens, np.arange(M) + np.cumsum(before_NC, axis=1), copy_NC, axis=1)
    targets = np.full(tokens.shape, IGNORE, np.int32)
    targets[:, self.length - M :] = copy_NC
    return Batch(tokens, targets)


# ---- compression and memorization --------------------------------------------------------------


class Compression(MadTask):
  """Reconstruct a sequence from its last hidden state: random tokens, then a special one, all of
  them targets.

  A model reads the sequence, and an MLP predicts every token from the hidden state at the last
  position and the position of the target: this needs a model such as that of
  `experiments/mad_autoencoder.py`, since a language model would see its targets. The special token
  is `vocab_size` - 1. As in the authors' code it is a target too, so the score is the accuracy on
  `length` tokens, one of them always the same."""

  length: int = 32

  def validate(self) -> None:
    self.require(self.length >= 2, 'length', 'at least 2')
    self.require(self.vocab_size >= 3, 'vocab_size', 'at least 3')
    super().validate()

  @property
  def task(self) -> TaskType:
    return TaskType(predicts='sequence', vocab_size=self.vocab_size)

  def rows(self, side: Side, index_N: Index) -> Batch:
    special = self.vocab_size - 1
    tokens = integers(special, self.random_bits(side, index_N, self.length)).astype(np.int32)
    tokens[:, -1] = special
    return Batch(tokens, tokens.copy(), None)


class Memorization(MadTask):
  """Memorize facts: `a _ c _ b _ ...`, with the value of the key before it as target at each `_`;
  values are never shown.

  Each key has one fixed value (no two the same), drawn with the `seed` and the same on both sides,
  which is learned from the training targets. `length` / 2 random keys are each followed by the
  special token, `vocab_size` - 1; the first half of the other tokens are keys, the rest values. The
  score is the accuracy on the values. With the larger vocabularies of the suite some keys occur in
  no training sequence."""

  vocab_size: int = 256
  length: int = 32
  train_sequences: int | None = 256

  def validate(self) -> None:
    self.require(self.length >= 2 and self.length % 2 == 0, 'length', 'even and at least 2')
    self.require(
      self.vocab_size >= 5, 'vocab_size', 'at least 5: two keys, two values and the special token'
    )
    super().validate()

  def rows(self, side: Side, index_N: Index) -> Batch:
    keys, special = (self.vocab_size - 1) // 2, self.vocab_size - 1
    value_K = keys + shuffle.shuffled(
      special - keys, np.arange(keys), shuffle.key(self.seed, self.tag, 'values')
    )
    key_NP = integers(keys, self.random_bits(side, index_N, self.length // 2))
    tokens = np.full((index_N.size, self.length), special, np.int32)
    targets = np.full(tokens.shape, IGNORE, np.int32)
    tokens[:, ::2], targets[:, 1::2] = key_NP, value_K[key_NP]
    return Batch(tokens, targets, None)


# ---- building blocks ---------------------------------------------------------------------------


def drawn_pairs(
  bits_NW: UInt64[np.ndarray, 'N W'], keys: int, values: int, hidden_NP: Bool[np.ndarray, 'N P']
) -> tuple[Int64[np.ndarray, 'N Q'], Int64[np.ndarray, 'N Q 2']]:
  """Return random keys and (key, value) pairs: P of them and one more whose key is among those that
  are not hidden, all equally likely. Every key has a value of its own; keys are 0..keys-1, values
  the `values` numbers above them."""
  (N, P), K = hidden_NP.shape, keys
  value_NK = K + integers(values, bits_NW[:, :K])
  key_NP = integers(K, bits_NW[:, K : K + P])
  seen_NK = np.zeros((N, K + 1), bool)
  np.put_along_axis(seen_NK, np.where(hidden_NP, K, key_NP), True, axis=1)
  # Of the keys seen, the one with the largest random number.
  weight_NK = np.where(seen_NK[:, :K], bits_NW[:, K + P :] >> np.uint64(1), np.uint64(0))
  key_NQ = np.concatenate([key_NP, weight_NK.argmax(axis=1)[:, None]], axis=1)
  return key_NQ, np.stack([key_NQ, np.take_along_axis(value_NK, key_NQ, axis=1)], axis=2)


def bernoulli(probability: float, bits: UInt64[np.ndarray, '*N']) -> Bool[np.ndarray, '*N']:
  """Return True with a probability, which is rounded down to 53 bits."""
  return (bits >> np.uint64(11)) < np.uint64(int(probability * 2**53))


def seen_before(number_NP: Int64[np.ndarray, 'N P']) -> Bool[np.ndarray, 'N P']:
  """Whether each number occurs earlier in its row."""
  order_NP = np.argsort(number_NP, axis=1, kind='stable')
  sorted_NP = np.take_along_axis(number_NP, order_NP, axis=1)
  again_NP = np.pad(sorted_NP[:, 1:] == sorted_NP[:, :-1], ((0, 0), (1, 0)))
  before_NP = np.empty_like(again_NP)
  np.put_along_axis(before_NP, order_NP, again_NP, axis=1)
  return before_NP


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
  """Return the tasks of the suite, each at its baseline and then harder in one way at a time. The
  score of a task is the mean over its settings."""
  return [
    t
    for kind, ways in _HARDER.items()
    for t in (
      kind(),
      *(kind().replace(**{field: value}) for field, values in ways.items() for value in values),
    )
  ]
