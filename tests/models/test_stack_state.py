"""A scanned stack updates its states in place; results are those of the unrolled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS


@pytest.mark.parametrize('name', ['llama3-tiny', 'rwkv4-tiny'])
def test_a_scanned_stack_continues_like_an_unrolled_one(name):
  """Reading, one more token, and the gradient through both."""
  definition = define(PRESETS[name].model)
  params = definition.init(jax.random.key(0))
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)

  def run(params, unroll):
    model, ctx = definition.merge(params), Context(unroll=unroll)
    read = model.hidden(ids[:, :8], ctx.replace(fresh=True), model.init_state(2, 12))
    after = model.step(ids[:, 8], ctx, read.state)
    return jnp.sum(jnp.sin(after.y)), (read.state, after.state, after.y)

  both = [
    jax.jit(jax.value_and_grad(lambda p, u=u: run(p, u), has_aux=True))(params)
    for u in (True, False)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *both)


def test_a_scanned_stack_holds_its_state_once():
  """The loop carries the cache, which it neither reads nor writes as a stacked array beside."""
  model = PRESETS['llama3-tiny'].model
  definition = define(model)

  def step(params, token, state):
    return definition.merge(params).step(token, Context(unroll=False), state).state

  state = jax.eval_shape(lambda p: definition.merge(p).init_state(2, 4096), definition.abstract())
  token = jax.ShapeDtypeStruct((2,), jnp.int32)
  compiled = jax.jit(step, donate_argnums=2).lower(definition.abstract(), token, state).compile()
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  memory = compiled.memory_analysis()
  assert memory is not None
  assert memory.alias_size_in_bytes >= cache
  assert memory.temp_size_in_bytes < cache / 2
