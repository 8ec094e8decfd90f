"""Nemotron-H (NVIDIA 2025): blocks of one pre-norm branch each, in a published order of Mamba-2,
attention without positions and squared-ReLU feed-forward layers."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, four_times, heads_for, preset
from jaxformer.models.zoo.story import Chapter, step


def nemotron_h(
  width: int,
  layout: str,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  mamba: Mamba2.Config,
  head_dim: int = 128,
  **fields: Any,
) -> LanguageModel.Config:
  """The Nemotron-H architecture. `layout` has a letter for each block, from the bottom up, as
  published: M for Mamba-2, * for attention, - for a feed-forward layer. `fields` of the config:
  `vocab_size`, `context_length`."""
  norm = RMSNorm()
  layers: dict[str, LayerConfig] = {
    'M': mamba,
    '*': Attention.Config(heads=heads, kv_heads=kv_heads, head_dim=head_dim),
    '-': Mlp.Config(hidden=hidden, activation='squared_relu'),
  }
  blocks = [pre_norm(norm, layers[letter]) for letter in layout]
  return LanguageModel.Config(width=width, stack=grouped(blocks), final_norm=norm, **fields)


# The step sizes are at least this in transformers; the authors' code has no limit.
DT_MIN = 1e-3

_PERIOD = 'M-M-M-M-M*-'
_8B = 'M-M-M-M*-' + 3 * _PERIOD + 5 * 'M-'
_56B = 'M-M-M-M*-' + 9 * _PERIOD + 5 * 'M-'
# pruned from the 56B
_47B = (
  'M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-'
  'M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-'
)

for size, width, layout, hidden, heads, mamba_heads, d_state in (
  ('4b', 3072, _8B, 12288, 32, 112, 128),
  ('8b', 4096, _8B, 21504, 32, 128, 128),
  ('47b', 8192, _47B, 30720, 64, 256, 256),
  ('56b', 8192, _56B, 32768, 64, 256, 256),
):
  mamba = Mamba2.Config(d_state=d_state, heads=mamba_heads, groups=8, dt_min=DT_MIN)
  preset(
    f'nemotron-h-{size}',
    'nemotron-h',
    nemotron_h(
      width, layout, hidden, heads, 8, mamba=mamba, vocab_size=131072, context_length=8192
    ),
  )


def _small(
  width: int, layout: str, hidden: int, heads: int, d_state: int, **fields: Any
) -> LanguageModel.Config:
  mamba = Mamba2.Config(d_state=d_state, heads=width // 8, head_dim=16, groups=2, dt_min=DT_MIN)
  return nemotron_h(
    width, layout, hidden, heads, heads // 2, mamba=mamba, head_dim=width // heads, **fields
  )


preset('nemotron-h-tiny', 'nemotron-h', _small(64, 'M-M*-M-', 256, 4, 32, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return _small(width, layers // 5 * 'M-M*-', hidden, heads_for(width, 2), 64, **sizes)


family('nemotron-h', _grown, width_step=2 * HEAD, layer_step=5, hidden=four_times)

step(
  'nemotron-h',
  Chapter.HYBRIDS,
  2025,
  'one layer per block: M-M-M-M*-..., Mamba-2, squared-ReLU MLP, few attention layers',
  'Eight percent of the layers attend, without positions; the order is a string of letters.',
  'NVIDIA 2025',
)
