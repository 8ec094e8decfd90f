"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118) and the text models of Gemma 3 (Gemma Team 2025,
arXiv:2503.19786): norms with factors 1 + w before and after each layer, GELU-gated feed-forward
layers, embeddings times sqrt(D), and windows in most attention layers. Gemma 2 alternates local and
global attention and caps logits; Gemma 3 has five local layers per global one, with rotary bases
apart, and norms of each head's query and key."""

import math
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import LinearScaling, Rotary
from jaxformer.models.block import Block, SandwichNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-6, unit_offset=True)
LOCAL = Rotary(theta=1e4)
GLOBAL = Rotary(theta=1e6)
GLOBAL_4B = GLOBAL.replace(scaling=LinearScaling(factor=8.0))


def _gemma(
  width: int, layers: int, hidden: int, *pattern: Attention.Config, **fields: Any
) -> LanguageModel.Config:
  """A model whose layers attend as `pattern` says, from the bottom up and again."""
  mlp = GatedMlp.Config(hidden=hidden, activation='gelu_tanh')

  def block(attention: Attention.Config) -> Block.Config:
    return Block.Config(
      branches=tuple(SandwichNorm(layer=layer, norm=NORM) for layer in (attention, mlp))
    )

  blocks = [block(attention) for attention in pattern]
  return LanguageModel.Config(
    width=width,
    stack=grouped([blocks[i % len(blocks)] for i in range(layers)]),
    final_norm=NORM,
    embedding_scale=math.sqrt(width),
    tied=True,
    **fields,
  )


def gemma2(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  head_dim: int,
  scale_dim: int,
  window: int = 4096,
  **fields: Any,
) -> LanguageModel.Config:
  """The Gemma 2 architecture, whose logits of attention are divided by sqrt(scale_dim); `fields` of
  the config: `vocab_size`, `context_length`."""
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    head_dim=None if head_dim * heads == width else head_dim,
    position=LOCAL,
    softcap=50.0,
    scale=1.0 / math.sqrt(scale_dim),
  )
  local = attention.replace(window=window)
  return _gemma(width, layers, hidden, local, attention, softcap=30.0, **fields)


def gemma3(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  head_dim: int = 256,
  window: int = 512,
  rotary: Rotary = GLOBAL,
  **fields: Any,
) -> LanguageModel.Config:
  """The Gemma 3 architecture; `rotary` is that of the global layers, `fields` as of `gemma2`."""
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    head_dim=None if head_dim * heads == width else head_dim,
    position=rotary,
    qk_norm=NORM,
    scale=1.0 / math.sqrt(head_dim),
  )
  local = attention.replace(window=window, position=LOCAL)
  return _gemma(width, layers, hidden, *[local] * 5, attention, **fields)


for name, head_dim, scale_dim, *sizes in (  # width, layers, hidden, heads, kv_heads
  ('gemma2-2b', 256, 256, 2304, 26, 9216, 8, 4),
  ('gemma2-9b', 256, 256, 3584, 42, 14336, 16, 8),
  ('gemma2-27b', 128, 144, 4608, 46, 36864, 32, 16),
):
  dims = {'head_dim': head_dim, 'scale_dim': scale_dim}
  model = gemma2(*sizes, **dims, vocab_size=256000, context_length=8192)
  preset(name, 'gemma2', model)
tiny = gemma2(128, 4, 352, 4, 2, head_dim=48, scale_dim=32, window=64, **TINY)
preset('gemma2-tiny', 'gemma2', tiny)

for name, vocab_size, context_length, window, rotary, *sizes in (  # sizes as above
  ('gemma3-270m', 262144, 32768, 512, GLOBAL, 640, 18, 2048, 4, 1),
  ('gemma3-1b', 262144, 32768, 512, GLOBAL, 1152, 26, 6912, 4, 1),
  ('gemma3-4b', 262208, 131072, 1024, GLOBAL_4B, 2560, 34, 10240, 8, 4),
):
  model = gemma3(
    *sizes, window=window, rotary=rotary, vocab_size=vocab_size, context_length=context_length
  )
  preset(name, 'gemma3', model)
preset('gemma3-tiny', 'gemma3', gemma3(96, 6, 256, 4, 1, head_dim=32, window=64, **TINY))


def _grown2(
  *, width: int, layers: int, hidden: int, context_length: int, **sizes: Any
) -> LanguageModel.Config:
  # half of the context, as published
  n, window = heads_for(width, 2), max(1, context_length // 2)
  dims = {'head_dim': width // n, 'scale_dim': width // n, 'window': window}
  return gemma2(width, layers, hidden, n, n // 2, **dims, context_length=context_length, **sizes)


def _grown3(
  *, width: int, layers: int, hidden: int, context_length: int, **sizes: Any
) -> LanguageModel.Config:
  # a larger part of the context than published, which is of thousands
  n, window = heads_for(width, 2), max(1, context_length // 8)
  dims: dict[str, Any] = {'head_dim': width // n, 'window': window}
  return gemma3(width, layers, hidden, n, n // 2, **dims, context_length=context_length, **sizes)


family('gemma2', _grown2, width_step=2 * HEAD, layer_step=2, hidden=two_thirds)
family('gemma3', _grown3, width_step=2 * HEAD, layer_step=6, hidden=two_thirds)

step(
  'gemma2',
  Chapter.TRANSFORMERS,
  2024,
  'x + norm(layer(norm(x))); c tanh(logits / c); a window in every second layer',
  'Norms on both sides and caps keep activations in bounds; local layers halve the cache.',
  'Gemma Team 2024',
)
step(
  'gemma3',
  Chapter.TRANSFORMERS,
  2025,
  'five layers with a window and theta = 10^4, one without and theta = 10^6',
  'Most layers see little: a long context costs the cache of one layer in six.',
  'Gemma Team 2025',
)
