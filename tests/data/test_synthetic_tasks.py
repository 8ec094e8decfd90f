"""Recall, copying and the MAD suite against solvers that read nothing but the tokens, and the
distributions that are claimed."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxformer.config import InputError
from jaxformer.data import (
  Compression,
  FuzzyInContextRecall,
  InContextRecall,
  InductionHead,
  MadSelectiveCopying,
  Memorization,
  MultiQueryRecall,
  NoisyInContextRecall,
  SelectiveCopying,
  mad_suite,
)
from jaxformer.data.tasks import mqar
from jaxformer.data.tasks.task import bernoulli, distinct, random_bits, seen_before

pytestmark = pytest.mark.quick
INDEX = np.arange(400)
MANY = np.arange(20_000)
KEY = np.uint64(7)


def rows(batch):
  assert batch.segments_BT is None
  return zip(batch.inputs.tolist(), batch.targets_BT.tolist(), strict=True)


def asked(targets: list[int]) -> dict[int, int]:
  return {t: target for t, target in enumerate(targets) if target != -1}


def assert_drawn_from(counts, probabilities):
  """A chi-squared test at one in ten thousand; the draws are always the same ones."""
  probabilities = np.asarray(probabilities, float)
  assert stats.chisquare(counts, probabilities / probabilities.sum() * np.sum(counts)).pvalue > 1e-4


def assert_uniform(values, low, end):
  counts = np.bincount(np.asarray(values).reshape(-1), minlength=end)
  assert counts[:low].sum() == 0
  assert len(counts) == end
  assert_drawn_from(counts[low:], np.ones(end - low))


# ---- multi-query associative recall ------------------------------------------------------------


@pytest.mark.parametrize(
  'task',
  [
    MultiQueryRecall(),
    MultiQueryRecall(pairs=3, vocab_size=8, length=12),
    MultiQueryRecall(pairs=16, length=256, power=0.5),
    MultiQueryRecall(pairs=5, vocab_size=13, length=40, random_filler=True),
  ],
  ids=['paper', 'full', 'long', 'filler'],
)
def test_every_key_of_mqar_is_asked_once(task):
  half, context = task.vocab_size // 2, 2 * task.pairs
  for side in ('train', 'test'):
    for tokens, targets in rows(task.rows(side, INDEX)):
      keys, values = tokens[0:context:2], tokens[1:context:2]
      told, where = dict(zip(keys, values, strict=True)), asked(targets)
      assert len(set(keys)) == len(set(values)) == task.pairs
      assert 0 < min(keys) <= max(keys) < half <= min(values) <= max(values) < task.vocab_size
      assert min(where) >= context
      assert all(t % 2 == 0 for t in where)
      assert where == {t: told[tokens[t]] for t in where}
      assert {tokens[t] for t in where} == set(keys)
      rest = [token for t, token in enumerate(tokens) if t >= context and t not in where]
      assert task.random_filler or not any(rest)
  if task.random_filler:
    many = task.rows('test', MANY[:5000])
    assert_uniform(many.inputs[:, context:][many.targets_BT[:, context:] == -1], 0, task.vocab_size)


@pytest.mark.parametrize('power', [0.01, 0.5, 1.0])
def test_keys_of_mqar_come_again_by_the_power_law(power):
  task = MultiQueryRecall(pairs=2, vocab_size=10, length=14, power=power)
  batch = task.rows('train', MANY)
  keys, (row, place) = batch.inputs[:, 0:4:2], np.nonzero(batch.targets_BT != -1)
  slot = ((place - 4) // 2).reshape(-1, 2)
  first = np.take_along_axis(batch.inputs, place.reshape(-1, 2), axis=1)[:, 0] == keys[:, 0]
  first, second = np.where(first, slot[:, 0], slot[:, 1]), np.where(first, slot[:, 1], slot[:, 0])
  weight = np.arange(1, 6) ** (power - 1)
  law = {
    (i, j): weight[i] * weight[j] / (weight.sum() - weight[i])
    for i, j in itertools.permutations(range(5), 2)
  }
  assert_drawn_from([np.sum((first == i) & (second == j)) for i, j in law], list(law.values()))
  assert_uniform(keys, 1, 5)
  assert_uniform(batch.targets_BT[row, place], 5, 10)


def test_weights_of_the_power_law():
  np.testing.assert_allclose(
    np.array(mqar.power_law(1000, 0.01)) / 2**40, np.arange(1.0, 1001) ** -0.99, rtol=1e-8
  )
  assert set(mqar.power_law(50, 1.0)) == {2**40}


# ---- selective copying -------------------------------------------------------------------------


@pytest.mark.parametrize(
  'task',
  [
    SelectiveCopying(),
    SelectiveCopying(copied=3, vocab_size=4, length=8),
    MadSelectiveCopying(),
    MadSelectiveCopying(copied=3, vocab_size=4, length=8),
  ],
  ids=['paper', 'short', 'mad', 'mad short'],
)
def test_copying_asks_for_what_was_not_noise(task):
  V, M = task.vocab_size, task.copied
  mad = isinstance(task, MadSelectiveCopying)
  special, marker, noise = ({V - 2, V - 1}, V - 1, V - 2) if mad else ({0, V - 1}, V - 1, 0)
  for side in ('train', 'test'):
    for tokens, targets in rows(task.rows(side, INDEX[:100])):
      assert len(tokens) == task.length
      assert [t for t in tokens if t not in special] == targets[-M:]
      assert set(targets[:-M]) == {-1}
      assert tokens[-M:] == [noise if mad else marker] * M
      assert not mad or (tokens[-M - 1] == marker and tokens[-M - 2] == targets[-1])


def test_what_is_copied_stands_anywhere():
  task = SelectiveCopying(copied=2, vocab_size=5, length=8)
  batch = task.rows('train', MANY)
  assert_uniform(batch.targets_BT[:, -2:], 1, 4)
  places = np.nonzero((batch.inputs > 0) & (batch.inputs < 4))[1].reshape(-1, 2)
  pairs = list(itertools.combinations(range(6), 2))
  assert_drawn_from([np.sum((places == pair).all(axis=1)) for pair in pairs], np.ones(15))


def test_blanks_of_mad_go_before_a_token_each_as_likely():
  task = MadSelectiveCopying(copied=3, vocab_size=5, length=13)
  batch = task.rows('train', MANY)
  assert_uniform(batch.targets_BT[:, -3:], 0, 3)
  places = np.nonzero(batch.inputs < 3)[1].reshape(-1, 3)
  before = np.diff(places, axis=1, prepend=-1) - 1
  assert (before.sum(axis=1) == 6).all()
  for column in before.T:
    assert_drawn_from(np.bincount(column, minlength=7), stats.binom.pmf(np.arange(7), 6, 1 / 3))


# ---- recall of the MAD suite -------------------------------------------------------------------


@pytest.mark.parametrize(
  'task',
  [
    InContextRecall(),
    InContextRecall(vocab_size=4, length=4),
    InContextRecall(vocab_size=128, length=256),
    NoisyInContextRecall(),
    NoisyInContextRecall(vocab_size=7, noise_vocab_size=3, length=4, noise=0.9),
    NoisyInContextRecall(noise=0.8),
  ],
)
def test_recall_asks_for_the_value_of_every_key_that_came(task):
  symbols = task.vocab_size - getattr(task, 'noise_vocab_size', 0)
  for tokens, targets in rows(task.rows('test', INDEX)):
    assert len(tokens) == task.length - 1
    told: dict[int, int] = {}
    expected = {}
    for t in range(0, len(tokens), 2):
      key, value = tokens[t], [*tokens, None][t + 1]
      if key >= symbols:
        assert value >= symbols
        continue
      assert key < symbols // 2
      assert value is None or symbols // 2 <= value < symbols
      if key in told:
        assert value in (None, told[key])
        expected[t] = told[key]
      told.setdefault(key, value)
    assert asked(targets) == expected
    assert len(tokens) - 1 in expected
  for tokens, targets in rows(task.rows('train', INDEX)):
    assert targets[:-1] == tokens[1:]
    told = {k: v for k, v in zip(tokens[:-1:2], tokens[1::2], strict=True) if k < symbols}
    assert targets[-1] == told[tokens[-1]]


def test_keys_values_and_noise_of_recall_are_uniform():
  batch = InContextRecall(vocab_size=7, length=6).rows('test', MANY)
  assert_uniform(batch.inputs[:, 0:4:2], 0, 3)
  assert_uniform(batch.inputs[:, 1], 3, 7)
  same = batch.inputs[:, 0] == batch.inputs[:, 2]
  assert (batch.inputs[same, 4] == batch.inputs[same, 0]).all()
  assert_drawn_from(np.bincount(batch.inputs[~same, 4] == batch.inputs[~same, 2]), [1, 1])
  task = NoisyInContextRecall(length=12, noise=0.4, vocab_size=9, noise_vocab_size=3)
  pairs = task.rows('train', MANY).inputs[:, :10].reshape(-1, 5, 2)
  noise = (pairs >= 6).all(axis=2)
  assert not ((pairs >= 6).any(axis=2) & ~noise).any()
  assert_drawn_from(
    np.bincount(noise.sum(axis=1), minlength=6)[:5], stats.binom.pmf(np.arange(5), 4, 0.4)
  )
  assert (noise.sum(axis=1) < 5).all()
  assert_drawn_from(noise.sum(axis=0), np.ones(5))
  assert_uniform(pairs[noise], 6, 9)


def spans(tokens: list[int], keys: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """The keys and values of a sequence of the fuzzy recall: runs of the two halves of the
  vocabulary."""
  runs = [tuple(run) for _, run in itertools.groupby(tokens, key=lambda t: t < keys)]
  assert tokens[0] < keys
  return list(itertools.zip_longest(runs[0::2], runs[1::2], fillvalue=()))


@pytest.mark.parametrize(
  'task',
  [
    FuzzyInContextRecall(),
    FuzzyInContextRecall(vocab_size=8, length=60),
    FuzzyInContextRecall(vocab_size=7, length=40, key_tokens=1),
    FuzzyInContextRecall(vocab_size=9, length=10, key_tokens=4, value_tokens=1),
  ],
)
def test_fuzzy_recall_asks_for_every_token_of_a_value_that_came(task):
  pad = task.vocab_size - 1
  for side in ('train', 'test'):
    for tokens, targets in rows(task.rows(side, INDEX)):
      assert len(tokens) == task.length
      t = next(t for t, token in enumerate(tokens) if token != pad)
      assert pad not in tokens[t:]
      told: dict[tuple[int, ...], tuple[int, ...]] = {}
      expected: dict[int, int] = {}
      pairs = spans(tokens[t:], pad // 2)
      for i, (key, value) in enumerate(pairs):
        assert 1 <= len(key) <= task.key_tokens
        assert side == 'train' or len(key) == task.key_tokens
        assert len(set(key)) == len(key)
        if key in told:  # the last token of the last pair is asked, not shown
          assert value == told[key][: -1 if i == len(pairs) - 1 else None]
          expected |= {t + len(key) - 1 + j: token for j, token in enumerate(told[key])}
        else:
          told[key] = value
          assert 1 <= len(value) <= task.value_tokens
          assert len(set(value)) == len(value)
        t += len(key) + len(value)
      assert len(tokens) - 1 in expected
      if side == 'train':
        assert targets == [*tokens[1:], expected[len(tokens) - 1]]
      else:
        assert asked(targets) == expected


def test_motifs_of_fuzzy_recall_are_uniform():
  task = FuzzyInContextRecall(vocab_size=7, length=12)  # three tokens in keys, three in values
  firsts, lasts = [], 0
  for tokens, _ in rows(task.rows('train', MANY)):
    pairs = spans([t for t in tokens if t != 6], 3)
    firsts.append(pairs[0])
    lasts += pairs[-1][0] == pairs[0][0]
  assert lasts > len(MANY) / 5
  for part in (0, 1):
    motifs = [pair[part] for pair in firsts]
    each = [list(itertools.permutations(range(3 * part, 3 * part + 3), size)) for size in (1, 2, 3)]
    assert_drawn_from(
      [motifs.count(m) for of_size in each for m in of_size], [1 / len(o) for o in each for _ in o]
    )
  whole = [pair for pair in firsts if len(pair[0]) == 1]  # a value is drawn anew for each sequence
  assert len({value for key, value in whole if key == (0,)}) == 15


# ---- compression and memorization --------------------------------------------------------------


def test_compression_asks_for_everything():
  task = Compression()
  batch = task.rows('test', INDEX)
  np.testing.assert_array_equal(batch.inputs, batch.targets_BT)
  assert batch.inputs.shape == (400, 32)
  assert (batch.inputs[:, -1] == 15).all()
  assert_uniform(batch.inputs[:, :-1], 0, 15)


@pytest.mark.parametrize(
  'task', [Memorization(), Memorization(vocab_size=9, length=4, train_sequences=40)]
)
def test_memorization_is_solved_by_what_training_showed(task):
  special, told = task.vocab_size - 1, {}
  for tokens, targets in rows(task.rows('train', np.arange(task.train_sequences))):
    assert tokens[1::2] == [special] * (task.length // 2)
    assert set(targets[0::2]) == {-1}
    for key, value in zip(tokens[0::2], targets[1::2], strict=True):
      assert told.setdefault(key, value) == value
  keys = special // 2
  assert sorted(told) == list(range(keys))
  assert len(set(told.values())) == keys
  assert keys <= min(told.values()) <= max(told.values()) < special
  for tokens, targets in rows(task.rows('test', INDEX)):
    assert [told[key] for key in tokens[0::2]] == targets[1::2]
  assert_uniform(task.rows('test', INDEX).inputs[:, 0::2], 0, keys)
  other = task.replace(seed=1).rows('test', INDEX)
  assert any(told[k] != v for k, v in zip(other.inputs[:, 0], other.targets_BT[:, 1], strict=True))


# ---- all of them -------------------------------------------------------------------------------


def test_the_suite_varies_one_thing_at_a_time():
  suite = mad_suite()
  assert len(suite) == len(set(suite)) == 66
  for task in suite:
    changed = {
      f
      for f in ('vocab_size', 'length', 'train_sequences', 'noise', 'copied')
      if getattr(task, f, None) != getattr(type(task)(), f, None)
    }
    assert len(changed) <= 1
    batch = task.rows('test', INDEX[:4])
    assert batch.inputs.shape == (4, task.positions)
  assert [t for t in suite if t == type(t)()] == [
    InContextRecall(),
    FuzzyInContextRecall(),
    NoisyInContextRecall(),
    MadSelectiveCopying(),
    Compression(),
    Memorization(),
  ]


@pytest.mark.parametrize(
  'task',
  [
    MultiQueryRecall(),
    SelectiveCopying(length=64),
    MadSelectiveCopying(),
    InContextRecall(),
    NoisyInContextRecall(),
    FuzzyInContextRecall(),
    Compression(),
  ],
)
def test_no_test_sequence_is_one_of_training(task):
  sides = [
    {row.tobytes() for row in task.rows(side, MANY[:3000]).inputs} for side in ('train', 'test')
  ]
  assert len(sides[0] | sides[1]) == 6000


def test_the_same_task_at_other_lengths():
  """Mamba's induction heads: trained at 2^8 positions, scored at 2^6 to 2^20."""
  task = InductionHead(length=255, vocab_size=16, test_sequences=4)
  for exponent in (6, 8, 16):
    other = task.replace(length=2**exponent - 1)
    batch = other.rows('test', np.arange(4))
    assert batch.inputs.shape == (4, 2**exponent)
    for tokens, targets in rows(batch):
      assert asked(targets) == {2**exponent - 1: tokens[tokens.index(14) + 1]}
    assert len(other.fingerprint()) == 64


