"""The text models of Llama 4 (Meta 2025): Llama's blocks in periods of four, three that attend
within chunks of 8,192 positions with rotary positions, and one that attends to all positions
without any and scales its queries by position; a mixture of experts, one per token and one shared,
in every block (Scout) or every second (Maverick). The router's weight multiplies an expert's input.
Queries and keys are normalized without parameters in Scout's rotary layers. The weight of the
balancing loss is the default of transformers."""

import math
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Llama3Scaling, LogTemperature, Rotary
from jaxformer.layers.router import SigmoidTopK
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

ROTARY = Rotary(theta=500_000.0, interleaved=True)


def llama4(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  experts: int = 16,
  k: int = 1,
  chunk: int = 8192,
  rotary: Rotary = ROTARY,
  qk_norm: bool = True,
  interval: int = 8192,
  dense_hidden: int | None = None,
  balance: float | None = 0.001,
  **fields: Any,
) -> LanguageModel.Config:
  """The Llama 4 architecture; `fields` of the config: `vocab_size`, `context_length`.

  Args:
    hidden: hidden units of each expert.
    chunk: positions of a chunk.
    interval: positions after which queries grow (`LogTemperature`).
    dense_hidden: those of a feed-forward layer without experts, which every second block from the
      first then has; None for experts in all.
  """
  norm = RMSNorm()
  every = Attention.Config(
    heads=heads, kv_heads=kv_heads, position=LogTemperature(interval=interval)
  )
  local = every.replace(
    chunk=chunk, position=rotary, qk_norm=norm.replace(scale=False) if qk_norm else None
  )
  expert = GatedMlp.Config(hidden=hidden)
  router = SigmoidTopK(k=k, pooled_balance=balance)
  moe = Moe.Config(experts=experts, expert=expert, router=router, weighted='input', shared=expert)
  second = (moe,) if dense_hidden is None else (expert.replace(hidden=dense_hidden), moe)
  first = local, local, local, every
  n = math.lcm(len(first), len(second))
  blocks = ((first[i % len(first)], second[i % len(second)]) for i in range(n))
  return pre_norm_model(width, layers, *blocks, norm=norm, **fields)


# Low and high frequencies meet: longer wavelengths than 8,192 are divided, others kept.
SCOUT = ROTARY.replace(scaling=Llama3Scaling(factor=16.0, low=1.0, high=1.0))
preset(
  'llama4-scout',
  'llama4',
  llama4(5120, 48, 8192, 40, 8, rotary=SCOUT, context_length=10_485_760, vocab_size=202048),
)
preset(
  'llama4-maverick',
  'llama4',
  llama4(
    5120,
    48,
    8192,
    40,
    8,
    experts=128,
    dense_hidden=16384,
    qk_norm=False,
    context_length=1_048_576,
    vocab_size=202048,
  ),
)
preset('llama4-tiny', 'llama4', llama4(64, 4, 64, 4, 2, experts=4, chunk=64, interval=64, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return llama4(width, layers, hidden, n, n // 2, experts=4, chunk=256, interval=256, **sizes)


# The chosen expert and the shared one have the hidden units of one dense layer.
family(
  'llama4', _grown, width_step=2 * HEAD, layer_step=4, hidden=lambda width: two_thirds(width) // 2
)

step(
  'llama4',
  Chapter.EXPERTS,
  2025,
  'expert(sigmoid(score) x) + shared(x); attention within chunks',
  'Chunks bound the cache of three layers in four; the fourth sees everything, without positions.',
  'Meta 2025',
)
