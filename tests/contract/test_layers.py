"""The layer contract (`jaxformer/layers/layer.py`), for every example of every registered layer.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs and states, 1e-4 for gradients (fp32).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, DECODING, LAYERS, LENGTH, WIDTH, Alone, Case, close, inputs, layer, segments

from jaxformer.layers.layer import Context
from jaxformer.ops.route import route
from jaxformer.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh

every = pytest.mark.parametrize('name', LAYERS)
decoding = pytest.mark.parametrize('name', DECODING)
IN_TIME = MeshConfig(data=1, context=4, fsdp=2)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)   # every way of dividing at once; test_models.py has others


@every
def test_fast_form_equals_naive(name):
  case, x = layer(name), inputs()
  ctx = Context(segments_BT=segments(12, 8))
  state = case.init_state(BATCH, LENGTH) if name in DECODING else None
  fast = case.call(case.params, x, ctx, state)
  gradients = jax.jit(jax.grad(case.loss, argnums=(0, 1)))(case.params, x, ctx)
  with route(every='naive'):
    naive = jax.jit(lambda *a: case.whole(*a))(case.params, x, ctx, state)
    naive_gradients = jax.jit(jax.grad(lambda *a: case.loss(*a), argnums=(0, 1)))(case.params, x, ctx)
  close(fast, naive, 1e-5)
  close(gradients, naive_gradients, 1e-4, 'gradient ')


@decoding
@pytest.mark.parametrize('prefill', [0, 1, 17, LENGTH])
def test_sequence_equals_prefill_and_steps(name, prefill):
  case, x = layer(name), inputs()
  whole, final = case.call(case.params, x, Context(), case.init_state(BATCH, LENGTH))
  close(case.call(case.params, x)[0], whole, 1e-5, 'with and without a state ')
  state, ys = case.init_state(BATCH, LENGTH), []
  if prefill:
    y, state = case.call(case.params, x[:, :prefill], Context(), state)
    ys.append(y)
  for t in range(prefill, LENGTH):
    y, state = case.step(case.params, x[:, t], state)
    ys.append(y[:, None])
  close(jnp.concatenate(ys, axis=1), whole, 1e-5)
  close(state, final, 1e-5, 'state')


@decoding
def test_sequence_equals_two_parts(name):
  case, x = layer(name), inputs()
  ctx = Context(segments_BT=segments(3, 12, 5))
  whole, final = case.call(case.params, x, ctx, case.init_state(BATCH, LENGTH))
  for cut in (2, 17):
    parts = [Context(segments_BT=s) for s in (ctx.segments_BT[:, :cut], ctx.segments_BT[:, cut:])]
    first, state = case.call(case.params, x[:, :cut], parts[0], case.init_state(BATCH, LENGTH))
    second, state = case.call(case.params, x[:, cut:], parts[1], state)
    close(jnp.concatenate([first, second], axis=1), whole, 1e-5, f'cut at {cut} ')
    close(state, final, 1e-5, f'state, cut at {cut} ')


@decoding
def test_no_output_depends_on_a_later_input(name):
  case, x = layer(name), inputs()
  sums = jax.jit(jax.jacrev(lambda x: jnp.sum(jnp.sin(case.whole(case.params, x)[0]), axis=(0, 2))))(x)   # [T, B, T, D]
  influence = np.abs(np.asarray(sums)).sum(axis=(1, 3))
  assert np.all(np.triu(influence, 1) == 0)
  assert np.all(np.diag(influence) > 0)


@every
def test_packed_documents_equal_separate_ones(name):
  case, x = layer(name), inputs()
  packed = case.call(case.params, x, Context(segments_BT=segments(9, 1, 10)))[0]
  apart = [case.call(case.params, part)[0] for part in (x[:, :9], x[:, 9:10], x[:, 10:])]
  close(packed, jnp.concatenate(apart, axis=1), 1e-5)


@every
def test_sharded_equals_unsharded(name):
  case = layer(name)
  if LAYERS[name].tag == 'Attention' and 'heads:4->3' in name:
    case = Case(Alone(layer=LAYERS[name].replace(heads=4, kv_heads=4)))
  x, ctx = inputs(), Context(segments_BT=segments(12, 8))
  value, gradients = jax.jit(jax.value_and_grad(case.loss))(case.params, x, ctx)
  devices = make_mesh(MESH)
  params = jax.device_put(case.params, case.definition.shardings(devices, MESH.rules))
  with use_mesh(devices, MESH.rules):
    x = jax.device_put(x, batch_sharding(devices, MESH.rules))
    sharded = jax.jit(jax.value_and_grad(lambda *a: case.loss(*a)))(params, x, ctx)
  close(sharded, (value, gradients), 1e-4)


@every
def test_divided_in_time_equals_whole(name):
  """Outputs, the final state and all gradients, from a state that has seen tokens, with documents that begin inside and at the
  border of shards."""
  case, x, ctx = layer(name), inputs(), Context(segments_BT=segments(7, 8, 5))
  state = None
  if name in DECODING and LAYERS[name].tag != 'Attention':   # a cache is not divided in time
    state = case.call(case.params, x[:, ::-1], Context(), case.init_state(BATCH, LENGTH))[1]

  def scored(params, x, state):
    def score(params, x, state):
      y, after = case.whole(params, x, ctx, state)
      numbers = [s for s in jax.tree.leaves(after) if jnp.issubdtype(s.dtype, jnp.floating)]
      return jnp.sum(jnp.sin(y) * (1 + jnp.arange(LENGTH))[None, :, None]) + sum(jnp.sum(jnp.sin(s)) for s in numbers), (y, after)
    return jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True)(params, x, state)

  whole = jax.jit(scored)(case.params, x, state)
  devices = make_mesh(IN_TIME)
  with use_mesh(devices, IN_TIME.rules):
    params = jax.device_put(case.params, case.definition.shardings(devices, IN_TIME.rules))
    divided = jax.jit(lambda *a: scored(*a))(params, jax.device_put(x, batch_sharding(devices, IN_TIME.rules)), state)
  close(divided, whole, 1e-4)


@every
def test_bfloat16_gradients_are_finite_and_near(name):
  case, x = layer(name), inputs()
  low = case.definition.cast(case.params, jnp.bfloat16)
  y = case.call(low, x.astype(jnp.bfloat16))[0]
  assert y.dtype == jnp.bfloat16
  close(y, case.call(case.params, x)[0], 0.05, 'bfloat16 ')
  for name_, g in jax.jit(jax.grad(case.loss))(low, x.astype(jnp.bfloat16)).items():
    assert np.all(np.isfinite(np.asarray(g, np.float32))), name_


@decoding
def test_state_is_as_declared(name):
  case = layer(name)
  before = jax.eval_shape(lambda: case.init_state(1, LENGTH))
  numbers = sum(s.size for s in jax.tree.leaves(before) if jnp.issubdtype(s.dtype, jnp.floating))
  assert numbers == LAYERS[name].state_size(WIDTH, LENGTH)
  x = jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.float32)
  after = jax.eval_shape(case.whole, case.params, x, Context(), before)[1]
  assert after == before


@every
def test_config_survives_json(name):
  from jaxformer import config
  assert config.from_json(config.to_json(LAYERS[name])) == LAYERS[name]


# Of a state that is not known to be fresh, `test_sequence_equals_two_parts` has the general case; attention reads it another way.
@pytest.mark.parametrize(('name', 'fresh'), [
  (n, fresh) for n in DECODING for fresh in (False, True) if fresh or DECODING[n].tag == 'Attention'])
def test_padding_before_a_document_leaves_no_trace(name, fresh):
  """How prompts of unequal lengths are read: padding is a document of its own, and the next one starts anew, in its state too."""
  case, x, pad = layer(name), inputs(), 5
  segments_BT = jnp.broadcast_to((jnp.arange(LENGTH) >= pad).astype(jnp.int32), (BATCH, LENGTH))
  ctx = Context(segments_BT=segments_BT, fresh=fresh)
  padded_y, padded_state = case.call(case.params, x, ctx, case.init_state(BATCH, LENGTH + 3))
  y, state = case.call(case.params, x[:, pad:], Context(), case.init_state(BATCH, LENGTH + 3))
  close(padded_y[:, pad:], y, 1e-5)
  for i in range(3):
    padded_y, padded_state = case.step(case.params, x[:, i], padded_state)
    y, state = case.step(case.params, x[:, i], state)
    close(padded_y, y, 1e-5)
