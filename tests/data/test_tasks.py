"""Tasks against oracles that share no code with them, and the order in which they are shown."""

import datetime
import re
import sys

import numpy as np
import pytest

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import (
  AssociativeRecall,
  Dates,
  Digits,
  InductionHead,
  ListOps,
  MultiQueryRecall,
  RebindingRecall,
  SelectiveCopying,
  TaskConfig,
  open_data,
)
from jaxformer.data.tasks import digits, listops
from tests.data.test_mad_tasks import mad_tasks

pytestmark = pytest.mark.quick
SHORT = ListOps(
  max_depth=5, max_args=5, min_length=10, max_length=60, train_sequences=50, test_sequences=40
)
INDEX = np.arange(300)
# What the first sequences are, so that a run of today can be repeated: a change here changes every
# experiment on the task.
PINNED = {
  SHORT: '906e3f61b31bdb8e',
  InductionHead(): 'f8de3efdf763ff35',
  AssociativeRecall(): 'e3edf8542d94ff67',
  Digits(): 'bc7a1a1ed084f8c2',
  Dates(): '332cc94aada07c4d',
  MultiQueryRecall(test_sequences=100): '94b69d19bbb9f385',
  RebindingRecall(test_sequences=100): '76935443cc75aeb6',
  SelectiveCopying(test_sequences=20): '9dcc020394928567',
  mad_tasks.MadSelectiveCopying(test_sequences=100): '85a5b6904045016d',
  mad_tasks.InContextRecall(test_sequences=100): '2b065cd92c863aa3',
  mad_tasks.NoisyInContextRecall(test_sequences=100): '205b477468870f99',
  mad_tasks.FuzzyInContextRecall(test_sequences=100): '832c0eed268ca54a',
  mad_tasks.Compression(test_sequences=100): '6b33c22e1fad6c78',
  mad_tasks.Memorization(test_sequences=100): '0e48c45ef730d708',
}


def value_of(words: list[str]) -> tuple[int, int]:
  """The value and the depth of an expression, by a stack."""
  stack: list[list] = [[None]]
  deepest = 0
  for word in words:
    if word.startswith('['):
      stack.append([word])
      deepest = max(deepest, len(stack))
    elif word == ']':
      name, *values = stack.pop()
      assert 2 <= len(values) <= 5
      stack[-1].append(
        {
          '[MAX': max,
          '[MIN': min,
          '[SM': lambda v: sum(v) % 10,
          '[MED': lambda v: int(np.median(v)),
        }[name](values)
      )
    else:
      stack[-1].append(int(word))
  ((_, value),) = stack
  return value, deepest


def test_listops_answers_are_those_of_another_evaluator():
  batch = SHORT.rows('train', INDEX)
  depths, seen, answers = set(), set(), set()
  for tokens, targets, segments in zip(*batch[:3], strict=True):
    length = segments.sum()
    words = [listops.NAMES[t] for t in tokens[:length]]
    value, depth = value_of(words)
    assert 10 < length < 60
    assert (segments[:length] == 1).all()
    assert not tokens[length:].any()
    assert targets[length - 1] == value
    assert (np.delete(targets, length - 1) == -1).all()
    depths.add(depth)
    seen.update(words)
    answers.add(value)
  assert max(depths) == 5
  assert seen == set(listops.NAMES)
  assert answers == set(range(10))


def test_listops_of_the_published_lengths():
  batch = ListOps().rows('test', np.arange(6))
  lengths = batch.segments_BT.sum(1)
  assert batch.inputs.shape == (6, 2000)
  assert (lengths > 500).all()
  assert (lengths < 2000).all()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'max_depth': 1}, 'max_depth'),
    ({'max_args': 1}, 'max_args'),
    ({'max_depth': 2, 'max_args': 3}, 'below 4'),
    ({'max_length': 501}, '2 more than min_length'),
    ({'train_sequences': 0}, 'train_sequences = 0'),
    ({'test_sequences': 0}, 'test_sequences = 0'),
  ],
)
def test_listops_settings(settings, message):
  with pytest.raises(InputError, match=message):
    ListOps(**settings)


def test_listops_bounds_that_nothing_meets(monkeypatch):
  monkeypatch.setattr(listops, 'TRIES', 100)
  with pytest.raises(InputError, match=r'of 100 expressions none is longer'):
    ListOps(max_depth=4, max_args=5, min_length=150, max_length=200).rows('train', np.arange(1))


def test_induction_asks_for_what_followed_the_special_token():
  batch = InductionHead().rows('train', INDEX)
  assert batch.inputs.shape == (300, 31)
  places, answers = [], []
  for tokens, targets in zip(batch.inputs.tolist(), batch.targets_BT, strict=True):
    assert tokens[-1] == 18
    assert tokens.count(18) == 2
    assert targets[-1] == tokens[tokens.index(18) + 1]
    # to learn from, every token; to be scored by, the last
    assert targets[:-1].tolist() == tokens[1:]
    places.append(tokens.index(18))
    answers.append(targets[-1])
  assert set(places) == set(range(28))
  assert set(answers) == set(range(18))


