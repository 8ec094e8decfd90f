"""Jamba (Lieber et al. 2024) and, of the same architecture, Jamba 1.5 (Jamba Team 2024): Mamba
layers with norms over dt, B and C, one attention layer in eight, and sixteen experts, two per
token, in place of every second feed-forward layer. Pre-norm RMSNorm, SwiGLU, no positions: the
Mamba layers encode them."""

import math
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import SoftmaxTopK
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


def jamba(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  experts: int = 16,
  k: int = 2,
  d_state: int = 16,
  attention_every: int = 8,
  attention_first: int = 4,
  **fields: Any,
) -> LanguageModel.Config:
  """The Jamba architecture. Of each `attention_every` layers, counted from 0, the one at
  `attention_first` attends; every second one has experts. The pattern is the shortest that
  repeats. `fields` of the config: `vocab_size`, `context_length`."""
  norm = RMSNorm(eps=1e-6)
  attention = Attention.Config(heads=heads, kv_heads=kv_heads)
  mamba = Mamba.Config(d_state=d_state, inner_norm=norm)
  mlp = GatedMlp.Config(hidden=hidden)
  moe = Moe.Config(experts=experts, expert=mlp, router=SoftmaxTopK(k=k, pooled_balance=0.001))

  blocks = (
    (attention if i % attention_every == attention_first else mamba, moe if i % 2 else mlp)
    for i in range(math.lcm(attention_every, 2))
  )
  return pre_norm_model(width, layers, *blocks, norm=norm, **fields)


preset(
  'jamba-v0.1', 'jamba', jamba(4096, 32, 14336, 32, 8, vocab_size=65536, context_length=262144)
)
for size, width, layers, hidden, heads in (
  ('mini', 4096, 32, 14336, 32),
  ('large', 8192, 72, 24576, 64),
):
  preset(
    f'jamba-1.5-{size}',
    'jamba',
    jamba(width, layers, hidden, heads, 8, vocab_size=65536, context_length=262144),
  )
preset('jamba-tiny', 'jamba', jamba(64, 8, 96, 4, 2, experts=4, d_state=8, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return jamba(width, layers, hidden, n, n // 2, experts=4, d_state=8, **sizes)


family('jamba', _grown, width_step=2 * HEAD, layer_step=8, hidden=two_thirds)

step(
  'jamba',
  Chapter.HYBRIDS,
  2024,
  '7 Mamba : 1 attention, experts in every second layer',
  'Mamba and attention in one stack: 256K tokens of context on one accelerator of 80 GB.',
  'Lieber et al. 2024',
)
