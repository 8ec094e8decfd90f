"""Layers side by side: the sum, and what each of them returns and declares beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.bidirectional import Bidirectional
from jaxformer.layers.cross_attention import CrossAttention
from jaxformer.layers.layer import Context, LayerConfig, LayerPosition, Memory
from jaxformer.layers.lstm import Lstm
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.parallel import ParallelLayers, Summand
from jaxformer.layers.shared import Shared

D = 16
X = jax.random.normal(jax.random.key(1), (2, 6, D))
MLP = GatedMlp.Config(hidden=24)
MAMBA = Mamba2.Config(d_state=4, heads=2, head_dim=8)


def side_by_side(*layers, scales=()):
  scales = scales or ((None, None),) * len(layers)
  return ParallelLayers.Config(
    summands=tuple(
      Summand(layer=layer, in_scale=a, out_scale=b)
      for layer, (a, b) in zip(layers, scales, strict=True)
    )
  )


def built(config, width=D):
  return config.build(width, nnx.Rngs(params=0), LayerPosition())


def test_the_output_is_the_scaled_sum():
  attention = Attention.Config(heads=2)
  module = built(side_by_side(MAMBA, attention, scales=((1.5, 0.5), (None, 0.25))))
  mamba, attention = module.layers
  expected = 0.5 * mamba(1.5 * X, Context()).y + 0.25 * attention(X, Context()).y
  np.testing.assert_allclose(module(X, Context()).y, expected, atol=1e-6)


def test_what_the_layers_return_beside_it_is_kept():
  cross = CrossAttention.Config(heads=2)
  module = built(side_by_side(cross, Moe.Config(experts=4, expert=MLP), cross))
  memory = Memory(X[:, :5], jnp.ones((2, 5), bool))
  out = module(X, Context(memory=memory, align=True))
  assert [a.shape for a in out.alignments] == [(2, 6, 5)] * 2
  assert 'moe/entropy' in out.aux
  # of two layers that return a name, losses are added and others are in a vector
  twice = built(side_by_side(*[Moe.Config(experts=4, expert=MLP)] * 2))
  assert twice(X, Context()).aux['moe/entropy'].shape == (2,)


def test_hypotheses_keep_what_their_states_hold_of_the_source():
  module = built(side_by_side(CrossAttention.Config(heads=2), Attention.Config(heads=2)))
  memory = Memory(X[:, :5], jnp.ones((2, 5), bool))
  state = module.init_state(2, 6, memory)
  state = module(X, Context(), state).state
  selected = module.select_rows(state, jnp.asarray([1, 1]), same_source=True)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, selected[0], state[0]))
  np.testing.assert_array_equal(selected[1].k_BSGK[0], state[1].k_BSGK[1])


def test_a_decoder_starts_from_the_states_of_an_encoder():
  lstm, both = Lstm.Config(), Bidirectional.Config(layer=Lstm.Config())
  encoder = built(side_by_side(both, both))
  final = encoder(X, Context(), encoder.init_state(2, 6)).state
  handed = encoder.handed_over(final)
  assert side_by_side(both, both).hands_over
  assert not side_by_side(both, MLP).hands_over
  decoder = built(side_by_side(lstm, lstm))
  memory = Memory(X, jnp.ones((2, 6), bool), state=handed)
  for state, one in zip(decoder.init_state(2, 6, memory), handed, strict=True):
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, one))


class Reader(LayerConfig):
  """Reads a value of an earlier layer, and nothing of its input after the present."""

  def reads(self, width):
    return {'value': 3}


def test_declarations_are_those_of_all_layers():
  moe, shared = Moe.Config(experts=6, expert=MLP), Shared.Config(layer=MLP, name='mlp')
  config = side_by_side(moe, Moe.Config(experts=4, expert=MLP), shared, Reader(), MAMBA)
  assert config.expert_count == 2
  assert config.experts_per_token == 4
  assert config.reads(D) == {'value': 3}
  assert set(config.common(D)) == {'mlp'}
  assert config.mixing_flops_per_token(D, 8, True) == MAMBA.mixing_flops_per_token(D, 8, True)
  assert config.decodes
  assert not side_by_side(MLP, Attention.Config(causal=False)).decodes
  assert config.resolved(D).layers[-1] == MAMBA.resolved(D)


def test_a_layer_has_the_modules_that_those_beside_it_have():
  shared = Shared.Config(layer=MLP, name='mlp')
  module = built(side_by_side(shared, shared))
  module.bind({'mlp': built(MLP)}, 0)
  one = built(MLP)(X, Context()).y
  np.testing.assert_allclose(module(X, Context()).y, 2 * one, atol=1e-6)


def test_layers_that_do_not_fit_are_refused():
  wide = Bidirectional.Config(layer=Lstm.Config())
  with pytest.raises(InputError, match='layers of one output width'):
    side_by_side(MLP, wide).out_width(D)
  narrow = (CrossAttention.Config(heads=2, source_width=w) for w in (8, 16))
  with pytest.raises(InputError, match='layers that read one encoder'):
    side_by_side(*narrow).memory_width(D)
  with pytest.raises(InputError, match='summands'):
    side_by_side()
