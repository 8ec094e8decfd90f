"""Initial values as the papers and their code give them, and what they lead to: the loss of a model
that knows nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.gpt import gpt
from jaxformer.models.zoo.llama import LLAMA3, llama


@pytest.fixture(scope='module')
def gpt2():
  """GPT-2's depth, a smaller width and vocabulary."""
  return define(gpt(128, 12, 4, context_length=256, vocab_size=2000)).init(jax.random.key(0))


def pieces(params, ending):
  return [np.asarray(p) for n, p in params.items() if n.endswith(ending)]


@pytest.mark.quick
@pytest.mark.parametrize(
  'ending', ['.q.kernel', '.k.kernel', '.v.kernel', '.up.kernel', 'embedder.input.table']
)
def test_gpt2_weights(gpt2, ending):
  """`w_init_stdev=0.02` and `wte` of openai/gpt-2, src/model.py, commit 122c55a."""
  for p in pieces(gpt2, ending):
    n = p.size
    assert abs(p.std() - 0.02) < 0.02 * 5 / math.sqrt(2 * n)  # five standard errors
    assert abs(p.mean()) < 0.02 * 5 / math.sqrt(n)


@pytest.mark.quick
@pytest.mark.parametrize('ending', ['.o.kernel', '.down.kernel'])
def test_gpt2_residual_projections(gpt2, ending):
  """0.02 / sqrt(2 L) = 0.004082 for 12 blocks, in each of them: Radford et al. 2019, section 2.3,
  and `_init_weights` of transformers 5.24.0, modeling_gpt2.py. (The released code of openai/gpt-2,
  which only samples, does not divide.)"""
  (p,) = pieces(gpt2, ending)
  assert p.shape[0] == 12
  assert 0.02 / math.sqrt(24) == pytest.approx(0.004082, abs=1e-6)
  for layer in p:
    assert abs(layer.std() - 0.02 / math.sqrt(24)) < 0.004082 * 5 / math.sqrt(2 * layer.size)


@pytest.mark.quick
def test_gpt2_positions_offsets_and_norms(gpt2):
  """`wpe` 0.01, biases 0, gains 1: openai/gpt-2, src/model.py, commit 122c55a."""
  (table,) = pieces(gpt2, 'embedder.positions.table')
  assert abs(table.std() - 0.01) < 0.01 * 5 / math.sqrt(2 * table.size)
  for ending, value in (
    *((f'.{name}.bias', 0) for name in ('q', 'k', 'v', 'o', 'up', 'down')),
    ('norm.bias', 0),
    ('.scale', 1),
  ):
    found = pieces(gpt2, ending)
    assert found, ending
    assert all((p == value).all() for p in found), ending


@pytest.mark.quick
def test_blocks_are_drawn_independently(gpt2):
  (wq,) = pieces(gpt2, '.q.kernel')
  flat = wq.reshape(12, -1)
  correlation = np.corrcoef(np.concatenate([flat, pieces(gpt2, '.k.kernel')[0].reshape(12, -1)]))
  assert np.abs(correlation - np.eye(24)).max() < 6 / math.sqrt(flat.shape[1])


@pytest.mark.quick
def test_presets_of_any_depth_have_the_right_residual_init():
  """The initialization is told how many branches there are in the whole stack, also where blocks
  alternate, as those of GPT-3, which has that of GPT-2 (Brown et al. 2020, section 2.1)."""
  for name in ('gpt2-tiny', 'gpt3-tiny'):
    params = define(PRESETS[name].model).init(jax.random.key(1))
    for p in pieces(params, '.down.kernel'):
      assert abs(p.std() - 0.02 / math.sqrt(8)) < 0.02 / math.sqrt(8) * 5 / math.sqrt(2 * p.size)


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    (gpt(64, 2, 4, context_length=64, vocab_size=50257), 10.8249),
    (llama(64, 2, 176, 4, 2, context_length=64, vocab_size=32000, rotary=LLAMA3), 10.3735),
    (llama(64, 2, 176, 4, 2, context_length=64, vocab_size=128256, rotary=LLAMA3), 11.7618),
  ],
  ids=['gpt2', 'llama2', 'llama3'],
)
def test_initial_loss_is_that_of_a_guess(config, expected):
  """ln V, up to the variance of the logits: half of 64 x 0.02^2 adds 0.0128 at this width."""
  assert math.log(config.vocab_size) == pytest.approx(expected, abs=1e-4)
  definition = define(config)
  tokens, targets = np.random.default_rng(0).integers(0, config.vocab_size, (2, 4, 64))

  @jax.jit
  def loss(params, tokens, targets):
    logits = definition.merge(params)(tokens).y
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()

  value = float(loss(definition.init(jax.random.key(0)), jnp.asarray(tokens), jnp.asarray(targets)))
  assert value == pytest.approx(expected + 0.0128, abs=0.04)  # 256 tokens, each off by about 0.16
