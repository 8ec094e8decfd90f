"""Llama 2 (Touvron et al. 2023) and Llama 3, 3.1, 3.2 (Grattafiori et al. 2024): pre-norm RMSNorm,
rotary positions, SwiGLU, grouped-query attention, no biases."""

import functools
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Llama3Scaling, Rotary
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import (
  HEAD,
  TINY,
  family,
  heads_for,
  pre_norm_model,
  preset,
  two_thirds,
)
from jaxformer.models.zoo.story import Chapter, step


def llama(
  width: int, layers: int, hidden: int, heads: int, kv_heads: int, *, rotary: Rotary, **fields: Any
) -> LanguageModel.Config:
  """The Llama architecture; `fields` of the config: `vocab_size`, `context_length`, `tied`."""
  attention = Attention.Config(heads=heads, kv_heads=kv_heads, position=rotary)
  block = attention, GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(), **fields)


LLAMA2 = Rotary(theta=10_000.0)
LLAMA3 = Rotary(theta=500_000.0)
LLAMA3_1 = Rotary(theta=500_000.0, scaling=Llama3Scaling(factor=8.0))
LLAMA3_2 = Rotary(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))

for name, *sizes in (  # width, layers, hidden, heads, kv_heads
  ('llama2-7b', 4096, 32, 11008, 32, 32),
  ('llama2-13b', 5120, 40, 13824, 40, 40),
  ('llama2-70b', 8192, 80, 28672, 64, 8),
):
  model = llama(*sizes, rotary=LLAMA2, vocab_size=32000, context_length=4096)
  preset(name, 'llama2', model)
preset('llama2-tiny', 'llama2', llama(128, 4, 352, 4, 4, rotary=LLAMA2, **TINY))

for name, rotary, context_length, tied, *sizes in (  # sizes as above
  ('llama3-8b', LLAMA3, 8192, False, 4096, 32, 14336, 32, 8),
  ('llama3-70b', LLAMA3, 8192, False, 8192, 80, 28672, 64, 8),
  ('llama3.1-8b', LLAMA3_1, 131072, False, 4096, 32, 14336, 32, 8),
  ('llama3.1-70b', LLAMA3_1, 131072, False, 8192, 80, 28672, 64, 8),
  ('llama3.1-405b', LLAMA3_1, 131072, False, 16384, 126, 53248, 128, 8),
  ('llama3.2-1b', LLAMA3_2, 131072, True, 2048, 16, 8192, 32, 8),
  ('llama3.2-3b', LLAMA3_2, 131072, True, 3072, 28, 8192, 24, 8),
):
  model = llama(*sizes, rotary=rotary, vocab_size=128256, context_length=context_length, tied=tied)
  preset(name, 'llama3', model)
preset('llama3-tiny', 'llama3', llama(128, 4, 352, 4, 2, rotary=LLAMA3, **TINY))


def _grown(
  rotary: Rotary, queries_per_key: int, *, width: int, layers: int, hidden: int, **sizes: Any
) -> LanguageModel.Config:
  n = heads_for(width, queries_per_key)
  groups = n // queries_per_key if n % queries_per_key == 0 else n
  return llama(width, layers, hidden, n, groups, rotary=rotary, **sizes)


family('llama2', functools.partial(_grown, LLAMA2, 1), width_step=HEAD, hidden=two_thirds)
family('llama3', functools.partial(_grown, LLAMA3, 2), width_step=2 * HEAD, hidden=two_thirds)

step(
  'llama2',
  Chapter.TRANSFORMERS,
  2023,
  'rotary q, k; (silu(x W_g) * x W_u) W_d; RMSNorm',
  'Rotary positions, gated feed-forward layers and RMSNorm become the standard block.',
  'Touvron et al. 2023',
)

step(
  'llama3',
  Chapter.TRANSFORMERS,
  2024,
  'query head h reads key head h // (H / G)',
  'Grouped queries shrink the cache; scaled rotary frequencies lengthen the context.',
  'Grattafiori et al. 2024',
)
