"""The cost model against closed forms, published figures, and counts of what programs compute."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.ops.implementation import implementation
from jaxformer.planning.cost import cost, flops_per_token
from jaxformer.planning.hlo_flops import compiled_flops
from jaxformer.planning.memory import abstract_batch
from tests.planning.traced_flops import traced_flops
from tests.tiers import families

TINY = sorted(
  n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, LanguageModel.Config)
)


@pytest.mark.parametrize('name', ['llama2-7b', 'llama3.1-405b'])
def test_dense_transformer_equals_the_textbook_formula(name):
  model = PRESETS[name].model
  c = cost(model, length=4096)
  layers, heads_dim = sum(g.repeats for g in model.stack), model.width
  matrices = c.params - c.embedding_params - (2 * layers + 1) * model.width  # norms excepted
  assert c.train_flops_per_token == pytest.approx(
    6 * matrices + 6 * layers * heads_dim * (4096 + 1), rel=1e-12
  )
  assert c.train_flops_per_token_full == pytest.approx(
    6 * matrices + 12 * layers * heads_dim * 4096, rel=1e-12
  )


def test_gpt3_training_flops_are_the_published_ones():
  # 3.14e23 FLOPs for 300B tokens (Brown et al. 2020, table D.1), which leaves attention's scores
  # out.
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
  # A recurrence accumulates in fp32; the inputs of its convolution are in the compute dtype.
  assert cost(PRESETS['mamba-2.8b'].model).decode_state_bytes == 64 * 5120 * (4 * 16 + 2 * 3)
  assert cost(PRESETS['rwkv7-2.9b'].model).decode_state_bytes == 32 * (
    4 * 40 * 64 * 64 + 2 * 2 * 2560
  )


@pytest.mark.parametrize('name', families(TINY))
def test_forward_flops_are_those_of_the_plainest_program(name):
  """The architecture of each tiny model, wider, so that what the formula leaves out (norms,
  activations) weighs little; in one batch so large that what is worked out once for all tokens does
  too."""
  model, B, T = PRESETS[name].model.replace(width=1024), 512, 64
  definition = define(model)
  with implementation(every='naive'):
    counted = traced_flops(
      lambda p, t: definition.merge(p)(t, Context(unroll=False)).y,
      definition.abstract(),
      jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
  formula = B * T * flops_per_token(model, T, causal=False) / 3
  assert formula == pytest.approx(counted.total, rel=0.02)
  if not any(layer.mixing_flops_per_token(model.width, T, False) for layer, _ in model.layers()):
    assert formula == counted.products


def outer_products(jaxpr):
  """FLOPs of contractions over one number: the compiler multiplies and does not contract. A
  mixture's plainest program has them where a token's share of a weight's gradient is made."""
  total = 0.0
  for eqn in jaxpr.eqns:
    values = [j for p in eqn.params.values() for j in (p if isinstance(p, tuple) else (p,))]
    inner = [j for j in values if hasattr(j, 'jaxpr') or hasattr(j, 'eqns')]
    rounds = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    total += rounds * sum(outer_products(getattr(j, 'jaxpr', j)) for j in inner)
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      if all(eqn.invars[0].aval.shape[i] == 1 for i in contracted):
        total += 2.0 * eqn.outvars[0].aval.size
  return total


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', families(TINY))
def test_flops_are_those_that_the_compiler_multiplies(name, training):
  """Of the plainest program of every family, forward and training: products in the compiled text,
  with the rounds of their loops, which XLA's own count takes once. What is elementwise (the
  plainest recurrences) the trace counts."""
  model, B, T = PRESETS[name].model.replace(width=1024), 512, 64
  definition = define(model)

  def loss(p, batch):
    return definition.merge(p).loss(batch, Context(unroll=False))[0].loss

  f, arguments = (
    jax.grad(loss) if training else loss,
    (definition.abstract(), abstract_batch(model, B, T)),
  )
  with implementation(every='naive'):
    counted, compiled = (
      traced_flops(f, *arguments),
      compiled_flops(jax.jit(f).lower(*arguments).compile()),
    )
    multiplied = outer_products(jax.make_jaxpr(f)(*arguments).jaxpr)
  assert set(compiled.not_counted) <= {'custom-call'}  # the choice of the largest
  assert compiled.products == pytest.approx(counted.products - multiplied, rel=0.005)
  formula = B * T * flops_per_token(model, T, causal=False) / (1 if training else 3)
  assert formula == pytest.approx(compiled.products + multiplied + counted.elementwise, rel=0.02)


@pytest.mark.parametrize(
  ('name', 'training'),
  [
    *(
      (name, training)
      for name in ('gpt2-tiny', 'llama3-tiny', 'rwkv4-tiny')
      for training in (False, True)
    ),
    ('mixtral-tiny', False),
    ('switch-tiny', False),
  ],
)
def test_the_compilers_own_count(name, training):
  """Where it counts all: unrolled, without loops over time (those of RWKV-4 are elementwise, and
  little), and without the outer products of a mixture's plainest program, each of which it takes
  for one multiplication a number."""
  model, B, T = PRESETS[name].model, 2, 16
  definition = define(model)

  def loss(p, batch):
    return definition.merge(p).loss(batch, Context(unroll=True))[0].loss

  f, arguments = (
    jax.grad(loss) if training else loss,
    (definition.abstract(), abstract_batch(model, B, T)),
  )
  with implementation(every='naive'):
    counted, compiled = traced_flops(f, *arguments), jax.jit(f).lower(*arguments).compile()
  assert counted.total == pytest.approx(compiled.cost_analysis()['flops'], rel=0.02)


def test_traced_flops_by_hand():
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (jnp.maximum(x @ w, 0.0) + x, None), x, length=5)[0].sum()

  shapes = jax.ShapeDtypeStruct((3, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
  assert traced_flops(loop, *shapes) == (5 * 2 * 3 * 8 * 8, 5 * 2 * 24 + 24)
  z = jax.ShapeDtypeStruct((4,), jnp.complex64)
  assert traced_flops(lambda a, b: a * b + b, z, z) == (0, 4 * 6 + 4 * 2)
  with pytest.raises(ValueError, match='FLOPs of while'):
    traced_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), shapes[0])
