"""Gated linear attention (GLA; Yang et al. 2024): GLA layers and SwiGLU in pre-norm RMSNorm blocks,
untied head."""

from typing import Any

from jaxformer.layers.gla import GatedLinearAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
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

NORM = RMSNorm(eps=1e-6)


def gla(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  *,
  rank: int = 16,
  context_length: int = 2048,
  **fields: Any,
) -> LanguageModel.Config:
  """The GLA architecture; `fields` of the config: `vocab_size`."""
  block = (
    GatedLinearAttention.Config(heads=heads, decay_rank=rank, norm=NORM),
    GatedMlp.Config(hidden=hidden),
  )
  return pre_norm_model(width, layers, block, norm=NORM, context_length=context_length, **fields)


for name, *sizes in (  # width, layers, hidden, heads
  ('gla-340m', 1024, 24, 2816, 4),
  ('gla-7b', 4096, 32, 11008, 16),
):
  preset(name, 'gla', gla(*sizes, vocab_size=32000))
preset('gla-tiny', 'gla', gla(128, 4, 344, 2, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  # Keys have the dimension of the heads of other families, values twice as much.
  return gla(width, layers, hidden, heads_for(width, 2) // 2, **sizes)


family('gla', _grown, width_step=2 * HEAD, hidden=two_thirds)

step(
  'gla',
  Chapter.LINEAR_ATTENTION,
  2023,
  "S_t = diag(a_t) S_{t-1} + k_t' v_t, o_t = q_t S_t",
  'The decay is learned, per channel and from the data.',
  'Yang et al. 2024',
)
