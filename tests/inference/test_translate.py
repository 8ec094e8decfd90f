"""Search: greedy against a beam of one, scores against teacher forcing, and a beam against all that
there is."""

import functools
import itertools
import types

import jax
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.inference import Beam, align, draw, translate
from jaxformer.inference.beam import beam_search
from jaxformer.layers.init import Normal, Zeros
from jaxformer.layers.lstm import Lstm
from jaxformer.models.params import define
from jaxformer.models.zoo.gnmt import gnmt
from jaxformer.models.zoo.seq2seq import luong, seq2seq_lstm
from jaxformer.models.zoo.transformer import transformer
from tests.tiers import case, thorough

V, END = 11, 10
SIZES = {'source_vocab_size': 12, 'vocab_size': V, 'context_length': 40}
N = Normal(std=1.0)
MODELS = {
  'transformer': transformer(16, 2, 32, 2, vocab_size=12, context_length=40, head_bias=Zeros()),
  'seq2seq-lstm': seq2seq_lstm(16, 2, **SIZES, layer=Lstm.Config(), embedding_init=N, head_init=N),
  'luong': luong(16, 2, None, **SIZES),
  'luong without input feeding': luong(16, 1, None, **SIZES, input_feeding=False),
  'gnmt': gnmt(16, 3, vocab_size=12, context_length=40, init=N, embedding_init=N, head_init=N),
}
SOURCES = [
  [1, 2, 3, 4, 5, END],
  [6, END],
  [7, 8, 9, 1, 2, 3, 4, 5, 6, END],
  [2, 2, END],
  [9, 1, END],
]


@functools.cache
def model(name):
  """Weights large enough that rows differ in what they say and when they end."""
  definition = define(MODELS[name])
  params = definition.init(jax.random.key(1))
  keys = jax.random.split(jax.random.key(2), len(params))
  params = {
    n: p + 0.4 * jax.random.normal(k, p.shape)
    for k, (n, p) in zip(keys, params.items(), strict=True)
  }
  return definition, params | {
    'head.bias': params['head.bias'].at[END].add(4.0 if name == 'transformer' else 1.0)
  }


def padded(sources, length=16):
  rows = np.full((len(sources), length), -1, np.int32)
  for row, source in zip(rows, sources, strict=True):
    row[: len(source)] = source
  return rows


def search(name, beam, sources=SOURCES, limit=12):
  definition, params = model(name)
  found = beam_search(
    definition,
    params,
    padded(sources),
    np.int32(END),
    np.int32(END),
    np.full(len(sources), limit, np.int32),
    beam=beam,
    max_new_tokens=16,
    vocab_size=V if definition.config.vocab_size > V else None,
  )
  return types.SimpleNamespace(**{k: np.asarray(v) for k, v in vars(found).items()})


def forced(name, source, tokens, finished):
  """log p(tokens and end | source) by teacher forcing."""
  targets = [*tokens, END] if finished else tokens
  batch = {
    'source_BS': padded([source]),
    'inputs': np.maximum(padded([[END, *targets[:-1]]]), 0),
    'targets_BT': padded([targets]),
    'segments_BT': None,
  }
  return -float(scores(name)(model(name)[1], batch).sum())


@functools.cache
def scores(name):
  return jax.jit(
    lambda params, batch: model(name)[0].merge(params).scores(types.SimpleNamespace(**batch))[0]
  )


@pytest.mark.parametrize(
  'name', [case(name, standing=name in ('transformer', 'seq2seq-lstm')) for name in MODELS]
)
def test_a_beam_of_one_is_greedy(name):
  """It takes the argmax of the logits of the whole target so far, token by token."""
  definition, params = model(name)
  found, sources, limit = search(name, Beam(width=1)), padded(SOURCES), 12
  read = jax.jit(lambda tokens: definition.merge(params)(sources, tokens).y[:, :, :V])
  tokens, done = np.full((len(SOURCES), limit + 1), END, np.int32), np.zeros(len(SOURCES), bool)
  for t in range(limit):
    best = np.asarray(read(tokens))[:, t].argmax(-1)
    done |= best == END
    np.testing.assert_array_equal(found.tokens_BKN[:, 0, t], np.where(done, -1, best))
    tokens[:, t + 1] = best
  np.testing.assert_array_equal(found.finished_BK[:, 0], done)
  for b, source in enumerate(SOURCES):
    mine = found.tokens_BKN[b, 0][found.tokens_BKN[b, 0] != -1].tolist()
    assert found.log_p_BK[b, 0] == pytest.approx(forced(name, source, mine, done[b]), abs=1e-4)


