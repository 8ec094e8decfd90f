"""Granite 4 H (IBM 2025): Mamba-2 layers, one attention layer in ten without positions, and SwiGLU
or a mixture of experts with a shared one. Constant factors on the embeddings, on every residual
branch, on the logits of attention and on those of the model."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

RESIDUAL = 0.22  # the factor on every branch
INIT = Normal(std=0.1)


def granite4(
  width: int,
  layout: str,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  mamba: Mamba2.Config,
  experts: int = 0,
  k: int = 0,
  expert_hidden: int = 0,
  attention_scale: float,
  embedding_scale: float = 12.0,
  logit_scale: float,
  init: Init = INIT,
  **fields: Any,
) -> LanguageModel.Config:
  """The Granite 4 H architecture. `layout` has a letter for each block, from the bottom up: M for
  Mamba-2, * for attention. `hidden` units of the feed-forward layer, beside `experts` of which each
  token uses `k`. `fields` of the config: `vocab_size`, `context_length`."""
  norm = RMSNorm()
  mixers: dict[str, LayerConfig] = {
    'M': mamba,
    '*': Attention.Config(
      heads=heads, kv_heads=kv_heads, scale=attention_scale, init=init, out_init=init
    ),
  }
  mlp = GatedMlp.Config(hidden=hidden, init=init, out_init=init)
  router = TopKSoftmax(k=max(k, 2), pooled_balance=0.001, init=init)
  expert = mlp.replace(hidden=expert_hidden or hidden)
  mixture = Moe.Config(experts=experts or 2, expert=expert, router=router, shared=mlp)

  def block(letter: str) -> Block.Config:
    layers = mixers[letter], mixture if experts else mlp
    return Block.Config(
      branches=tuple(PreNorm(layer=layer, norm=norm, scale=RESIDUAL) for layer in layers)
    )

  return LanguageModel.Config(
    width=width,
    stack=grouped([block(letter) for letter in layout]),
    final_norm=norm,
    tied=True,
    embedding_scale=embedding_scale,
    embedding_init=init,
    logit_scale=logit_scale,
    **fields,
  )


_40 = 4 * 'MMMMM*MMMM'
PUBLISHED: dict[str, Any] = {'vocab_size': 100_352, 'context_length': 131_072}

preset(
  'granite-4-h-micro-3b',
  'granite4',
  granite4(
    2048,
    _40,
    8192,
    32,
    8,
    mamba=Mamba2.Config(),
    attention_scale=1 / 64,
    logit_scale=1 / 8,
    **PUBLISHED,
  ),
)
preset(
  'granite-4-h-tiny-7b',
  'granite4',
  granite4(
    1536,
    _40,
    1024,
    12,
    4,
    mamba=Mamba2.Config(),
    experts=64,
    k=6,
    expert_hidden=512,
    attention_scale=1 / 128,
    logit_scale=1 / 6,
    **PUBLISHED,
  ),
)
preset(
  'granite-4-h-small-32b',
  'granite4',
  granite4(
    4096,
    _40,
    1536,
    32,
    8,
    mamba=Mamba2.Config(),
    experts=72,
    k=10,
    expert_hidden=768,
    attention_scale=1 / 128,
    logit_scale=1 / 16,
    **PUBLISHED,
  ),
)


def _small(
  width: int, layout: str, hidden: int, heads: int, d_state: int, **fields: Any
) -> LanguageModel.Config:
  """With the initialization of other families: the published one is for far larger widths."""
  return granite4(
    width,
    layout,
    hidden,
    heads,
    heads // 2,
    mamba=Mamba2.Config(d_state=d_state, head_dim=16),
    attention_scale=heads / width,
    logit_scale=1 / 8,
    init=Normal(),
    **fields,
  )


preset(
  'granite4-tiny',
  'granite4',
  _small(64, 'MM*M', 96, 4, 32, experts=4, k=2, expert_hidden=48, **TINY),
)


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return _small(width, layers // 4 * 'MM*M', hidden, heads_for(width, 2), 64, **sizes)


family('granite4', _grown, width_step=2 * HEAD, layer_step=4, hidden=two_thirds)

step(
  'granite4',
  Chapter.HYBRIDS,
  2025,
  '9 Mamba-2 : 1 attention without positions, experts with a shared one',
  'Fine-grained experts in a hybrid; constant factors on every residual branch.',
  'IBM 2025',
)
