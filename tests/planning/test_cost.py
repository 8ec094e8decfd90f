"""The cost model against closed forms, published figures, and the compiler's own count."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.ops.route import route
from jaxformer.planning.cost import cost, flops_per_token

# They multiply with weights inside a loop over time, of which the compiler counts the body once.
LOOPS = ('lstm', 'gru', 'moe-lstm')
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
def test_forward_flops_equal_the_compilers_count(name, monkeypatch):
  if PRESETS[name].family in LOOPS:
    monkeypatch.setattr(jax.lax, 'scan', functools.partial(jax.lax.scan, unroll=True))
  model = PRESETS[name].model
  definition, B, T = define(model), 2, 64
  with route(every='naive'):
    forward = jax.jit(lambda p, t: definition.merge(p)(t, Context(unroll=True)).y)
    program = forward.lower(definition.abstract(), jax.ShapeDtypeStruct((B, T), jnp.int32))
  counted = program.compile().cost_analysis()['flops'] / (B * T)
  elementwise = 0.06   # the compiler also counts norms, softmax and activations, which weigh much at this width
  assert flops_per_token(model, T, causal=False) / 3 == pytest.approx(counted, rel=elementwise)
