"""LFM2 (Liquid AI 2025): gated short convolutions, and a few attention layers with rotary positions
and norms of queries and keys, each followed by SwiGLU. Pre-norm RMSNorm, tied head."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.short_convolution import ShortConvolution
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step


def lfm2(
  width: int, layout: str, hidden: int, heads: int, kv_heads: int, **fields: Any
) -> LanguageModel.Config:
  """The LFM2 architecture. `layout` has a letter for each block, from the bottom up: c for a
  convolution, a for attention. `fields` of the config: `vocab_size`, `context_length`."""
  norm = RMSNorm()
  mixers: dict[str, LayerConfig] = {
    'c': ShortConvolution.Config(),
    'a': Attention.Config(heads=heads, kv_heads=kv_heads, position=Rotary(theta=1e6), qk_norm=norm),
  }
  blocks = [pre_norm(norm, mixers[letter], GatedMlp.Config(hidden=hidden)) for letter in layout]
  return LanguageModel.Config(
    width=width, stack=grouped(blocks), final_norm=norm, tied=True, **fields
  )


# Two thirds of 6,656, 10,240 and 12,288 hidden units, in multiples of 256.
for size, width, hidden, heads in (
  ('350m', 1024, 4608, 16),
  ('700m', 1536, 6912, 24),
  ('1.2b', 2048, 8192, 32),
):
  preset(
    f'lfm2-{size}',
    'lfm2',
    lfm2(
      width, 3 * 'cca' + 3 * 'ca' + 'c', hidden, heads, 8, vocab_size=65536, context_length=128_000
    ),
  )
preset('lfm2-tiny', 'lfm2', lfm2(64, 'ccacac', 176, 4, 2, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return lfm2(width, layers // 3 * 'cca', hidden, n, n // 2, **sizes)


family('lfm2', _grown, width_step=2 * HEAD, layer_step=3, hidden=two_thirds)

step(
  'lfm2',
  Chapter.HYBRIDS,
  2025,
  'y = (c * conv(b * x)) W_o, 10 convolutions : 6 attention',
  'Ten of sixteen layers remember two tokens: for what is near, no recurrence is needed.',
  'Liquid AI 2025',
)