@pytest.mark.parametrize(
  ('task', 'settings', 'message'),
  [
    (MultiQueryRecall, {'pairs': 0}, 'pairs = 0: must be positive'),
    (MultiQueryRecall, {'pairs': 17}, 'length = 64: must be even and at least 68'),
    (MultiQueryRecall, {'length': 63}, 'length = 63: must be even'),
    (MultiQueryRecall, {'vocab_size': 9}, 'vocab_size = 9: must be at least 10'),
    (MultiQueryRecall, {'power': 0.0}, 'power = 0.0: must be above 0'),
    (MultiQueryRecall, {'power': 1.5}, 'at most 1'),
    (SelectiveCopying, {'copied': 0}, 'copied = 0'),
    (SelectiveCopying, {'vocab_size': 3}, 'vocab_size = 3'),
    (SelectiveCopying, {'length': 33}, 'length = 33: must be at least 34'),
    (MadSelectiveCopying, {'length': 33}, 'length = 33: must be at least 34'),
    (InContextRecall, {'length': 7}, 'length = 7: must be even'),
    (InContextRecall, {'length': 2}, 'length = 2'),
    (InContextRecall, {'vocab_size': 3}, 'vocab_size = 3: must be at least 4'),
    (NoisyInContextRecall, {'vocab_size': 19}, 'vocab_size = 19: must be at least 20'),
    (NoisyInContextRecall, {'noise': 1.0}, 'noise = 1.0'),
    (NoisyInContextRecall, {'noise': 0.0}, 'noise = 0.0'),
    (NoisyInContextRecall, {'noise_vocab_size': 0}, 'noise_vocab_size = 0'),
    (FuzzyInContextRecall, {'vocab_size': 6}, 'vocab_size = 6: must be at least 7'),
    (FuzzyInContextRecall, {'key_tokens': 0}, 'key_tokens = 0'),
    (FuzzyInContextRecall, {'value_tokens': 0}, 'value_tokens = 0'),
    (FuzzyInContextRecall, {'key_tokens': 16, 'vocab_size': 64}, 'key_tokens = 16: must be fewer'),
    (FuzzyInContextRecall, {'length': 11}, 'length = 11: must be at least 12'),
    (Compression, {'length': 1}, 'length = 1'),
    (Compression, {'vocab_size': 2}, 'vocab_size = 2'),
    (Memorization, {'length': 3}, 'length = 3'),
    (Memorization, {'vocab_size': 4}, 'vocab_size = 4'),
    (Memorization, {'test_sequences': 0}, 'test_sequences = 0'),
  ],
)
def test_settings(task, settings, message):
  with pytest.raises(InputError, match=message):
    task(**settings)


