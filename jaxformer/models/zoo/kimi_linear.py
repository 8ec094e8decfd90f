"""Kimi Linear (Kimi Team 2025, arXiv 2510.26692): Kimi Delta Attention in three of four layers and
latent attention without positions in the fourth, with the experts of DeepSeek-V3 in all layers but
the first. Pre-norm RMSNorm, no biases.

Sizes are those of the configuration in transformers; the layers with attention are those of copies
of the published file (its default in transformers has six at other depths). The step of the biases
that balance the experts is DeepSeek-V3's."""

import functools
from collections.abc import Collection
from typing import Any

from jaxformer.layers.delta_net import KimiDeltaAttention
from jaxformer.layers.latent_attention import LatentAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import BiasBalanced
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.deepseek import latent
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-5)
PERIOD = 4
ROUTER = functools.partial(BiasBalanced, scale=2.446, bias_rate=0.001 / 2.2e-4)


def kimi_linear(
  width: int,
  layers: int,
  hidden: int,
  delta: KimiDeltaAttention.Config,
  attention: LatentAttention.Config,
  moe: Moe.Config,
  *,
  full: Collection[int],
  **fields: Any,
) -> LanguageModel.Config:
  """The Kimi Linear architecture.

  Args:
    hidden: hidden units of the feed-forward layer of the first layer.
    moe: the feed-forward layer of the others.
    full: the layers with latent attention, counted from 1.
    fields: of the config: `vocab_size`, `context_length`.
  """
  delta = delta.replace(gate_bias=False, norm_eps=NORM.eps)
  attention = attention.replace(position=None)
  blocks = [
    pre_norm(
      NORM, attention if i + 1 in full else delta, moe if i else GatedMlp.Config(hidden=hidden)
    )
    for i in range(layers)
  ]
  return LanguageModel.Config(width=width, stack=grouped(blocks), final_norm=NORM, **fields)


def experts(number: int, k: int, hidden: int) -> Moe.Config:
  """`k` experts per token and a shared one, all with the same hidden units."""
  expert = GatedMlp.Config(hidden=hidden)
  return Moe.Config(experts=number, expert=expert, router=ROUTER(k=k), shared=expert)


preset(
  'kimi-linear-48b-a3b',
  'kimi-linear',
  kimi_linear(
    2304,
    27,
    9216,
    KimiDeltaAttention.Config(heads=32, head_dim=128),
    latent(32, 128, q_rank=None),
    experts(256, 8, 1024),
    full=(4, 8, 12, 16, 20, 24, 27),
    vocab_size=163840,
    context_length=1048576,
  ),
)


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  """Three of sixteen experts per token and a shared one, which together have the hidden units of a
  dense layer."""
  heads = heads_for(width)
  return kimi_linear(
    width,
    layers,
    hidden,
    KimiDeltaAttention.Config(heads=heads, head_dim=width // heads),
    latent(heads, width // heads, q_rank=None),
    experts(16, 3, max(8, hidden // 4)),
    full=range(PERIOD, layers + 1, PERIOD),
    **sizes,
  )


preset('kimi-linear-tiny', 'kimi-linear', _grown(width=64, layers=4, hidden=192, **TINY))
family('kimi-linear', _grown, width_step=HEAD, layer_step=PERIOD, hidden=two_thirds)

step(
  'kimi-linear',
  Chapter.HYBRIDS,
  2025,
  'y = delta rule with a decay per channel, or latent attention without positions, 3 : 1',
  'The decays stand in for positions; one layer in four has a cache, of one latent per token.',
  'Kimi Team 2025',
)