def test_recall_asks_for_the_value_of_a_key_that_came():
  batch = AssociativeRecall().rows('test', INDEX)
  assert batch.inputs.shape == (300, 22)
  answers, maps = [], set()
  for tokens, targets in zip(batch.inputs.tolist(), batch.targets_BT, strict=True):
    values = dict(zip(tokens[:20:2], tokens[1:20:2], strict=True))
    assert tokens[1:20:2] == [values[k] for k in tokens[:20:2]]  # one value a key
    assert set(values) <= set(range(4))
    assert set(values.values()) <= set(range(4, 8))
    assert tokens[20] == 8
    assert targets[-1] == values[tokens[21]]
    assert (targets[:-1] == -1).all()
    answers.append(int(targets[-1]))
    maps.add(tuple(sorted(values.items())))
  assert min(np.bincount(answers)[4:]) > 50
  assert len(maps) > 150  # of 4^4, drawn anew for each sequence


@pytest.mark.parametrize('task', [InductionHead, AssociativeRecall])
def test_synthetic_settings(task):
  for settings, message in (
    ({'length': 1}, 'length = 1'),
    ({'vocab_size': 3}, 'vocab_size = 3'),
    ({'test_sequences': 0}, 'test_sequences = 0'),
  ):
    with pytest.raises(InputError, match=message):
      task(**settings)


def test_digits():
  pytest.importorskip('sklearn')
  from sklearn.datasets import load_digits

  data, task = load_digits(), Digits()
  assert (task.train_rows, task.test_rows) == (1438, 359)
  for side, numbers in (('train', [0, 1, 2, 3, 5]), ('test', [4, 9, 14])):
    batch = task.rows(side, np.arange(len(numbers)))
    np.testing.assert_array_equal(
      batch.inputs[:, :, 0], np.float32(data.images[numbers].reshape(-1, 64) / 16)
    )
    np.testing.assert_array_equal(batch.targets_BT[:, -1], data.target[numbers])
    assert (batch.targets_BT[:, :-1] == -1).all()
    assert batch.segments_BT is None


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  digits._images.cache_clear()
  with pytest.raises(InputError, match=r'pip install "jaxformer\[tasks\]"'):
    open_data(Digits())


# ---- dates -------------------------------------------------------------------------------------


def read_date(text: str) -> datetime.date:
  """A date in any of the forms, by regular expressions and the library's parser of month names."""
  if found := re.fullmatch(r'(\d{4})/(\d\d)/(\d\d)', text):
    return datetime.date(*map(int, found.groups()))
  if found := re.fullmatch(r'(\d\d)\.(\d\d)\.(\d{4})', text):
    return datetime.date(*map(int, reversed(found.groups())))
  (day,) = re.findall(r'\b(\d{1,2})(?:st|nd|rd|th)?\b', text)
  (year,) = re.findall(r'\d{4}', text)
  words = [w for w in re.findall(r'[A-Z][a-z]+', text) if not w.endswith('day')]
  date = datetime.datetime.strptime(f'{day} {words[0][:3]} {year}', '%d %b %Y').date()
  assert words[0] in (date.strftime('%B'), date.strftime('%b'))
  assert date.strftime('%A') in text or 'day' not in text
  assert not (ordinal := re.findall(r'\d(st|nd|rd|th)', text)) or ordinal == [
    'th' if 10 < date.day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(date.day % 10, 'th')
  ]
  return date


def test_dates_say_what_they_are_asked_for():
  task = Dates(first_year=1890, last_year=2110)
  for side in ('train', 'test'):
    texts = task.texts(side, np.arange(1500))
    assert all(read_date(source).isoformat() == target for source, target in texts)
    assert max(len(source) for source, _ in texts) < task.source_positions
    assert {len(target) + 1 for _, target in texts} == {task.positions}
    assert len({re.sub(r'\d+|[A-Z][a-z]+|st|nd|rd|th\b', 'x', source) for source, _ in texts}) >= 8
  batch = task.rows('test', np.arange(3))
  for row, (source, target) in enumerate(task.texts('test', np.arange(3))):
    assert batch.source_BS[row, : len(source) + 1].tolist() == [*source.encode(), 256]
    assert batch.targets_BT[row].tolist() == [*target.encode(), 256]
    assert batch.inputs[row].tolist() == [256, *target.encode()]


