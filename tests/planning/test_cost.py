"""The cost model against closed forms, published figures, and counts of what programs compute."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.ops.route import route
from jaxformer.planning.cost import cost, flops_per_token
from jaxformer.planning.flops import traced_flops
from jaxformer.planning.memory import abstract_batch

TINY = sorted(n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, LanguageModel.Config))
pytestmark = pytest.mark.quick


@pytest.mark.parametrize('name', ['llama2-7b', 'llama3.1-405b'])
def test_dense_transformer_equals_the_textbook_formula(name):
  model = PRESETS[name].model
  c = cost(model, length=4096)
  layers, heads_dim = sum(g.repeats for g in model.stack), model.width
  matrices = c.params - c.embedding_params - (2 * layers + 1) * model.width       # norms excepted
  assert c.train_flops_per_token == pytest.approx(6 * matrices + 6 * layers * heads_dim * (4096 + 1), rel=1e-12)
  assert c.train_flops_per_token_full == pytest.approx(6 * matrices + 12 * layers * heads_dim * 4096, rel=1e-12)


def test_gpt3_training_flops_are_the_published_ones():
  # 3.14e23 FLOPs for 300B tokens (Brown et al. 2020, table D.1), which leaves attention's scores out.
  c = cost(PRESETS['gpt3-175b'].model)
  assert 6 * c.params * 300e9 == pytest.approx(3.14e23, rel=0.005)
  assert c.train_flops_per_token * 300e9 == pytest.approx(3.14e23, rel=0.02)


def test_state_bytes():
  llama, c = PRESETS['llama3.1-405b'].model, cost(PRESETS['llama3.1-405b'].model)
  assert c.decode_state_bytes == 2 * 126 * 131072 * 8 * 128 * 2
  assert cost(PRESETS['llama2-7b'].model).decode_state_bytes == 2 * 32 * 4096 * 4096 * 2
  banded = cost(PRESETS['gpt3-175b'].model)
  assert banded.decode_state_bytes == 2 * 48 * (2048 + 256) * 12288 * 2
  assert llama.state_size(100) == 2 * 126 * 100 * 8 * 128


@pytest.mark.parametrize('name', TINY)
def test_forward_flops_are_those_of_the_plainest_program(name):
  """The architecture of each tiny model, wider, so that what the formula leaves out (norms, activations) weighs little; in one
  batch so large that what is worked out once for all tokens does too."""
  model, B, T = PRESETS[name].model.replace(width=1024), 512, 64
  definition = define(model)
  with route(every='naive'):
    counted = traced_flops(
      lambda p, t: definition.merge(p)(t, Context(unroll=False)).y, definition.abstract(), jax.ShapeDtypeStruct((B, T), jnp.int32))
  formula = B * T * flops_per_token(model, T, causal=False) / 3
  assert formula == pytest.approx(counted.total, rel=0.02)
  if not any(layer.mixing_flops_per_token(model.width, T, False) for layer, _ in model.layers()):
    assert formula == counted.products


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['gpt2-tiny', 'gpt3-tiny', 'llama2-tiny', 'llama3-tiny'])
def test_traced_flops_are_the_compilers(name, training):
  """Where there is no loop, whose body the compiler counts once (recurrences), no convolution or Fourier transform, and little that
  it computes twice. The products are those of the formula, to the last one."""
  model = PRESETS[name].model
  definition, shape = define(model), jax.ShapeDtypeStruct((2, 32), jnp.int32)

  def loss(p, batch):
    return definition.merge(p).loss(batch, Context(unroll=True))[0].loss

  f, arguments = jax.grad(loss) if training else loss, (definition.abstract(), abstract_batch(model, *shape.shape))
  with route(every='naive'):
    counted, compiled = traced_flops(f, *arguments), jax.jit(f).lower(*arguments).compile()
  assert counted.total == pytest.approx(compiled.cost_analysis()['flops'], rel=0.02)
  formula = flops_per_token(model, 32, causal=False) * shape.size / (1 if training else 3)
  assert formula == pytest.approx(counted.products, rel=0.002)


def test_traced_flops_by_hand():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (jnp.maximum(x @ w, 0.0) + x, None), x, length=5)[0].sum()
  shapes = jax.ShapeDtypeStruct((3, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
  assert traced_flops(loop, *shapes) == (5 * 2 * 3 * 8 * 8, 5 * 2 * 24 + 24)
  z = jax.ShapeDtypeStruct((4,), jnp.complex64)
  assert traced_flops(lambda a, b: a * b + b, z, z) == (0, 4 * 6 + 4 * 2)
  with pytest.raises(ValueError, match='FLOPs of while'):
    traced_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), shapes[0])
