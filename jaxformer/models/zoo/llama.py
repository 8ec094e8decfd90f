"""Llama 2 (Touvron et al. 2023) and Llama 3, 3.1, 3.2 (Grattafiori et al. 2024): pre-norm RMSNorm,
rotary positions, SwiGLU, grouped-query attention, no biases."""

from __future__ import annotations

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Llama3Scaling, Rotary
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, Make, family, preset, two_thirds


def llama(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  vocab_size: int,
  context_length: int,
  rotary: Rotary,
  tied: bool = False,
) -> LanguageModel.Config:
  """The Llama architecture."""
  norm = RMSNorm()
  attention = Attention.Config(heads=heads, kv_heads=kv_heads, position=rotary)
  mlp = GatedMlp.Config(hidden=hidden)
  block = Block.Config(
    branches=(PreNorm(layer=attention, norm=norm), PreNorm(layer=mlp, norm=norm))
  )
  return LanguageModel.Config(
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    tied=tied,
    final_norm=norm,
    stack=(Group(pattern=(block,), repeats=layers),),
  )


LLAMA2 = Rotary(theta=10_000.0)
LLAMA3 = Rotary(theta=500_000.0)
LLAMA3_1 = Rotary(theta=500_000.0, scaling=Llama3Scaling(factor=8.0))
LLAMA3_2 = Rotary(theta=500_000.0, scaling=Llama3Scaling(factor=32.0))

for name, width, layers, hidden, heads, kv_heads in (
  ('llama2-7b', 4096, 32, 11008, 32, 32),
  ('llama2-13b', 5120, 40, 13824, 40, 40),
  ('llama2-70b', 8192, 80, 28672, 64, 8),
):
  preset(
    name,
    'llama2',
    llama(
      width, layers, hidden, heads, kv_heads, vocab_size=32000, context_length=4096, rotary=LLAMA2
    ),
  )
preset(
  'llama2-tiny',
  'llama2',
  llama(128, 4, 352, 4, 4, vocab_size=264, context_length=256, rotary=LLAMA2),
)

for name, width, layers, hidden, heads, kv_heads, context_length, rotary, tied in (
  ('llama3-8b', 4096, 32, 14336, 32, 8, 8192, LLAMA3, False),
  ('llama3-70b', 8192, 80, 28672, 64, 8, 8192, LLAMA3, False),
  ('llama3.1-8b', 4096, 32, 14336, 32, 8, 131072, LLAMA3_1, False),
  ('llama3.1-70b', 8192, 80, 28672, 64, 8, 131072, LLAMA3_1, False),
  ('llama3.1-405b', 16384, 126, 53248, 128, 8, 131072, LLAMA3_1, False),
  ('llama3.2-1b', 2048, 16, 8192, 32, 8, 131072, LLAMA3_2, True),
  ('llama3.2-3b', 3072, 28, 8192, 24, 8, 131072, LLAMA3_2, True),
):
  preset(
    name,
    'llama3',
    llama(
      width,
      layers,
      hidden,
      heads,
      kv_heads,
      vocab_size=128256,
      context_length=context_length,
      rotary=rotary,
      tied=tied,
    ),
  )
preset(
  'llama3-tiny',
  'llama3',
  llama(128, 4, 352, 4, 2, vocab_size=264, context_length=256, rotary=LLAMA3),
)


def _grown(rotary: Rotary, queries_a_key: int) -> Make:
  def make(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
    heads = width // HEAD
    groups = heads // queries_a_key if heads % queries_a_key == 0 else heads
    return llama(width, layers, hidden, heads, groups, **sizes, rotary=rotary)

  return make


family('llama2', _grown(LLAMA2, 1), width_step=HEAD, hidden=two_thirds)
family('llama3', _grown(LLAMA3, 2), width_step=2 * HEAD, hidden=two_thirds)
