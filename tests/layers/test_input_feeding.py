"""Input feeding beside what the contract asks of every layer: dropout, states handed over, and
settings that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.layers.cross_attention import LuongAttention
from jaxformer.layers.input_feeding import InputFeeding
from jaxformer.layers.layer import Context, Memory
from jaxformer.layers.lstm import Lstm, RecurrentState
from jaxformer.models.params import define
from jaxformer.testing.case import Alone

pytestmark = pytest.mark.quick
B, T, S, D = 2, 5, 3, 8
DOT = LuongAttention.Config(score_init=None)


def numbers(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def memory(states=()):
  return Memory(numbers(0, B, S, D), jnp.arange(S)[None] < jnp.asarray([[3], [2]]), states)


def layer(**settings):
  definition = define(Alone(layer=InputFeeding.Config(attention=DOT, **settings), width=D))
  return definition.merge(definition.init(jax.random.key(0)))


def test_dropout_needs_a_key():
  x, dropping = numbers(1, B, T, D), layer(dropout=0.5)
  run = jax.jit(lambda some, ctx: some(x, ctx).y)
  whole, same = (run(some, Context(memory=memory())) for some in (layer(), dropping))
  np.testing.assert_array_equal(whole, same)
  first, again, other = (
    run(dropping, Context(memory=memory(), dropout_key=jax.random.key(k))) for k in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert np.all(np.abs(np.asarray(first - other)).max((0, 2))[1:] > 1e-4)
  assert np.abs(np.asarray(first - whole)).max() > 1e-3


def test_states_are_handed_over_from_the_bottom_up():
  """Two blocks of an encoder to three LSTMs: the third begins from zeros."""
  ended = tuple((RecurrentState(numbers(2 + i, B, D), numbers(4 + i, B, D)),) for i in range(2))
  state = layer(layers=3).init_state(B, T, memory(ended))
  y_BH, lstms = state.carried
  for lstm, (given,) in zip(lstms, ended, strict=False):
    np.testing.assert_array_equal(lstm.h_BH, given.h_BH)
    np.testing.assert_array_equal(lstm.c_BH, given.c_BH)
  assert not np.any(lstms[2].h_BH)
  assert not np.any(y_BH)
  with pytest.raises(InputError, match='the decoder has a recurrence of 8 units'):
    layer().init_state(B, T, memory(((RecurrentState(numbers(2, B, 4), numbers(3, B, 4)),),)))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'layers': 0}, 'InputFeeding.layers = 0'),
    ({'dropout': 1.0}, 'InputFeeding.dropout = 1.0'),
    ({'lstm': Lstm.Config(context_width=4)}, 'InputFeeding.lstm.context_width = 4'),
    ({'lstm': Lstm.Config(hidden=4)}, 'InputFeeding.lstm.project = True'),
  ],
)
def test_bad_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    InputFeeding.Config(**settings)
