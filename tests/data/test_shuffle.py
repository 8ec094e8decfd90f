"""The order of training: permutations, independence, proportions, and that it never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data.shuffle import SLOTS, interleave, key, random_below, shuffled

pytestmark = pytest.mark.quick


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(-5, 2**70), epoch=st.integers(0, 2**20))
def test_every_epoch_is_a_permutation(count, seed, epoch):
  position = epoch * count + np.arange(2 * count)
  rows = shuffled(count, position, key(seed))
  for half in (rows[:count], rows[count:]):
    assert np.array_equal(np.sort(half), np.arange(count))


def test_any_subset_of_positions_gives_the_same_rows():
  rows = shuffled(1000, np.arange(5000), key(1))
  chosen = np.random.default_rng(0).permutation(5000)[:300]
  assert np.array_equal(shuffled(1000, chosen, key(1)), rows[chosen])


def test_positions_beyond_32_bits():
  count = 5_000_000_000
  rows = shuffled(count, np.arange(10**12, 10**12 + 1000), key(0))
  assert np.unique(rows).size == 1000
  assert rows.min() >= 0
  assert count > rows.max() > 2**32


def test_all_permutations_are_about_equally_frequent():
  seen = {}
  for seed in range(2400):
    seen.setdefault(tuple(shuffled(4, np.arange(4), key(seed))), []).append(seed)
  assert len(seen) == 24
  assert max(map(len, seen.values())) < 2 * min(map(len, seen.values()))


def test_epochs_and_seeds_are_unrelated():
  epochs = shuffled(10_000, np.arange(20_000), key(0)).reshape(2, -1)
  other = shuffled(10_000, np.arange(10_000), key(1))
  for a, b in ((epochs[0], epochs[1]), (epochs[0], other), (epochs[0], np.arange(10_000))):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.04  # 4 standard deviations
    assert (a == b).sum() < 10


def test_random_windows_are_uniform():
  drawn = random_below(10, np.arange(100_000), key(3))
  counts = np.bincount(drawn, minlength=10)
  assert abs(counts - 10_000).max() < 400  # 4 standard deviations
  assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.0127


def test_the_order_never_changes():
  """Runs resume by it: if this fails, the order must be put back, not the numbers changed."""
  assert shuffled(1000, np.arange(990, 1006), key(7, 'train', 0)).tolist() == ORDER
  assert random_below(1000, np.arange(6), key(7, 'train', 0)).tolist() == WINDOWS


ORDER = [549, 911, 52, 954, 629, 434, 943, 913, 426, 421, 978, 864, 779, 96, 936, 403]
WINDOWS = [562, 947, 570, 410, 919, 158]


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_interleaving_deals_in_proportion_and_numbers_without_gaps(weights):
  deal = interleave(weights)
  part, rank = deal(np.arange(3 * SLOTS))
  share = np.asarray(weights) / sum(weights)
  for k in range(len(weights)):
    mine = rank[part == k]
    assert np.array_equal(mine, np.arange(mine.size))
    assert abs(mine.size / part.size - share[k]) <= max(len(weights), 1) / SLOTS
    # Early on as well: never further from its share than a few positions.
    assert (
      np.abs(np.cumsum(part == k) - share[k] * np.arange(1, part.size + 1))[:200].max()
      <= len(weights) + 1
    )


def test_tiny_weights_still_get_positions():
  part, _ = interleave([1e-12, 1.0, 1.0])(np.arange(SLOTS))
  assert np.bincount(part)[0] == 1
