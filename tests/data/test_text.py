"""Batches: complete, resumable, the same for any number of hosts, and nothing passes between
documents."""

import itertools
import threading

import numpy as np
import pytest

from jaxformer.config import InputError, from_json, to_json
from jaxformer.data import (
  ByDocument,
  ByPosition,
  Bytes,
  Characters,
  Files,
  Mixture,
  PydocTopics,
  StandardLibrary,
  Text,
  open_data,
)
from jaxformer.overrides import override

pytestmark = pytest.mark.quick
LENGTH = 16
# Documents of many lengths, each with its number in it so that a row shows where it is from.
TEXTS = [f'<{i}>' + f' {i}' * (i * 7 % 40) for i in range(150)]
PACKINGS = ['packed', 'stream', 'random_windows']


@pytest.fixture
def dataset(corpus):
  def make(texts=TEXTS, name='corpus.jsonl', **fields):
    fields = {'sequence_length': LENGTH, 'split': ByDocument(fraction=0.2)} | fields
    return open_data(Text(corpus=Files(path=corpus(texts, name)), **fields))

  return make


@pytest.fixture
def mixture(corpus):
  def make(weights, packing=None):
    corpora = tuple(
      Files(path=corpus([letter * 50 + str(i) for i in range(60 * (k + 1))], f'{letter}.jsonl'))
      for k, letter in enumerate('xyz'[: len(weights)])
    )
    mixed = Mixture(corpora=corpora, weights=tuple(map(float, weights)))
    return open_data(Text(corpus=mixed, sequence_length=LENGTH, packing=packing or 'packed'))

  return make


def facts(data, name):
  """The sum of a count over the parts of the validation side."""
  side = data.manifest['validation']
  return sum(part[name] for part in (side if isinstance(side, list) else [side]))


def equal(a, b):
  return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def join(batches):
  return [None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches)]


def stream(data, side):
  """The tokens of one side in order, read from the cache."""
  return np.concatenate(
    [
      np.asarray(s.tokens_N, np.int32)
      for s in (data._train if side == 'train' else data._validation)
    ]
  )


@pytest.mark.parametrize('packing', PACKINGS)
def test_shapes_and_shift(dataset, packing):
  data = dataset(packing=packing)
  batch = data.train_batch(3, 8, seed=0)
  assert batch.inputs.shape == batch.targets_BT.shape == (8, LENGTH)
  assert batch.inputs.dtype == batch.targets_BT.dtype == np.int32
  assert (batch.segments_BT is None) == (packing != 'packed')
  predicted = batch.targets_BT[:, :-1] >= 0
  assert np.array_equal(batch.targets_BT[:, :-1][predicted], batch.inputs[:, 1:][predicted])
  if packing != 'packed':
    assert (batch.targets_BT >= 0).all()


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('hosts', [2, 4])
def test_order_does_not_depend_on_the_number_of_hosts(dataset, packing, hosts):
  data = dataset(packing=packing)
  for step in (0, 5, 1000):
    whole = data.train_batch(step, 8, seed=3)
    assert equal(join([data.train_batch(step, 8, 3, i, hosts) for i in range(hosts)]), whole)
  for whole, parts in zip(
    data.validation_batches(8),
    zip(*(data.validation_batches(8, None, i, hosts) for i in range(hosts)), strict=True),
    strict=True,
  ):
    assert equal(join(parts), whole)


def test_mixture_does_not_depend_on_the_number_of_hosts(mixture):
  data = mixture([1, 2, 0.5])
  for step in (0, 600):
    assert equal(
      join([data.train_batch(step, 8, 3, i, 4) for i in range(4)]),
      data.train_batch(step, 8, seed=3),
    )


