"""A residual stream in fp32 while layers compute in bf16 (`residual_in_fp32` of state-spaces/mamba,
mamba_ssm/modules/block.py, commit 1878265)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context, Layer, LayerConfig, Output
from jaxformer.layers.mamba import Mamba
from jaxformer.models.params import define
from jaxformer.models.zoo.mamba import mamba

pytestmark = pytest.mark.quick


class Tiny(Layer):
  """y = 2^-9, in the dtype of the input, which must be that of the computations."""

  class Config(LayerConfig):
    def build(self, width, rngs, position):
      return Tiny()

  def __call__(self, x_BTD, ctx, state=None):
    assert x_BTD.dtype == jnp.bfloat16
    return Output(jnp.full_like(x_BTD, 2.0**-9), state)


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('residual', ['compute', 'float32'])
def test_small_branches_add_up_in_fp32_alone(residual, unroll):
  """128 times 2^-9 on a stream of 1: in bf16 each sum is rounded to 1."""
  config = mamba(Tiny.Config(), 4, 128, vocab_size=3).replace(
    residual_dtype=residual, final_norm=None
  )
  definition = define(config)
  params = {n: jnp.ones_like(p) for n, p in definition.init(jax.random.key(0)).items()}
  model = definition.merge(definition.cast(params, jnp.bfloat16))
  y = model.hidden(jnp.zeros((1, 2), jnp.int32), Context(unroll=unroll)).y
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, 1.0 if residual == 'compute' else 1.25)


def test_a_mamba_in_bf16_decodes_as_it_reads():
  """A step gives what the sequence does, and states keep their dtypes."""
  definition = define(mamba(Mamba.Config(d_state=4, expand=1), 32, 3, vocab_size=40))
  params = definition.cast(definition.init(jax.random.key(0)), jnp.bfloat16)
  model, tokens = definition.merge(params), jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
  y, state = model(tokens).y, model.init_state(2, 12)
  first = model(tokens[:, :-1], Context(), state)
  last = model.step(tokens[:, -1], Context(), first.state)
  assert jax.tree.map(lambda a: a.dtype, last.state) == jax.tree.map(lambda a: a.dtype, state)
  np.testing.assert_allclose(last.y, y[:, -1], atol=0.05 * float(jnp.std(y)))