def test_no_day_of_the_test_is_trained_on_in_any_form():
  few = Dates(first_year=2000, last_year=2000, forms=3)
  trained = {target for _, target in few.texts('train', np.arange(20_000))}
  tested = {target for _, target in few.texts('test', np.arange(2000))}
  assert not trained & tested
  assert len(trained | tested) == 366
  assert 20 <= len(tested) <= 54  # a tenth is expected, three standard deviations
  wider = {
    t
    for _, t in Dates(first_year=1999, last_year=2001).texts('test', np.arange(5000))
    if t.startswith('2000')
  }
  assert wider <= tested


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'first_year': 3}, 'first_year = 3: must be 1000 to 9999'),
    ({'first_year': 2000, 'last_year': 1999}, 'last_year = 1999'),
    ({'forms': 11}, 'forms = 11: must be 1 to 10'),
    ({'test_sequences': 0}, 'test_sequences'),
  ],
)
def test_dates_refuse(settings, message):
  with pytest.raises(InputError, match=message):
    Dates(**settings)


# ---- what holds for every task -----------------------------------------------------------------


@pytest.fixture(params=PINNED, ids=lambda t: t.tag)
def task(request) -> TaskConfig:
  if request.param == Digits():
    pytest.importorskip('sklearn')
  return request.param


def same(a, b):
  for x, y in zip(a, b, strict=True):
    assert (x is None) == (y is None)
    assert x is None or np.array_equal(x, y)
  return True


def test_sequences_depend_on_their_number_alone_and_stay(task):
  whole = task.rows('test', np.arange(20))
  same(task.rows('test', np.array([17, 3])), [None if a is None else a[[17, 3]] for a in whole])
  assert not np.array_equal(whole[0], task.rows('train', np.arange(20))[0])
  if 'seed' in config.to_json(task):
    assert not np.array_equal(whole[0], task.replace(seed=1).rows('test', np.arange(20))[0])
  assert task.fingerprint().startswith(PINNED[task])
  assert config.from_json(config.to_json(task)) == task
  kind, targets = task.task, whole.targets_BT
  inputs = whole.inputs
  assert inputs.shape[1] == task.positions == targets.shape[1]
  assert inputs.shape[2:] == (() if kind.features is None else (kind.features,))
  assert targets.max() < (kind.classes or kind.vocab_size)
  assert kind.vocab_size is None or 0 <= inputs.min() <= inputs.max() < kind.vocab_size
  assert (
    kind.source_vocab_size is None
    or -1 <= whole.source_BS.min() <= whole.source_BS.max() < kind.source_vocab_size
  )


def test_hosts_share_a_batch_and_any_step_can_be_asked_for(task):
  data = open_data(task)
  whole = data.train_batch(5, 8, seed=3)
  parts = [data.train_batch(5, 8, 3, i, 2) for i in (0, 1)]
  same([None if a is None else np.concatenate([a, b]) for a, b in zip(*parts, strict=True)], whole)
  with data.train_batches(8, 3, start_step=5) as batches:
    same(next(batches), whole)
    assert batches.state() == data.state(6, 8, 3)
  assert not np.array_equal(data.train_batch(5, 8, seed=4)[0], whole[0])
  assert not np.array_equal(data.train_batch(6, 8, seed=3)[0], whole[0])


def test_every_test_sequence_comes_once(task):
  data = open_data(task)
  batches = list(data.validation_batches(16))
  want = task.rows('test', np.arange(task.test_rows))
  rows = np.concatenate([b.targets_BT for b in batches])
  assert data.validation_rows == task.test_rows
  assert len({b.targets_BT.shape for b in batches}) == 1
  np.testing.assert_array_equal(rows[: task.test_rows], want.targets_BT)
  assert (rows[task.test_rows :] == -1).all()
  few = list(data.validation_batches(4, 2))
  np.testing.assert_array_equal(
    np.concatenate([b[0] for b in few]), want[0][np.arange(8) * task.test_rows // 8]
  )
  halves = [list(data.validation_batches(4, 2, i, 2)) for i in (0, 1)]
  np.testing.assert_array_equal(
    np.concatenate([b[0] for pair in zip(*halves, strict=True) for b in pair]),
    np.concatenate([b[0] for b in few]),
  )


def test_a_finite_task_shows_each_sequence_once_an_epoch():
  data = open_data(SHORT)
  for epoch in (0, 1):
    rows = np.concatenate([data.train_batch(5 * epoch + i, 10, seed=0).inputs for i in range(5)])
    every = SHORT.rows('train', np.arange(50)).inputs
    assert sorted(map(bytes, rows)) == sorted(map(bytes, every))
  endless = open_data(InductionHead())
  rows = np.concatenate([endless.train_batch(i, 50, seed=0).inputs for i in range(20)])
  assert len(np.unique(rows, axis=0)) == 1000


def test_another_task_does_not_go_on_with_a_checkpoint():
  state = open_data(InductionHead()).state(7, 8, 0)
  assert open_data(InductionHead()).resume_step(state, 8, 0) == 7
  with pytest.raises(InputError, match=r'length: 30 -> 40'):
    open_data(InductionHead(length=40)).resume_step(state, 8, 0)
