"""Mixtral (Jiang et al. 2024): Llama's blocks with eight SwiGLU experts, two per token, in place of
each feed-forward layer; no sliding window. The balancing losses' weights are those of the published
configurations, where the loss is one over the tokens of all layers."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import TopKSoftmax
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


def mixtral(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  experts: int = 8,
  k: int = 2,
  theta: float = 1e6,
  balance: float | None,
  **fields: Any,
) -> LanguageModel.Config:
  """The Mixtral architecture; `fields` of the config: `vocab_size`, `context_length`."""
  attention = Attention.Config(heads=heads, kv_heads=kv_heads, position=Rotary(theta=theta))
  moe = Moe.Config(
    experts=experts,
    expert=GatedMlp.Config(hidden=hidden),
    router=TopKSoftmax(k=k, pooled_balance=balance),
  )
  return pre_norm_model(width, layers, (attention, moe), norm=RMSNorm(), **fields)


preset(
  'mixtral-8x7b',
  'mixtral',
  mixtral(4096, 32, 14336, 32, 8, vocab_size=32000, context_length=32768, balance=0.02),
)
preset(
  'mixtral-8x22b',
  'mixtral',
  mixtral(6144, 56, 16384, 48, 8, vocab_size=32000, context_length=65536, balance=0.001),
)
preset('mixtral-tiny', 'mixtral', mixtral(128, 4, 176, 4, 2, balance=0.02, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return mixtral(width, layers, hidden, n, n // 2, **sizes, balance=0.02)


# Two experts per token have the hidden units of one dense layer.
family('mixtral', _grown, width_step=2 * HEAD, hidden=lambda width: two_thirds(width) // 2)

step(
  'mixtral',
  Chapter.EXPERTS,
  2023,
  'softmax over the top 2 of 8',
  'An open model with 46.7B parameters costs what 12.9B cost.',
  'Jiang et al. 2024',
)
