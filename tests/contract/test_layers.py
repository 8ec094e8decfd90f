"""The layer contract (`jaxformer/layers/layer.py`), for every example of every registered layer.
The checks that `jaxformer check` makes too are in `jaxformer/compare/contract.py`.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states,
1e-4 for gradients (fp32)."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.ops.implementation import implementation
from jaxformer.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from jaxformer.testing import contract
from tests import tiers
from tests.contract.cases import (
  BATCH,
  DECODING,
  FIRST,
  LAYERS,
  LENGTH,
  Alone,
  Case,
  close,
  inputs,
  layer,
  segments,
)

every = pytest.mark.parametrize('name', [tiers.case(n, standing=n in FIRST) for n in LAYERS])
decoding = pytest.mark.parametrize('name', [tiers.case(n, standing=n in FIRST) for n in DECODING])
IN_TIME = MeshConfig(data=1, context=4, fsdp=2)


def seen(name):
  """A state that has read tokens; None for a layer without one, and for attention, whose cache is
  not divided in time."""
  if name not in DECODING or LAYERS[name].tag == 'Attention':
    return None
  case = layer(name)
  return case.call(case.params, inputs()[:, ::-1], Context(), case.init_state(BATCH, LENGTH))[1]


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


@pytest.mark.parametrize('name', [n for n in DECODING if DECODING[n].tag == 'Attention'])
def test_fast_form_equals_naive_on_a_cache(name):
  case, ctx, state = (
    layer(name),
    Context(segments_BT=segments(2, 13, 5)),
    layer(name).init_state(BATCH, LENGTH),
  )
  with implementation(every='naive'):
    naive = jax.jit(lambda *a: case.whole(*a))(case.params, inputs(), ctx, state)
  close(case.call(case.params, inputs(), ctx, state), naive, 1e-5)


@decoding
@pytest.mark.parametrize('prefill', contract.PREFILLS)
def test_sequence_equals_prefill_and_steps(name, prefill):
  contract.continued(layer(name), contract.inputs(), prefill)


@decoding
def test_sequence_equals_two_parts(name):
  contract.two_parts(layer(name))


@decoding
def test_no_output_depends_on_a_later_input(name):
  contract.causal(layer(name))


@every
def test_packed_documents_equal_separate_ones(name):
  contract.packed(layer(name))


@every
def test_sharded_equals_unsharded(name):
  case = layer(name)
  if LAYERS[name].tag == 'Attention' and 'heads:4->3' in name:
    case = Case(Alone(layer=LAYERS[name].replace(heads=4, kv_heads=4)))
  contract.sharded(case)


@every
def test_divided_in_time_equals_whole(name):
  """Outputs, the final state and all gradients, from a state that has seen tokens, with documents
  that begin inside and at the border of shards."""
  case, x, state = layer(name), inputs(), seen(name)
  ctx = Context(segments_BT=segments(7, 8, 5))
  whole = case.gradients(case.params, x, ctx, state)
  devices = make_mesh(IN_TIME)
  with use_mesh(devices, IN_TIME.rules):
    params = jax.device_put(case.params, case.definition.shardings(devices, IN_TIME.rules))
    divided = jax.jit(lambda *a: case.differentiated(*a))(
      params, jax.device_put(x, batch_sharding(devices, IN_TIME.rules)), ctx, state
    )
  close(divided, whole, 1e-4)


@every
def test_bfloat16_gradients_are_finite_and_near(name):
  contract.bfloat16(layer(name))


@decoding
def test_state_is_as_declared(name):
  contract.declared(layer(name))


@every
def test_config_survives_json(name):
  contract.survives_json(layer(name))


# Of a state that is not known to be fresh, `test_sequence_equals_two_parts` has the general case;
# attention reads it another way.
@pytest.mark.parametrize(
  ('name', 'fresh'),
  [
    tiers.case(n, fresh, standing=n in FIRST)
    for n in DECODING
    for fresh in (False, True)
    if fresh or DECODING[n].tag == 'Attention'
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
