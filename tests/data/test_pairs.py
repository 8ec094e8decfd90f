"""Batches of pairs: what is in them, in what order, whatever the hosts; and the cache behind
them."""

import collections
import shutil

import numpy as np
import pytest

from jaxformer.config import InputError, from_json, to_json
from jaxformer.data import (
  BytePairs,
  Bytes,
  Characters,
  Dates,
  Pairs,
  Tsv,
  load_tokenizer,
  open_data,
)
from jaxformer.data.text import DataSection
from jaxformer.overrides import override
from jaxformer.task_type import TaskType

pytestmark = pytest.mark.quick
END = 256
# Sources and targets of many lengths, each pair with its number in both.
PAIRS = [(f'<{i}>' + 'a' * (i * 7 % 30), f'{i}:' + 'b' * (i * 11 % 23)) for i in range(400)]
LENGTHS = {'source_lengths': (10, 20, 32), 'target_lengths': (8, 20, 24)}


@pytest.fixture
def pairs(tmp_path):
  def make(rows=PAIRS, name='c.tsv', **fields):
    path = tmp_path / name
    path.write_text(''.join(f'{s}\t{t}\tdocument {i // 4}\n' for i, (s, t) in enumerate(rows)))
    return Pairs(corpus=Tsv(path=str(path), document_column=3), **LENGTHS | fields)

  return make


def texts(batch):
  """(source, target) of each row that is asked for, from the ids, which are checked against each
  other."""
  out = []
  for source, tokens, targets in zip(batch.source_BS, batch.inputs, batch.targets_BT, strict=True):
    length, count = (source != -1).sum(), (targets != -1).sum()
    assert (source[length:] == -1).all()
    assert source[length - 1] == END
    assert tokens[0] == END
    if not count:
      continue
    assert (targets[count:] == -1).all()
    assert targets[count - 1] == END
    np.testing.assert_array_equal(tokens[1:count], targets[: count - 1])
    assert not tokens[count:].any()
    out.append(
      (bytes(source[: length - 1].tolist()).decode(), bytes(targets[: count - 1].tolist()).decode())
    )
  return out


def bucket_of(source, target):
  return next(
    (b for b, (s, t) in enumerate(zip(*LENGTHS.values())) if len(source) < s and len(target) < t),
    None,
  )


