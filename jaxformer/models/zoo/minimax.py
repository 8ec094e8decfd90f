"""MiniMax-Text-01 (MiniMax 2025): seven layers of lightning attention to one of softmax attention,
each followed by 32 experts, two per token. Residual sums start from the normalized stream, with
DeepNorm's factor; half of the channels of softmax attention are rotated."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lightning import LightningAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.block import Block, ResidualOfNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm()


def minimax(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  head_dim: int | None = None,
  experts: int = 32,
  lightning: int = 7,
  **fields: Any,
) -> LanguageModel.Config:
  """The MiniMax-01 architecture, with `lightning` layers of lightning attention to one of softmax
  attention. `fields` of the config: `vocab_size`, `context_length`."""
  factor = (2.0 * layers) ** 0.25
  softmax = Attention.Config(
    heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=Rotary(theta=1e7, fraction=0.5)
  )
  moe = Moe.Config(
    experts=experts,
    expert=GatedMlp.Config(hidden=hidden),
    router=TopKSoftmax(k=2, pooled_balance=0.001),
  )

  def block(mixer: LayerConfig) -> Block.Config:
    branches = (ResidualOfNorm(layer=x, norm=NORM, residual=factor) for x in (mixer, moe))
    return Block.Config(branches=tuple(branches))

  fast = block(LightningAttention.Config(heads=heads, head_dim=head_dim))
  pattern = (fast,) * lightning + (block(softmax),)
  return LanguageModel.Config(
    width=width,
    stack=(Group(pattern=pattern, repeats=layers // len(pattern)),),
    final_norm=NORM,
    **fields,
  )


preset(
  'minimax-text-01',
  'minimax',
  minimax(6144, 80, 9216, 64, 8, head_dim=128, vocab_size=200064, context_length=10_240_000),
)
preset('minimax-tiny', 'minimax', minimax(64, 4, 96, 4, 2, experts=4, lightning=3, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return minimax(width, layers, hidden, n, n // 2, experts=4, lightning=3, **sizes)


family(
  'minimax',
  _grown,
  width_step=2 * HEAD,
  layer_step=4,
  # Two experts per token have the hidden units of one dense layer.
  hidden=lambda width: two_thirds(width) // 2,
)

step(
  'minimax',
  Chapter.HYBRIDS,
  2025,
  formula='7 x lightning attention, S_t = exp(-m_h) S_{t-1} + k_t v_t^T, to 1 x softmax attention',
  change='Seven layers of eight are linear attention, at 456 billion parameters.',
  source='MiniMax 2025',
)
