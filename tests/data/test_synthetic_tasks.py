"""Recall and copying against solvers that read nothing but the tokens, and the
distributions that are claimed."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxformer.config import InputError
from jaxformer.data import InductionHead, MultiQueryRecall, RebindingRecall, SelectiveCopying
from jaxformer.data.tasks import mqar
from jaxformer.data.tasks.task import distinct, random_bits

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


# ---- recall of values that change --------------------------------------------------------------


@pytest.mark.parametrize(
  'task',
  [
    RebindingRecall(),
    RebindingRecall(keys=1, length=9, vocab_size=9),
    RebindingRecall(keys=3, length=9, vocab_size=8),
    RebindingRecall(keys=5, length=61, vocab_size=58, changes=0.3),
  ],
  ids=['default', 'one', 'once', 'some'],
)
def test_every_key_is_asked_for_its_latest_value(task):
  half, context = task.vocab_size // 2, task.length - task.keys
  for side in ('train', 'test'):
    for tokens, targets in rows(task.rows(side, INDEX)):
      keys, values = tokens[0:context:2], tokens[1:context:2]
      latest = dict(zip(keys, values, strict=True))  # of a repeated key the last one
      assert len(latest) == task.keys
      assert 0 < min(keys) <= max(keys) < half <= min(values) <= max(values) < task.vocab_size
      assert sorted(tokens[context:]) == sorted(latest)
      assert asked(targets) == {t: latest[tokens[t]] for t in range(context, task.length)}
      assert len(set(values)) == len(values) or task.changes < 1


@pytest.mark.parametrize('changes', [0.0, 0.25, 1.0])
def test_a_key_that_is_bound_again_has_a_new_value_as_often_as_said(changes):
  task, seen, new = RebindingRecall(keys=3, length=23, vocab_size=40, changes=changes), 0, 0
  for tokens in task.rows('train', MANY[:2000]).inputs.tolist():
    latest = {}
    for key, value in zip(tokens[0:20:2], tokens[1:20:2], strict=True):
      assert value == latest.get(key) or value not in latest.values()
      seen, new = seen + (key in latest), new + (latest.get(key, value) != value)
      latest[key] = value
  assert seen == 7 * 2000
  assert_drawn_from([new, seen - new], [changes, 1 - changes]) if 0 < changes < 1 else None
  assert changes in (new / seen, 0.25)


def test_keys_are_bound_and_asked_for_in_every_order():
  task = RebindingRecall(keys=2, length=8, vocab_size=8)
  inputs = task.rows('train', MANY).inputs
  first = inputs[:, [0, 2, 4]] == inputs[:, :1]
  orders = [np.sum((first[:, 1:] == o).all(axis=1)) for o in itertools.product((0, 1), repeat=2)]
  assert_drawn_from([*orders[:3], orders[3] + 1], [1, 1, 1, 1e-4])
  assert_drawn_from(np.bincount(inputs[:, 6] == inputs[:, 0]), [1, 1])
  assert_uniform(inputs[:, [1, 3, 5]], 4, 8)


# ---- selective copying -------------------------------------------------------------------------


@pytest.mark.parametrize(
  'task',
  [SelectiveCopying(), SelectiveCopying(copied=3, vocab_size=4, length=8)],
  ids=['paper', 'short'],
)
def test_copying_asks_for_what_was_not_noise(task):
  assert_copies(task, noise=0, after=task.vocab_size - 1)


def assert_copies(task, noise: int, after: int):
  """The tokens that are neither noise nor the marker are the targets at the last positions, which
  hold the token `after`."""
  M = task.copied
  for side in ('train', 'test'):
    for tokens, targets in rows(task.rows(side, INDEX[:100])):
      assert len(tokens) == task.length
      assert [t for t in tokens if t not in (noise, task.vocab_size - 1)] == targets[-M:]
      assert set(targets[:-M]) == {-1}
      assert tokens[-M:] == [after] * M


def test_what_is_copied_stands_anywhere():
  task = SelectiveCopying(copied=2, vocab_size=5, length=8)
  batch = task.rows('train', MANY)
  assert_uniform(batch.targets_BT[:, -2:], 1, 4)
  places = np.nonzero((batch.inputs > 0) & (batch.inputs < 4))[1].reshape(-1, 2)
  pairs = list(itertools.combinations(range(6), 2))
  assert_drawn_from([np.sum((places == pair).all(axis=1)) for pair in pairs], np.ones(15))


# ---- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'task', [MultiQueryRecall(), RebindingRecall(), SelectiveCopying(length=64)]
)
def test_no_test_sequence_is_one_of_training(task):
  assert_sides_differ(task)


def assert_sides_differ(task):
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
    (RebindingRecall, {'keys': 0}, 'keys = 0: must be positive'),
    (RebindingRecall, {'length': 10}, 'length = 10: must be at least 12 and even'),
    (RebindingRecall, {'keys': 3}, 'length = 36: must be at least 9 and odd'),
    (RebindingRecall, {'vocab_size': 31}, 'vocab_size = 31: must be at least 32, for 16 values'),
    (RebindingRecall, {'changes': 1.5}, 'changes = 1.5: must be at least 0 and at most 1'),
    (SelectiveCopying, {'copied': 0}, 'copied = 0'),
    (SelectiveCopying, {'vocab_size': 3}, 'vocab_size = 3'),
    (SelectiveCopying, {'length': 33}, 'length = 33: must be at least 34'),
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
