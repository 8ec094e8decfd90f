"""The MAD suite (`experiments/mad_tasks.py`, loaded as a user's file) against solvers that read
nothing but the tokens, and the distributions that are claimed."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data.tasks.task import random_bits
from jaxformer.user_code import load_file
from tests.data.test_synthetic_tasks import (
  INDEX,
  KEY,
  MANY,
  asked,
  assert_copies,
  assert_drawn_from,
  assert_sides_differ,
  assert_uniform,
  rows,
)

FILE = pathlib.Path(__file__).parents[2] / 'experiments' / 'mad_tasks.py'
mad_tasks = load_file(FILE)
Compression, Memorization = mad_tasks.Compression, mad_tasks.Memorization
FuzzyInContextRecall, InContextRecall = mad_tasks.FuzzyInContextRecall, mad_tasks.InContextRecall
MadSelectiveCopying = mad_tasks.MadSelectiveCopying
NoisyInContextRecall = mad_tasks.NoisyInContextRecall

pytestmark = pytest.mark.quick


def test_a_command_names_a_task_in_the_file(capsys, monkeypatch):
  words = f'train gpt2-tiny --data {FILE}:NoisyInContextRecall --data.length 64 --show'
  assert main(words.split()) == 0
  data = json.loads(capsys.readouterr().out)['data']
  assert (data['type'], data['length'], data['vocab_size']) == ('NoisyInContextRecall', 64, 32)
  assert data['code']['file'] == str(FILE)
  study = f'compare quickstart --study.tasks.0 {FILE}:Memorization --show'
  assert main(study.split()) == 0
  assert json.loads(capsys.readouterr().out)['tasks'][0]['type'] == 'Memorization'
  for name, message in (
    (f'{FILE}:Missing', "has no 'Missing'"),
    (f'{FILE}:mad_suite', 'must be a config (AssociativeRecall'),
    (f'{FILE}:np', 'must be a config (AssociativeRecall'),
    (f'{FILE.with_name("mad_autoencoder.py")}:Autoencoder', 'must be a config (AssociativeRecall'),
    (f'{FILE.with_name("mad_autoencoder.py")}:experiment', 'must be a config (AssociativeRecall'),
  ):
    assert main(f'train gpt2-tiny --data {name} --show'.split()) == 2
    assert message in capsys.readouterr().err


# ---- selective copying -------------------------------------------------------------------------


@pytest.mark.parametrize(
  'task', [MadSelectiveCopying(), MadSelectiveCopying(copied=3, vocab_size=4, length=8)]
)
def test_copying_asks_for_what_was_not_noise(task):
  noise, marker = task.vocab_size - 2, task.vocab_size - 1
  assert_copies(task, noise=noise, after=noise)
  for tokens, targets in rows(task.rows('test', INDEX[:100])):
    assert tokens[-task.copied - 2 : -task.copied] == [targets[-1], marker]


def test_blanks_of_mad_go_before_a_token_each_as_likely():
  task = MadSelectiveCopying(copied=3, vocab_size=5, length=13)
  batch = task.rows('train', MANY)
  assert_uniform(batch.targets_BT[:, -3:], 0, 3)
  places = np.nonzero(batch.inputs < 3)[1].reshape(-1, 3)
  before = np.diff(places, axis=1, prepend=-1) - 1
  assert (before.sum(axis=1) == 6).all()
  for column in before.T:
    assert_drawn_from(np.bincount(column, minlength=7), stats.binom.pmf(np.arange(7), 6, 1 / 3))


# ---- recall ------------------------------------------------------------------------------------


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
  suite = mad_tasks.mad_suite()
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
    MadSelectiveCopying(),
    InContextRecall(),
    NoisyInContextRecall(),
    FuzzyInContextRecall(),
    Compression(),
  ],
)
def test_no_test_sequence_is_one_of_training(task):
  assert_sides_differ(task)


@pytest.mark.parametrize(
  ('task', 'settings', 'message'),
  [
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


def test_what_seen_before():
  numbers = np.random.default_rng(0).integers(0, 9, (50, 12))
  before = mad_tasks.seen_before(numbers)
  for row, found in zip(numbers.tolist(), before, strict=True):
    assert found.tolist() == [n in row[:i] for i, n in enumerate(row)]


def test_chance():
  bits = random_bits(KEY, MANY, 1)[:, 0]
  assert_drawn_from(np.bincount(mad_tasks.bernoulli(0.3, bits)), [0.7, 0.3])
  assert not mad_tasks.bernoulli(0.0, bits).any()
  assert mad_tasks.bernoulli(1.0, bits).all()
