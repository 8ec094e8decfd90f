"""SmolLM3 (Bakouch et al. 2025): Llama's blocks with a tied embedding, and without rotary positions
in every fourth layer (NoPE; Yang et al. 2025, arXiv:2501.18795)."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
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


def smollm3(
  width: int, layers: int, hidden: int, heads: int, kv_heads: int, *, theta: float, **fields: Any
) -> LanguageModel.Config:
  """The SmolLM3 architecture; `fields` of the config: `vocab_size`, `context_length`."""
  without = Attention.Config(heads=heads, kv_heads=kv_heads)
  attention, mlp = without.replace(position=Rotary(theta=theta)), GatedMlp.Config(hidden=hidden)
  blocks = *[(attention, mlp)] * 3, (without, mlp)
  return pre_norm_model(width, layers, *blocks, norm=RMSNorm(eps=1e-6), tied=True, **fields)


preset(
  'smollm3-3b',
  'smollm3',
  smollm3(2048, 36, 11008, 16, 4, theta=5e6, vocab_size=128256, context_length=65536),
)
preset('smollm3-tiny', 'smollm3', smollm3(128, 4, 352, 4, 2, theta=5e4, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return smollm3(width, layers, hidden, n, n // 2, theta=5e4, **sizes)


family('smollm3', _grown, width_step=2 * HEAD, layer_step=4, hidden=two_thirds)

step(
  'smollm3',
  Chapter.TRANSFORMERS,
  2025,
  'rotary q, k in three of four layers; no positions in the fourth',
  'Layers without positions carry over to contexts longer than those of the training.',
  'Bakouch et al. 2025; Yang et al. 2025',
)