@pytest.mark.parametrize('packing', ['packed', 'stream'])
@pytest.mark.parametrize('batch_size', [1, 4, 7])
def test_epoch_shows_every_sequence_once(dataset, packing, batch_size):
  data = dataset(packing=packing)
  tokens, rows = stream(data, 'train'), data.text.train_rows(data.train_tokens)
  assert rows == (data.train_tokens - 1) // LENGTH
  expected = sorted(tokens[: rows * LENGTH].reshape(rows, LENGTH).tolist())
  shown = np.concatenate(
    [data.train_batch(s, batch_size, 1).inputs for s in range(-(-3 * rows // batch_size))]
  )
  epochs = [shown[e * rows : (e + 1) * rows].tolist() for e in range(3)]
  assert all(sorted(e) == expected for e in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert epochs[0] != expected


def test_seeds_give_different_orders(dataset):
  data = dataset()
  assert equal(data.train_batch(0, 8, 1), data.train_batch(0, 8, 1))
  assert not equal(data.train_batch(0, 8, 1), data.train_batch(0, 8, 2))


def test_random_windows_start_anywhere(dataset):
  data = dataset(packing='random_windows')
  tokens = stream(data, 'train')
  windows = {tuple(tokens[i : i + LENGTH]) for i in range(data.train_tokens - LENGTH)}
  shown = {tuple(row) for s in range(100) for row in data.train_batch(s, 512, 0).inputs.tolist()}
  assert shown <= windows
  assert len(shown) > 0.95 * len(windows)


def test_packing_never_crosses_documents(dataset):
  """Rows are taken apart by segment: every piece lies within one document, and together they
  predict all but its first tokens."""
  data = dataset(packing='packed')
  end = data.tokenizer.end_of_document
  documents = {t.encode() + b'\0' for t in TEXTS}
  batches = [
    data.train_batch(s, 1, 0) for s in range(data.text.train_rows(data.train_tokens))
  ] + list(data.validation_batches(4))
  for batch in batches:
    for tokens, targets, segments in zip(*batch[:3]):
      assert (np.diff(segments[segments > 0]) >= 0).all()
      for segment in set(segments[segments > 0].tolist()):
        inside = segments == segment
        piece, after = tokens[inside], targets[inside]
        assert np.array_equal(piece[1:], after[:-1])
        whole = [*piece.tolist(), *([after[-1]] if after[-1] >= 0 else [])]
        text = bytes(0 if t == end else t for t in whole)
        assert any(text in d for d in documents)
        # The end of a document is a target, nothing is predicted from it, and from all else
        # something is.
        assert np.array_equal(after == -1, piece == end)
  targets = np.concatenate([b.targets_BT.ravel() for b in batches])
  assert (targets == end).sum() >= len(TEXTS) - 1


def test_segments_start_at_one_in_every_row(dataset):
  batch = dataset().train_batch(0, 16, 0)
  assert (batch.segments_BT[:, 0] == 1).all()
  assert batch.segments_BT.max() > 1


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_validation_predicts_every_token_once(dataset, packing, batch_size):
  data = dataset(packing=packing)
  tokens = stream(data, 'validation')
  batches = list(data.validation_batches(batch_size))
  assert all(b.inputs.shape == (batch_size, LENGTH) for b in batches)
  targets = np.concatenate([b.targets_BT.ravel() for b in batches])
  predicted = targets[targets >= 0]
  expected = tokens[1:]
  if packing == 'packed':
    expected = expected[tokens[:-1] != data.tokenizer.end_of_document]
  assert np.array_equal(predicted, expected)
  if packing != 'packed':
    assert data.tokenizer.token_bytes[predicted].sum() == facts(data, 'bytes') - 1


def test_validation_with_a_limit_is_spread_and_repeatable(dataset):
  data = dataset(packing='stream')
  rows = np.concatenate([b.inputs for b in data.validation_batches(1)])
  chosen = np.concatenate([b.inputs for b in data.validation_batches(2, limit_batches=4)])
  places = [next(i for i, r in enumerate(rows) if np.array_equal(r, c)) for c in chosen]
  assert len(set(places)) == 8
  assert places == sorted(places)
  assert places[0] < len(rows) / 8
  assert places[-1] > len(rows) * 0.8
  assert len(list(data.validation_batches(2, limit_batches=10**6))) == -(-len(rows) // 2)
  with pytest.raises(InputError, match='limit_batches = 0'):
    data.validation_batches(1, 0)


def test_resuming_equals_not_stopping(dataset):
  data = dataset()
  whole = [data.train_batch(s, 4, 9) for s in range(12)]
  with data.train_batches(4, 9) as batches:
    assert all(equal(a, b) for a, b in zip(whole, itertools.islice(batches, 5)))
    state = batches.state()
  assert state['next_step'] == 5
  again = dataset()  # from the cache, as another process would
  with again.train_batches(4, 9, again.resume_step(state, 4, 9)) as batches:
    assert all(equal(a, b) for a, b in zip(whole[5:], batches))


def test_another_batch_size_goes_on_with_the_next_row(dataset):
  data = dataset()
  rows = [data.train_batch(s, 1, 9).inputs[0] for s in range(5 * 4 + 6)]
  whole = np.concatenate(
    [data.train_batch(s, 4, 9).inputs for s in range(5)]
    + [data.train_batch(s, 3, 9, earlier=[(5, 4)]).inputs for s in (5, 6)]
  )
  assert np.array_equal(whole, rows)
  with data.train_batches(3, 9, 5, earlier=[(5, 4)], skipped=[range(6, 100)]) as batches:
    assert np.array_equal(next(batches).inputs, whole[20:23])
    assert batches.state()['next_step'] == 100
    assert batches.state()['earlier'] == [[5, 4]]
  with pytest.raises(InputError, match='step = 4: must be at least 5'):
    data.train_batch(4, 3, 9, earlier=[(5, 4)])


def test_resuming_with_other_data_says_what_changed(dataset):
  data = dataset()
  state = data.state(5, 4, 9)
  for other, message in [
    (dataset(sequence_length=8), r'data\.sequence_length: 16 -> 8'),
    (dataset(packing='stream'), r'data\.packing: "packed" -> "stream"'),
    (dataset(tokenizer=Characters()), r'data\.tokenizer: '),
    (dataset([*TEXTS, 'one more']), r'data\.(train|validation)\.0: '),
  ]:
    with pytest.raises(InputError, match=f'data differ from the checkpoint.*{message}'):
      other.resume_step(state, 4, 9)
  with pytest.raises(InputError, match='batch_size: 4 -> 8; seed: 9 -> 1'):
    data.resume_step(state, 8, 1)
  assert data.resume_step(state, 4, 9) == 5


def test_iterator_closes(dataset):
  def workers():
    return [t for t in threading.enumerate() if t.name.startswith('jaxformer-data')]

  batches = dataset().train_batches(4, 0)
  next(batches)
  assert workers()
  batches.close()
  batches.close()
  assert not workers()
  assert list(batches) == []


def test_error_in_the_thread_arrives(dataset, monkeypatch):
  data = dataset()
  monkeypatch.setattr(data, '_cut', lambda *a: 1 / 0)
  batches = data.train_batches(4, 0)
  with pytest.raises(ZeroDivisionError):
    next(batches)
  assert list(batches) == []


@pytest.mark.parametrize('packing', PACKINGS)
def test_mixture_proportions(mixture, packing):
  data = mixture([1, 2, 5], packing)
  counts = dict.fromkeys('xyz', 0)
  for step in range(100):
    for row in data.train_batch(step, 8, 0).inputs:
      text = data.tokenizer.decode(row)
      counts[next(c for c in 'xyz' if c in text)] += 1
  # a digit-only row has no letter
  assert [counts[c] for c in 'xyz'] == pytest.approx([100, 200, 500], abs=8)


def test_mixture_shows_every_sequence_of_a_part_once_an_epoch(mixture):
  data = mixture([1, 1])
  rows = [data.text.train_rows(s.tokens_N.size) for s in data._train]
  shown = {c: [] for c in 'xy'}
  for step in range(2 * max(rows)):
    for row in data.train_batch(step, 1, 0).inputs:
      text = data.tokenizer.decode(row)
      shown['x' if 'x' in text else 'y'].append(tuple(row))
  assert len({tuple(r) for r in shown['y'][: rows[1]]}) == len(set(shown['y'])) > 0
  assert set(shown['x'][: rows[0]]) == set(shown['x'])


def test_mixture_validates_on_all_of_each_part(mixture):
  data = mixture([1, 100])
  first_tokens = facts(data, 'documents')
  assert (
    sum((b.targets_BT >= 0).sum() for b in data.validation_batches(4))
    == facts(data, 'tokens') - first_tokens
  )


def test_too_little_text(dataset, corpus):
  with pytest.raises(
    InputError,
    match=r'sequence_length = 9999: the training side of Files \S+ has \d+ tokens; must be at most',
  ):
    dataset(sequence_length=9999)
  with pytest.raises(InputError, match=r'Text\.sequence_length = 1: must be at least 2'):
    Text(sequence_length=1)
  with pytest.raises(
    InputError,
    match=r'validation side has 1 tokens, too few .*; ByPosition\.fraction must be larger',
  ):
    dataset(['abcdefgh'], tokenizer=Characters(), split=ByPosition(), sequence_length=4)
  with pytest.raises(InputError, match='the corpus holds no text'):
    dataset(['', ''])
  longest = dataset(packing='stream').train_tokens - 1
  assert dataset(packing='stream', sequence_length=longest).train_batch(0, 2, 0).inputs.shape == (
    2,
    longest,
  )


def test_bad_batch_arguments(dataset):
  data = dataset()
  for arguments, message in [
    (
      {'batch_size': 6, 'process_count': 4},
      'batch_size = 6: must be a positive multiple of the 4 processes',
    ),
    ({'batch_size': 0}, 'batch_size = 0'),
    ({'batch_size': 4, 'process_index': 2, 'process_count': 2}, 'process_index = 2'),
  ]:
    with pytest.raises(InputError, match=message):
      data.train_batch(0, seed=0, **arguments)
    with pytest.raises(InputError, match=message):
      data.train_batches(seed=0, **arguments)
    with pytest.raises(InputError, match=message):
      data.validation_batches(**arguments)
  with pytest.raises(InputError, match='step = -1'):
    data.train_batch(-1, 4, 0)


def test_configs_are_data():
  config = Text(corpus=Mixture(corpora=(PydocTopics(), StandardLibrary()), weights=(1.0, 3.0)))
  assert from_json(to_json(config)) == config
  changed = override(
    Text(),
    [('corpus', 'Files'), ('corpus.path', 'x.txt'), ('split', 'ByPosition'), ('packing', 'stream')],
  )
  assert changed == Text(corpus=Files(path='x.txt'), split=ByPosition(), packing='stream')


def test_tokenizer_of_a_run_on_other_text(dataset, corpus):
  data = dataset(tokenizer=Characters())
  other = Text(
    corpus=Files(path=corpus(['<1> 2', '<2> 3 <4>'], 'other.jsonl')),
    tokenizer=Bytes(),
    sequence_length=2,
  )
  assert open_data(other, tokenizer=data.tokenizer).vocab_size == data.vocab_size


def test_default_corpus(monkeypatch):
  data = open_data(Text(corpus=StandardLibrary(max_bytes=300_000)))
  assert data.vocab_size == 257
  assert data.train_batch(0, 16, 0).inputs.shape == (16, 256)
  unigram, bigram = data.baselines().values()
  assert 3 < bigram < unigram < 6
