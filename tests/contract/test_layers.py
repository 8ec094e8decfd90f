"""The layer contract (`jaxformer/layers/layer.py`), for every example of every registered layer.
The checks that `jaxformer check` makes too are in `jaxformer/testing/contract.py`.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states,
1e-4 for gradients (fp32)."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.ops.implementation import implementation
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, use_mesh
from jaxformer.testing import contract
from jaxformer.testing.case import Alone, Case
from tests import tiers
from tests.contract.cases import (
  BATCH,
  DECODING,
  FIRST,
  LAYERS,
  LENGTH,
  WIDTH,
  close,
  inputs,
  layer,
  segments,
)

every = pytest.mark.parametrize('name', [tiers.case(n, standing=n in FIRST) for n in LAYERS])
decoding = pytest.mark.parametrize('name', [tiers.case(n, standing=n in FIRST) for n in DECODING])
# Long sequences and packed documents are held to their tokens, each row by itself, in every layer
# that decodes. Tests that name one property of these stand for all in a few layers.
TELLING = {n for n in FIRST if LAYERS[n].tag in tiers.LAYERS or n not in DECODING}
telling = pytest.mark.parametrize('name', [tiers.case(n, standing=n in TELLING) for n in LAYERS])
telling_decoding = pytest.mark.parametrize(
  'name', [tiers.case(n, standing=n in TELLING) for n in DECODING]
)


# Layers whose state grows with the sequence, and is not the encoder's: key/value caches.
CACHED = [
  name
  for name, c in DECODING.items()
  if c.memory_width(WIDTH) is None and c.state_size(WIDTH, 2) != c.state_size(WIDTH, 1)
]


def seen(name, room=2 * LENGTH):
  """A state that has read `LENGTH` of the tokens that it has room for; None for a layer without
  one."""
  if name not in DECODING:
    return None
  case = layer(name)
  return case.call(case.params, inputs()[:, ::-1], Context(), case.init_state(BATCH, room))[1]


@tiers.newest
@every
def test_fast_form_equals_naive(name):
  """Outputs, the final state and all gradients, from a state that has seen tokens, with several
  documents."""
  case, ctx = layer(name), Context(segments_BT=segments(7, 8, 5))
  fast, gradients = case.gradients(case.params, inputs(), ctx, seen(name))
  with implementation(every='naive'):
    naive, naive_gradients = jax.jit(lambda *a: case.differentiated(*a))(
      case.params, inputs(), ctx, seen(name)
    )
  close(fast, naive, 1e-5)
  close(gradients, naive_gradients, 1e-4, 'gradient ')


@pytest.mark.parametrize('name', [tiers.case(n, standing=n in FIRST) for n in CACHED])
def test_fast_form_equals_naive_on_a_cache(name):
  case, ctx, state = (
    layer(name),
    Context(segments_BT=segments(2, 13, 5)),
    layer(name).init_state(BATCH, LENGTH),
  )
  with implementation(every='naive'):
    naive = jax.jit(lambda *a: case.whole(*a))(case.params, inputs(), ctx, state)
  close(case.call(case.params, inputs(), ctx, state), naive, 1e-5)


@telling_decoding
@pytest.mark.parametrize('prefill', contract.PREFILLS)
def test_sequence_equals_prefill_and_steps(name, prefill):
  contract.continued(layer(name), contract.inputs(), prefill)


@telling_decoding
def test_sequence_equals_two_parts(name):
  contract.two_parts(layer(name))


@tiers.newest
@decoding
def test_long_sequence_equals_its_tokens(name):
  contract.long(layer(name))


@telling
def test_no_row_depends_on_others(name):
  contract.rows_apart(layer(name))


@telling_decoding
def test_no_output_depends_on_a_later_input(name):
  contract.causal(layer(name))


@every
def test_packed_documents_equal_separate_ones(name):
  contract.packed(layer(name))


@every
def test_sharded_equals_unsharded(name):
  contract.sharded(layer(name))


@tiers.newest
@pytest.mark.parametrize(
  ('name', 'shards'),
  [tiers.case(n, shards, standing=n in FIRST and shards == 4) for shards in (4, 8) for n in LAYERS],
)
def test_time_sharded_equals_unsharded(name, shards):
  """Outputs, the final state and all gradients, from a state that has seen tokens, with documents
  that start inside and at the border of shards of five tokens each."""
  times = shards // 4
  case, x, state = layer(name), jnp.tile(inputs(), (1, times, 1)), seen(name, (times + 1) * LENGTH)
  ctx = Context(segments_BT=segments(7, 8, 5 + (times - 1) * LENGTH))
  unsharded = case.gradients(case.params, x, ctx, state)
  mesh = MeshConfig(data=1, context=shards, fsdp=8 // shards)
  parallel = Parallel(make_mesh(mesh), mesh.rules)
  with use_mesh(parallel):
    params = jax.device_put(case.params, case.definition.shardings(parallel))
    sharded = jax.jit(lambda *a: case.differentiated(*a))(
      params, jax.device_put(x, parallel.batch), ctx, state
    )
  close(sharded, unsharded, 1e-4)


@every
def test_gradients_equal_differences(name):
  contract.differentiable(layer(name))


@every
def test_bfloat16_is_near(name):
  contract.bfloat16(layer(name))


@decoding
def test_state_is_as_declared(name):
  contract.declared(layer(name))


@every
def test_config_survives_json(name):
  contract.survives_json(layer(name))


# Of a state that is not known to be fresh, `test_sequence_equals_two_parts` has the general case;
# a cache is read by other code then.
@pytest.mark.parametrize(
  ('name', 'fresh'),
  [
    tiers.case(n, fresh, standing=n in FIRST)
    for n in DECODING
    for fresh in (False, True)
    if fresh or n in CACHED
  ],
)
def test_padding_before_a_document_leaves_no_trace(name, fresh):
  """How prompts of unequal lengths are read: padding is a document of its own, and the next one
  starts anew, in its state too."""
  case, x, pad = layer(name), inputs(), 3
  segments_BT = jnp.broadcast_to((jnp.arange(LENGTH) >= pad).astype(jnp.int32), (BATCH, LENGTH))
  ctx = Context(segments_BT=segments_BT, fresh=fresh)
  padded_y, padded_state = case.call(case.params, x, ctx, case.init_state(BATCH, LENGTH + 3))
  y, state = case.call(case.params, x[:, pad:], Context(), case.init_state(BATCH, LENGTH + 3))
  close(padded_y[:, pad:], y, 1e-5)
  for i in range(3):
    padded_y, padded_state = case.step(case.params, x[:, i], padded_state)
    y, state = case.step(case.params, x[:, i], state)
    close(padded_y, y, 1e-5)


def test_one_that_does_not_divide_over_tensor_is_sharded_over_the_other_axes():
  case = Case(Alone(layer=Mamba2.Config()), quick=True)  # of width 32: one head
  assert str(contract.sharded(case)).startswith('over a tensor axis: mesh.tensor = 2: must divide')
