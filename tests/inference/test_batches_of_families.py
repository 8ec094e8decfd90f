"""Every family with weights that were trained a little: unequal prompts in one batch are continued,
and unequal sources translated, as a forward pass over each row alone says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.inference import GREEDY, TokenRules, generate, request, translate
from jaxformer.layers.layer import Context
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.task_type import Batch
from tests.tiers import case

TINY = {n: p.model for n, p in PRESETS.items() if n.endswith('-tiny')}
NAMES = [n for n, config in TINY.items() if isinstance(config, LanguageModel.Config)]
PAIRS = [n for n, config in TINY.items() if isinstance(config, EncoderDecoder.Config)]
TOKENS, LAG, NEW, STEPS = 20, 3, 60, 400
BEGIN, END = TOKENS, TOKENS + 1
LENGTHS = 1, 41, 7, 18


def rows(count, length):
  """Text in which the token LAG back decides: three chains that take turns, each of which
  follows one permutation."""
  numbers = np.random.default_rng(0)
  after = numbers.permutation(TOKENS)
  found = numbers.integers(0, TOKENS, (count, length))
  for t in range(LAG, length):
    found[:, t] = after[found[:, t - LAG]]
  return found.astype(np.int32)


def trained(config):
  definition, tokens = define(config), jnp.asarray(rows(8, 49))
  params, adam = definition.init(jax.random.key(0)), optax.adam(3e-3)
  batch = Batch(tokens[:, :-1], tokens[:, 1:])
  if isinstance(config, EncoderDecoder.Config):  # the second half is the translation of the first
    inputs = tokens[:, 24:-1].at[:, 0].set(BEGIN)
    batch = Batch(inputs, tokens[:, 25:], source_BS=tokens[:, :25])

  @jax.jit
  def step(params, moments):
    def loss(params):
      sums, _ = definition.merge(params).loss(batch, Context(unroll=False))
      return sums.loss / sums.count

    value, gradient = jax.value_and_grad(loss)(params)
    change, moments = adam.update(gradient, moments, params)
    return optax.apply_updates(params, change), moments, value

  moments = adam.init(params)
  for _ in range(STEPS):
    params, moments, value = step(params, moments)
    if value < 0.8 * np.log(TOKENS):  # of tokens that are drawn without a look at those before
      break
  return definition, params


@pytest.mark.parametrize('name', [case(n, standing=n in ('s5-tiny', 'lstm-tiny')) for n in NAMES])
def test_unequal_prompts_are_continued_as_each_row_alone(name):
  definition, params = trained(TINY[name])
  prompts = [row[:n].tolist() for row, n in zip(rows(4, 41)[::-1], LENGTHS, strict=True)]
  found = generate(request(definition, params, prompts, max_new_tokens=NEW, sampling=GREEDY))
  forward = jax.jit(lambda params, tokens_BT: definition.merge(params)(tokens_BT).y)
  for prompt, row in zip(prompts, found, strict=True):
    assert len(row.tokens) == NEW
    text = np.zeros((1, max(LENGTHS) + NEW), np.int32)  # what follows a token does not change it
    text[0, : len(prompt) + NEW] = prompt + row.tokens
    logits = np.asarray(forward(params, text))[0, len(prompt) - 1 : len(prompt) + NEW - 1]
    assert logits.argmax(-1).tolist() == row.tokens
  # a model that always says the same would show nothing
  assert len({t for row in found for t in row.tokens}) > 2
  assert len({tuple(row.tokens[-9:]) for row in found}) > 1


@pytest.mark.parametrize('name', [case(n, standing=False) for n in PAIRS])
def test_unequal_sources_are_translated_as_each_row_alone(name):
  definition, params = trained(TINY[name])
  sources = [row[:n].tolist() for row, n in zip(rows(4, 41)[::-1], LENGTHS, strict=True)]
  rules = TokenRules(never=(END,))
  given = {'begin': BEGIN, 'end': END, 'max_new_tokens': NEW, 'rules': rules}
  found = translate(definition, params, sources, **given)
  forward = jax.jit(lambda params, source, tokens: definition.merge(params)(source, tokens).y)
  for source, row in zip(sources, found, strict=True):
    assert len(row.tokens) == NEW
    read = np.array([[BEGIN, *row.tokens[:-1]]], np.int32)
    logits = np.array(forward(params, np.array([source], np.int32), read))[0]
    logits[:, END] = -np.inf
    assert logits.argmax(-1).tolist() == row.tokens
  # a model that always says the same would show nothing
  assert len({t for row in found for t in row.tokens}) > 2
  assert len({tuple(row.tokens) for row in found}) > 1