@pytest.mark.parametrize(
  'name', [case(name, standing=name in ('transformer', 'seq2seq-lstm')) for name in MODELS]
)
def test_scores_agree_with_teacher_forcing(name):
  found = search(name, Beam(width=4, length_penalty=0.6))
  assert found.finished_BK.any()
  for b, k in np.ndindex(found.log_p_BK.shape):
    tokens = found.tokens_BKN[b, k][found.tokens_BKN[b, k] != -1].tolist()
    finished, length = bool(found.finished_BK[b, k]), int(found.length_BK[b, k])
    assert length == len(tokens) + finished
    assert found.log_p_BK[b, k] == pytest.approx(
      forced(name, SOURCES[b], tokens, finished), abs=1e-4
    )
    assert found.score_BK[b, k] == pytest.approx(
      found.log_p_BK[b, k] / ((5 + length) / 6) ** 0.6, rel=1e-5
    )
  ended = np.where(found.finished_BK, found.score_BK, -np.inf)
  assert np.all(ended[:, 0] == ended.max(1))


@pytest.mark.parametrize('name', [case('transformer', standing=True), case('gnmt', standing=False)])
def test_a_wide_beam_finds_the_best_of_all(name):
  """Two tokens at most, an end among them: a beam as wide as the vocabulary keeps every first
  token."""
  found = search(name, Beam(width=V), limit=2)
  for b, source in enumerate(SOURCES[:2]):
    ways = [[], *([t] for t in range(V) if t != END)]
    best = max(ways, key=lambda w: forced(name, source, w, True))
    tokens = found.tokens_BKN[b, 0][found.tokens_BKN[b, 0] != -1].tolist()
    assert found.finished_BK[b, 0]
    assert tokens == best


@thorough
def test_the_coverage_penalty_is_that_of_the_alignment():
  definition, params = model('transformer')
  found = search('transformer', Beam(width=3, coverage_penalty=0.7))
  for b, k in itertools.product(range(len(SOURCES)), range(3)):
    tokens = found.tokens_BKN[b, k][found.tokens_BKN[b, k] != -1].tolist()
    rows = align(definition, params, SOURCES[b], tokens, begin=END).mean(0)[: found.length_BK[b, k]]
    expected = 0.7 * np.log(np.minimum(rows.sum(0), 1)).sum()
    assert found.score_BK[b, k] - found.log_p_BK[b, k] == pytest.approx(expected, abs=1e-4)
  with pytest.raises(InputError, match='coverage_penalty: must be 0'):
    search('seq2seq-lstm', Beam(coverage_penalty=0.2))


@pytest.mark.parametrize(
  ('name', 'width'),
  [
    case('transformer', 3, standing=True),
    case('gnmt', 3, standing=False),
    case('luong', 3, standing=False),
    case('seq2seq-lstm', 1, standing=False),
  ],
)
def test_a_translation_depends_on_its_source_alone(name, width):
  definition, params = model(name)
  options = {'end': END, 'beam': Beam(width=width, length_penalty=0.6), 'vocab_size': V}
  together = translate(definition, params, SOURCES, **options)
  backwards = translate(definition, params, SOURCES[::-1], **options, batch_size=2)[::-1]
  alone = translate(definition, params, SOURCES[1:2], **options)
  for a, b in (*zip(together, backwards, strict=True), (together[1], alone[0])):
    assert (a.tokens, a.finished) == (b.tokens, b.finished)
    assert a.score == pytest.approx(b.score, abs=1e-4)


def test_limits_and_bad_input():
  definition, params = model('transformer')
  for t, source in zip(
    translate(definition, params, SOURCES, end=END, max_new_tokens=3, vocab_size=V),
    SOURCES,
    strict=True,
  ):
    assert len(t.tokens) + t.finished <= 3, source
  for given, message in (
    ({'sources': [[1], []]}, 'source 1 is empty'),
    ({'sources': [[12]]}, 'source 0 has token 12'),
    ({'end': 12}, 'end = 12'),
    ({'max_new_tokens': 0}, 'max_new_tokens = 0'),
    ({'batch_size': 0}, 'batch_size = 0'),
  ):
    with pytest.raises(InputError, match=message):
      translate(definition, params, **{'sources': SOURCES, 'end': END} | given)
  with pytest.raises(InputError, match=r'Beam\.width = 0'):
    Beam(width=0)


def test_an_alignment_and_its_picture(tmp_path):
  definition, params = model('transformer')
  found = align(definition, params, SOURCES[0], [3, 4], begin=END)
  assert found.shape == (2, 3, 6)
  np.testing.assert_allclose(found.mean(0).sum(1), 1, atol=1e-5)
  draw(tmp_path / 'a.png', found.mean(0), list('abcde$'), list('xy$'))
  for name in ('a', 'x\udcff.png', '', tmp_path):
    with pytest.raises(InputError, match='out = '):
      draw(name, found.mean(0), list('abcde$'), list('xy$'))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(InputError, match='cannot be written'):
    draw(tmp_path / 'a.unknown', found.mean(0), list('abcde$'), list('xy$'))
  with pytest.raises(InputError, match='needs as many labels'):
    draw(tmp_path / 'a.png', found.mean(0), list('abc'), list('xy$'))
  with pytest.raises(InputError, match='no attention'):
    align(*model('seq2seq-lstm'), SOURCES[0], [3, 4], begin=END)
