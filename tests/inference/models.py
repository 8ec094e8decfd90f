"""Models small enough to run a hundred times, and the plainest way to decode."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.position import Alibi, Rotary, SinusoidalPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.models.zoo import PRESETS

VOCAB = 32


def tiny(
  *, position=None, window=None, repeats=2, positions=None, context_length=64, kv_heads=None
):
  layers = (
    Attention.Config(heads=4, kv_heads=kv_heads, position=position, window=window),
    Mlp.Config(hidden=64),
  )
  block = Block.Config(branches=tuple(PreNorm(layer=layer) for layer in layers))
  stack = (Group(pattern=(block,), repeats=repeats),)
  return LanguageModel.Config(
    vocab_size=VOCAB, width=32, context_length=context_length, stack=stack, positions=positions
  )


CONFIGS = {
  'gpt2-tiny': PRESETS['gpt2-tiny'].model,
  'llama3-tiny': PRESETS['llama3-tiny'].model,
  'window': tiny(position=Rotary(), window=5, repeats=1),
  'grouped': tiny(position=Rotary(), kv_heads=2),
  'alibi': tiny(position=Alibi(), repeats=1),
  'sinusoidal': tiny(positions=SinusoidalPositions.Config(), repeats=1),
}


@functools.cache
def model(name: str):
  """A definition, and parameters large enough that the most likely token is not always the same."""
  definition = define(CONFIGS[name])
  params = definition.init(jax.random.key(1))
  return definition, {k: 4 * v if v.ndim > 1 else v for k, v in params.items()}


@functools.cache
def _forward(definition):
  return jax.jit(lambda params, tokens_BT: definition.merge(params)(tokens_BT).y)


def greedy(definition, params, prompt, count, length=64):
  """argmax of a forward pass over the whole sequence, token by token; the padding is behind, where
  causality hides it."""
  tokens = list(prompt)
  for _ in range(count):
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    tokens.append(int(_forward(definition)(params, padded)[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]