# ---- what they are made with -------------------------------------------------------------------


def test_distinct_numbers_in_every_order():
  drawn = distinct(4, random_bits(KEY, MANY, 3))
  orders = list(itertools.permutations(range(4), 3))
  assert_drawn_from([np.sum((drawn == o).all(axis=1)) for o in orders], np.ones(24))
  whole = distinct(50, random_bits(KEY, INDEX, 50))
  assert (np.sort(whole, axis=1) == np.arange(50)).all()
  assert_uniform(distinct(1000, random_bits(KEY, MANY, 5)) // 100, 0, 10)


def test_draws_in_proportion_use_every_slot():
  every = mqar.drawn((5, 1, 3), random_bits(KEY, INDEX, 3))
  assert (np.sort(every, axis=1) == np.arange(3)).all()
  assert_drawn_from(np.bincount(mqar.drawn((5, 1, 3), random_bits(KEY, MANY, 1))[:, 0]), [5, 1, 3])


def test_what_seen_before():
  numbers = np.random.default_rng(0).integers(0, 9, (50, 12))
  before = seen_before(numbers)
  for row, found in zip(numbers.tolist(), before, strict=True):
    assert found.tolist() == [n in row[:i] for i, n in enumerate(row)]


def test_chance():
  bits = random_bits(KEY, MANY, 1)[:, 0]
  assert_drawn_from(np.bincount(bernoulli(0.3, bits)), [0.7, 0.3])
  assert not bernoulli(0.0, bits).any()
  assert bernoulli(1.0, bits).all()