def test_batches_hold_pairs_of_their_bucket_and_about_the_same_number_of_positions(pairs):
  data = open_data(pairs())
  shapes = collections.Counter()
  for step in range(60):
    batch = data.train_batch(step, 6, seed=1)
    (rows, S), (_, T) = batch.source_BS.shape, batch.inputs.shape
    bucket = LENGTHS['source_lengths'].index(S)
    assert LENGTHS['target_lengths'][bucket] == T
    assert rows == 6 * (56 // (S + T))
    assert all(pair in PAIRS and bucket_of(*pair) == bucket for pair in texts(batch))
    assert batch.segments_BT is None
    shapes[bucket] += 1
  assert len(shapes) == 3
  # Buckets have their turns in proportion to the batches that they hold.
  members = [b['pairs'] for b in data.manifest['train']['buckets']]
  batches = np.array([m / (6 * k) for m, k in zip(members, (3, 1, 1))])
  np.testing.assert_allclose([shapes[b] / 60 for b in range(3)], batches / batches.sum(), atol=0.03)


def test_a_bucket_shows_each_pair_once_an_epoch_in_a_new_order(pairs):
  data = open_data(pairs(source_lengths=(64,), target_lengths=(64,)))
  count = data.manifest['train']['pairs']
  seen = [p for step in range(-(-2 * count // 8)) for p in texts(data.train_batch(step, 8, seed=3))]
  first, second = seen[:count], seen[count : 2 * count]
  assert len(set(first)) == count
  assert set(first) == set(second)
  assert first != second
  assert first != [p for p in PAIRS if p in set(first)]


def test_another_batch_size_goes_on_with_the_next_pairs(pairs):
  """In every bucket; on each of two hosts its part."""
  data = open_data(pairs())
  earlier, seen = [(5, 8), (9, 2)], {}
  for step in range(16):
    size = 8 if step < 5 else 2 if step < 9 else 4
    known = [e for e in earlier if e[0] <= step]
    whole = data.train_batch(step, size, 3, earlier=known)
    parts = [data.train_batch(step, size, 3, i, 2, known) for i in range(2)]
    assert np.array_equal(np.concatenate([p.source_BS for p in parts]), whole.source_BS)
    seen.setdefault(whole.source_BS.shape[1], []).extend(texts(whole))
  for length, rows in seen.items():
    same = [b for s in range(200) if (b := data.train_batch(s, 2, 3)).source_BS.shape[1] == length]
    assert rows == [p for b in same for p in texts(b)][: len(rows)]
  assert len(seen) > 1


def test_hosts_and_resuming_change_nothing(pairs):
  data = open_data(pairs())
  with data.train_batches(8, seed=5) as batches:
    want = [next(batches) for _ in range(12)]
    state = batches.state()
  for count in (2, 4):
    for step, whole in enumerate(want):
      parts = [data.train_batch(step, 8, 5, i, count) for i in range(count)]
      for field in ('source_BS', 'inputs', 'targets_BT'):
        np.testing.assert_array_equal(
          np.concatenate([getattr(p, field) for p in parts]), getattr(whole, field)
        )
  again = open_data(pairs())
  start = again.resume_step(state, 8, 5)
  with again.train_batches(8, 5, start) as batches, data.train_batches(8, 5, 12) as others:
    for _ in range(5):
      np.testing.assert_array_equal(next(batches).source_BS, next(others).source_BS)
  assert any(
    not np.array_equal(data.train_batch(s, 8, 6).source_BS, want[s].source_BS) for s in range(12)
  )
  for changed in (
    {'source_lengths': (10, 20, 40)},
    {'split': {'type': 'ByDocument', 'fraction': 0.3}},
  ):
    other = open_data(from_json(to_json(pairs()) | changed))
    with pytest.raises(InputError, match='data differ from the checkpoint'):
      other.resume_step(state, 8, 5)
  with pytest.raises(InputError, match='multiple of the 3 processes'):
    data.train_batch(0, 8, 5, 0, 3)


def test_validation_shows_every_pair_that_fits_once(pairs):
  data = open_data(pairs())
  held_out = data.held_out_pairs()
  want = [(p.source, p.reference) for p in held_out]
  for batch_size in (4, 64):
    batches = list(data.validation_batches(batch_size))
    assert all(len(b.targets_BT) == batch_size for b in batches)
    shown = [p for b in batches for p in texts(b)]
    assert sorted(shown) == sorted(want)
  assert data.validation_rows == len(want)
  halves = [list(data.validation_batches(4, None, i, 2)) for i in (0, 1)]
  joined = [np.concatenate([a.targets_BT, b.targets_BT]) for a, b in zip(*halves, strict=True)]
  for a, b in zip(joined, data.validation_batches(4), strict=True):
    np.testing.assert_array_equal(a, b.targets_BT)
  some = list(data.validation_batches(4, 3))
  assert len(some) == 3
  assert {p for b in some for p in texts(b)} < set(want)
  assert len(list(data.validation_batches(4, 1000))) == len(list(data.validation_batches(4)))


def test_held_out_pairs_are_texts_as_the_corpus_has_them(pairs):
  data = open_data(pairs())
  for pair in data.held_out_pairs():
    assert (pair.source, pair.reference) in PAIRS
    assert pair.source_ids.tolist() == [*pair.source.encode(), END]
  assert [p.source for p in data.held_out_pairs(5)] == [p.source for p in data.held_out_pairs(5)]
  assert len(data.held_out_pairs(5)) == 5
  trained = {s for step in range(100) for s, _ in texts(data.train_batch(step, 8, 0))}
  assert not trained & {p.source for p in data.held_out_pairs()}


def test_the_manifest_counts_what_is_left_out(pairs):
  rows = [*PAIRS[:200], ('long' * 20, 'x'), ('x', ''), ('', ''), ('  ', 'x')]
  data = open_data(pairs(rows))
  m = data.manifest
  assert m['empty'] == 3
  assert m['train']['pairs'] + m['validation']['pairs'] == 201
  too_long = sum(bucket_of(*p) is None for p in rows[:201])
  assert too_long > 0
  assert m['train']['too_long'] + m['validation']['too_long'] == too_long
  for name in ('train', 'validation'):
    assert sum(b['pairs'] for b in m[name]['buckets']) + m[name]['too_long'] == m[name]['pairs']
    assert m[name]['source']['tokens'] == m[name]['source']['bytes']


def test_one_tokenizer_is_trained_on_both_sides_or_two_on_one_each(pairs, tmp_path):
  joint = open_data(pairs(tokenizer=BytePairs(vocab_size=270)))
  assert joint.tokenizer.source is joint.tokenizer
  merges = [joint.tokenizer.decode([i]) for i in range(257, 270)]
  assert any('aa' in m for m in merges)
  assert any('bb' in m for m in merges)
  two = open_data(
    pairs(tokenizer=BytePairs(vocab_size=270), source_tokenizer=BytePairs(vocab_size=264))
  )
  assert (two.source_vocab_size, two.vocab_size) == (264, 270)
  assert not any('a' in two.tokenizer.decode([i]) for i in range(257, 270))
  assert not any('b' in two.tokenizer.source.decode([i]) for i in range(257, 264))
  batch = two.train_batch(0, 4, 0)
  source = batch.source_BS[0][batch.source_BS[0] >= 0]
  assert '<' in two.tokenizer.source.decode(source)
  two.tokenizer.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert loaded.source is not loaded
  assert loaded.fingerprint() == two.tokenizer.fingerprint()
  assert loaded.source.encode('aaaa').tolist() == two.tokenizer.source.encode('aaaa').tolist()
  assert open_data(pairs(), tokenizer=loaded).manifest['train'] == two.manifest['train']


def test_the_cache_is_used_repaired_and_not_shared_by_other_content(pairs, cache):
  said = []
  first = open_data(pairs(), log=said.append)
  assert said[0] == f'tokenizing Tsv (once; kept in {cache})'
  count = len(said)
  assert open_data(pairs(), log=said.append).identity == first.identity
  assert len(said) == count
  (folder,) = cache.glob('tokens-*')
  tokens = folder / 'train.0.tokens'
  tokens.write_bytes(b'\0' + tokens.read_bytes()[1:])
  again = open_data(pairs(), log=said.append)
  assert len(said) == 2 * count
  np.testing.assert_array_equal(
    again.train_batch(0, 4, 0).source_BS, first.train_batch(0, 4, 0).source_BS
  )
  assert open_data(pairs(PAIRS[:-1]), log=said.append).identity != first.identity
  assert len(list(cache.glob('tokens-*'))) == 2
  shutil.rmtree(cache)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'source_lengths': (10, 20)},
      'target_lengths = .*as many as source_lengths, of which there are 2',
    ),
    ({'source_lengths': (20, 10, 32)}, 'source_lengths = .*ascending'),
    ({'source_lengths': (1, 10, 32)}, 'at least 2'),
    ({'source_lengths': (10, 10, 10), 'target_lengths': (8, 8, 10)}, 'different buckets'),
    (
      {'source_lengths': (2,), 'target_lengths': (2,)},
      r'none of the \d+ pairs for train of Tsv fits 2 and 2 tokens',
    ),
    ({'tokenizer': Characters()}, r'Pairs\.source_tokenizer: has no token for the end'),
    (
      {'tokenizer': Characters(), 'source_tokenizer': Bytes()},
      r'Pairs\.tokenizer: has no token for the end',
    ),
  ],
)
def test_bad_settings(pairs, fields, message):
  with pytest.raises(InputError, match=message):
    open_data(pairs(**fields))


def test_overrides_choose_pairs(tmp_path):
  data = override(
    DataSection(),
    [
      ('data', 'pairs'),
      ('data.corpus', 'Tsv'),
      ('data.corpus.path', 'x.tsv'),
      ('data.source_lengths', '8,16'),
      ('data.target-lengths', '8,16'),
      ('data.tokenizer', 'BytePairs'),
    ],
  ).data
  assert data == Pairs(
    corpus=Tsv(path='x.tsv'), source_lengths=(8, 16), target_lengths=(8, 16), tokenizer=BytePairs()
  )
  assert data.task == TaskType(inputs='pairs')
  assert data.positions == 16


def test_other_data_have_no_pairs_to_translate():
  from jaxformer.data import InductionHead

  with pytest.raises(InputError, match="'InductionHead': holds no pairs"):
    open_data(InductionHead()).held_out_pairs()
  assert len(open_data(Dates()).held_out_pairs(7)) == 7
