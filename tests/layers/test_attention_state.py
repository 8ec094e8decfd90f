"""The key/value cache: sequences cut anywhere, with documents that begin anywhere, in a window or
not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.position import Alibi, LogTemperature, Rotary

B, T, D = 2, 13, 16
SEGMENTS = np.asarray(
  [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 7, 7]]
)


@pytest.mark.quick
@pytest.mark.parametrize(
  ('reach', 'position'),
  [
    ({}, Rotary()),
    ({'window': 3}, Rotary()),
    ({'window': 5}, Alibi()),
    ({'window': 1}, None),
    ({'window': 20}, Alibi()),
    ({'chunk': 4}, Rotary()),
    ({'chunk': 1}, None),
    ({'chunk': 20}, LogTemperature(interval=3)),
  ],
  ids=str,
)
@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one document', 'packed'])
def test_cut_anywhere(reach, position, segments):
  layer = Attention.Config(heads=4, kv_heads=2, **reach, position=position).build(
    D, nnx.Rngs(0), LayerPosition()
  )
  for w in (layer.q.kernel, layer.k.kernel):
    w[...] = 30 * w[...]  # sharp attention: a wrong key shows
  x = np.asarray(jax.random.normal(jax.random.key(1), (B, T, D)))
  graph, params = nnx.split(layer)
  call = jax.jit(lambda x, ctx, state: nnx.merge(graph, params)(x, ctx, state))
  step = jax.jit(lambda x, state: nnx.merge(graph, params).step(x, Context(), state))
  whole = call(x, Context(segments_BT=segments), None).y
  for cuts in ((13,), (4, 4, 4), (2, 6, 2)):
    state, parts, at = layer.init_state(B, T + 2), [], 0
    for i, n in enumerate(cuts):
      ctx = Context(
        segments_BT=None if segments is None else segments[:, at : at + n], fresh=i == 0
      )
      starts_here = (
        at == 0 or segments is None or bool((segments[:, at] == segments[:, at - 1]).all())
      )
      if not starts_here:
        # the first token of a call continues the document before it: such a cut is another text
        break
      out = call(x[:, at : at + n], ctx, state)
      slow = call(x[:, at : at + n], ctx.replace(fresh=False), state)
      np.testing.assert_allclose(out.y, slow.y, atol=1e-5)
      jax.tree.map(np.testing.assert_array_equal, out.state, slow.state)
      state, parts, at = out.state, [*parts, out.y], at + n
    while at < T and (segments is None or bool((segments[:, at] == segments[:, at - 1]).all())):
      out = step(x[:, at], state)
      state, parts, at = out.state, [*parts, out.y[:, None]], at + 1
    np.testing.assert_allclose(np.concatenate(parts, 1), whole[:, :at], atol=2e-5)


@pytest.mark.quick
@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['one document', 'packed'])
def test_chunks_are_documents_of_their_own(segments):
  """Chunks of 4 positions of each document: the same as attention over all positions, of a sequence
  in which every chunk is a document."""
  build = Attention.Config(heads=4, chunk=4).build(D, nnx.Rngs(0), LayerPosition())
  every = Attention.Config(heads=4).build(D, nnx.Rngs(0), LayerPosition())
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  ids = np.zeros((B, T), int) if segments is None else segments
  chunks = np.zeros((B, T), int)
  for b in range(B):
    position, number = 0, 0
    for t in range(1, T):
      position = position + 1 if ids[b, t] == ids[b, t - 1] else 0
      number += position % 4 == 0
      chunks[b, t] = number
  got = build(x, Context(segments_BT=segments)).y
  np.testing.assert_allclose(got, every(x, Context(segments_BT=jnp.asarray(chunks))).y, atol=1e-6)


def test_flops_of_chunks_are_those_of_their_pairs():
  """11 positions in chunks of 4: 10 + 10 + 6 pairs."""
  config = Attention.Config(heads=2, chunk=4)
  pairs = config.mixing_flops_per_token(8, 11, causal=True) * 11 / (4 * 8)
  assert pairs == pytest.approx(26)


@pytest.mark.quick
def test_a_segment_number_used_again_is_another_document():
  """Changes mark the borders: with a state and without."""
  layer = Attention.Config(heads=2).build(D, nnx.Rngs(0), LayerPosition())
  x = jax.random.normal(jax.random.key(1), (1, 6, D))
  again, new = jnp.asarray([[1, 1, 2, 2, 1, 1]]), jnp.asarray([[1, 1, 2, 2, 3, 3]])
  call = jax.jit(
    lambda segments_BT, state=None: layer(x, Context(segments_BT=segments_BT), state).y
  )
  want = call(new)
  np.testing.assert_allclose(call(again), want, atol=1e-6)
  np.testing.assert_allclose(call(again, layer.init_state(1, 6)), want, atol=1e-6)


def test_dropout_of_weights_needs_a_key_of_the_context():
  layer = Attention.Config(heads=2, attention_dropout=0.5).build(8, nnx.Rngs(0), LayerPosition())
  x = jax.random.normal(jax.random.key(1), (2, 6, 8))
  call = jax.jit(lambda ctx: layer(x, ctx).y)
  first, again, other = (call(Context(dropout_key=jax.random.key(seed))) for seed in (0, 0, 1))
  assert (first == again).all()
  assert not (first == other).all()
  assert not (first == call(Context())).all()
