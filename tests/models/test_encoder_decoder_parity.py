"""RNNsearch, GNMT, Luong's attention and the seq2seq LSTM against numpy, written from the papers, a
sentence at a time, float64."""

import jax
import numpy as np
import pytest

from jaxformer.layers.attentive_decoder import RnnSearch
from jaxformer.layers.gru import Gru
from jaxformer.layers.init import FanInUniform, Normal
from jaxformer.layers.lstm import Lstm
from jaxformer.models.params import define
from jaxformer.models.zoo.gnmt import gnmt
from jaxformer.models.zoo.seq2seq import luong, rnnsearch, seq2seq_lstm
from tests.tiers import case

N = Normal(std=0.4)
GATES = 'kernel', 'recurrent_kernel', 'bias'
SCORES = {'dot': None, 'general': FanInUniform()}
SIZES = {'source_vocab_size': 13, 'vocab_size': 11, 'context_length': 20}
SOURCES, TARGETS = [[3, 1, 4, 1, 5], [9, 2, 6]], [[1, 2, 3, 4], [5, 6, 7, 8]]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def weights(config):
  numbers = np.random.default_rng(1)
  return {
    n: np.float32(0.4 * numbers.standard_normal(i.shape)) for n, i in define(config).info.items()
  }


def agree(config, reference):
  """Logits of both pairs at once, the shorter source padded, against those of a function of one
  pair."""
  params = weights(config)
  source = np.full((2, 7), -1)
  for row, s in zip(source, SOURCES, strict=True):
    row[: len(s)] = s
  logits = jax.jit(lambda params, *ids: define(config).merge(params)(*ids).y)
  ours = np.asarray(logits(params, source, np.asarray(TARGETS)))
  wide = {n: p.astype(np.float64) for n, p in params.items()}
  for b, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True)):
    expected = reference(wide, s, t)
    assert np.abs(expected).max() > 0.3
    print(
      f'max abs difference {np.abs(ours[b] - expected).max():.1e} of logits up to '
      f'{np.abs(expected).max():.2f}'
    )
    np.testing.assert_allclose(ours[b], expected, atol=1e-5, rtol=0)


def test_rnnsearch():
  """Bahdanau et al. 2014, appendix A, with its own z: ours is 1 - z, so the weights of z change
  their sign."""

  def gru(w, u, x, s, extra=0.0):
    """A.1.1: s = (1 - z) s + z tanh(W x + U (r s)); gates in our order r, z, n."""
    extra = np.broadcast_to(extra, w.shape[1:])
    r, z = (
      sigmoid(x @ w[:, 0] + s @ u[:, 0] + extra[0]),
      sigmoid(-(x @ w[:, 1] + s @ u[:, 1] + extra[1])),
    )
    return (1 - z) * s + z * np.tanh(x @ w[:, 2] + (r * s) @ u[:, 2] + extra[2])

  def reference(p, source, target):
    xs, n = p['source_input.table'][source], 6
    forward, backward, layer = [np.zeros(n)], [np.zeros(n)], 'encoder.groups.0.0.branches.0.layer'
    for x in xs:
      forward.append(
        gru(p[f'{layer}.forward.kernel'], p[f'{layer}.forward.recurrent_kernel'], x, forward[-1])
      )
    for x in xs[::-1]:
      backward.append(
        gru(p[f'{layer}.backward.kernel'], p[f'{layer}.backward.recurrent_kernel'], x, backward[-1])
      )
    m = np.concatenate([np.array(forward[1:]), np.array(backward[1:])[::-1]], axis=1)
    d = {k.removeprefix('decoder.groups.0.0.branches.0.layer.'): v for k, v in p.items()}
    s, logits = np.tanh(backward[-1] @ d['start.kernel']), []
    for y in p['embedder.input.table'][target]:
      a = softmax(
        np.array([d['score'] @ np.tanh(s @ d['query.kernel'] + m_j @ d['key.kernel']) for m_j in m])
      )
      c = a @ m
      t = (
        s @ d['out_state.kernel'] + y @ d['out_input.kernel'] + c @ d['out_context.kernel']
      )  # with the state before
      logits.append(np.maximum(t[0::2], t[1::2]) @ p['head.kernel'])
      s = gru(
        d['kernel'], d['recurrent_kernel'], y, s, np.einsum('C,CGH->GH', c, d['context_kernel'])
      )
    return np.array(logits)

  agree(
    rnnsearch(
      5,
      6,
      7,
      4,
      **SIZES,
      embedding_init=N,
      head_init=N,
      gru=Gru.Config(bias=None),
      search=RnnSearch.Config(),
    ),
    reference,
  )


def lstm(p, layer, x, state):
  """Graves' cell; gates in our order i, f, g, o."""
  h, c = state
  i, f, g, o = (
    x @ p[f'{layer}.kernel'][:, k]
    + h @ p[f'{layer}.recurrent_kernel'][:, k]
    + p[f'{layer}.bias'][k]
    for k in range(4)
  )
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
  return sigmoid(o) * np.tanh(c), c


def run(p, layer, xs, state):
  out = []
  for x in xs:
    state = lstm(p, layer, x, state)
    out.append(state[0])
  return np.array(out), state


@pytest.mark.parametrize('layers', [case(3, standing=False), case(4, standing=True)])
def test_gnmt(layers):
  """Wu et al. 2016, section 3: sums from the third layer on, c_t of the bottom layer's output
  before, read by every layer."""
  n = 6

  def stacked(p, stack, r):
    """The parameters of residual layer r, which are stacked where there are several."""
    prefix = f'{stack}.groups.2.0.branches.0.layer'
    return {f'l.{k}': p[f'{prefix}.{k}'][r] if layers > 3 else p[f'{prefix}.{k}'] for k in GATES}

  def reference(p, source, target):
    zero = (np.zeros(n), np.zeros(n))
    xs, bottom = p['source_input.table'][source], 'encoder.groups.0.0.branches.0.layer'
    forward, _ = run(p, f'{bottom}.forward', xs, zero)
    backward, last = run(p, f'{bottom}.backward', xs[::-1], zero)
    # of the layer in both directions the backward state is handed over
    states = [last]
    x, last = run(
      p,
      'encoder.groups.1.0.branches.0.layer',
      np.concatenate([forward, backward[::-1]], axis=1),
      zero,
    )
    states.append(last)
    for r in range(layers - 2):
      m, last = run(stacked(p, 'encoder', r), 'l', x, zero)
      x = x + m  # what goes up is the sum, what recurs is m
      states.append(last)
    memory, logits, attention = x, [], 'decoder.groups.0.0.branches.0.layer'
    both = np.concatenate([p[f'{attention}.kernel'], p[f'{attention}.context_kernel']])
    bottom_params = {
      'l.kernel': both,
      'l.recurrent_kernel': p[f'{attention}.recurrent_kernel'],
      'l.bias': p[f'{attention}.bias'],
    }
    for y in p['embedder.input.table'][target]:
      q = states[0][0] @ p[f'{attention}.query.kernel']
      c = (
        softmax(
          np.array(
            [
              p[f'{attention}.score'] @ np.tanh(q + m @ p[f'{attention}.key.kernel'])
              for m in memory
            ]
          )
        )
        @ memory
      )
      states[0] = lstm(bottom_params, 'l', np.concatenate([y, c]), states[0])
      states[1] = lstm(
        p, 'decoder.groups.1.0.branches.0.layer', np.concatenate([states[0][0], c]), states[1]
      )
      x = states[1][0]
      for r in range(layers - 2):
        states[2 + r] = lstm(stacked(p, 'decoder', r), 'l', np.concatenate([x, c]), states[2 + r])
        x = x + states[2 + r][0]
      logits.append(x @ p['head.kernel'] + p['head.bias'])
    return np.array(logits)

  agree(
    gnmt(n, layers, vocab_size=13, context_length=20, init=N, embedding_init=N, head_init=N),
    reference,
  )


def of_layer(p, stack, r):
  """The parameters of an LSTM of several that are stacked."""
  return {f'l.{k}': p[f'{stack}.groups.0.0.branches.0.layer.{k}'][r] for k in GATES}


def attended(p, layer, memory, h):
  """Luong et al. 2015, section 3.1, by the dot product or, where there is a W_a, the general
  score."""
  keys = memory @ p[f'{layer}.score.kernel'] if f'{layer}.score.kernel' in p else memory
  return np.tanh(np.concatenate([softmax(keys @ h) @ memory, h]) @ p[f'{layer}.out.kernel'])


@pytest.mark.parametrize('score', [None, 'dot', 'general'])
def test_seq2seq_lstm_and_luong(score):
  """Sutskever et al. 2014: the source from its end, all layers' states handed over. Luong et al.
  2015, section 3.1, on top."""
  n = 6

  def reference(p, source, target):
    x, y = p['source_input.table'][source[::-1]], p['embedder.input.table'][target]
    for r in range(2):
      x, last = run(of_layer(p, 'encoder', r), 'l', x, (np.zeros(n), np.zeros(n)))
      y, _ = run(of_layer(p, 'decoder', r), 'l', y, last)
    if score is not None:
      y = np.array([attended(p, 'decoder.groups.1.0.branches.0.layer', x, h) for h in y])
    return y @ p['head.kernel'] + p['head.bias']

  plain = seq2seq_lstm(n, 2, **SIZES, layer=Lstm.Config(), embedding_init=N, head_init=N)
  agree(
    plain if score is None else luong(n, 2, SCORES[score], **SIZES, input_feeding=False), reference
  )


@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('score', ['dot', 'general'])
def test_luong_with_input_feeding(score, layers):
  """Luong et al. 2015, section 3.3: the first layer reads the attentional vector of the step before
  beside the word."""
  n, layer = 6, 'decoder.groups.0.0.branches.0.layer'

  def reference(p, source, target):
    memory, states, logits, attentional = p['source_input.table'][source[::-1]], [], [], np.zeros(n)
    for r in range(layers):
      one = (
        {f'l.{k}': p[f'encoder.groups.0.0.branches.0.layer.{k}'] for k in GATES}
        if layers == 1
        else of_layer(p, 'encoder', r)
      )
      memory, last = run(one, 'l', memory, (np.zeros(n), np.zeros(n)))
      states.append(last)
    for word in p['embedder.input.table'][target]:
      x = np.concatenate([word, attentional])
      for r in range(layers):
        states[r] = lstm(p, f'{layer}.lstms.{r}', x, states[r])
        x = states[r][0]
      attentional = attended(p, f'{layer}.attention', memory, x)
      logits.append(attentional @ p['head.kernel'] + p['head.bias'])
    return np.array(logits)

  agree(luong(n, layers, SCORES[score], **SIZES), reference)
