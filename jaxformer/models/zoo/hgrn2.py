"""HGRN2 (Qin et al. 2024): HGRN2 layers and SwiGLU in pre-norm RMSNorm blocks, untied head, in the
sizes of the flash-linear-attention library, by which later papers compare it."""

from typing import Any

from jaxformer.layers.hgrn2 import Hgrn2
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


def hgrn2(
  width: int,
  layers: int,
  hidden: int,
  *,
  head_dim: int = 128,
  context_length: int = 2048,
  **fields: Any,
) -> LanguageModel.Config:
  """The HGRN2 architecture; `fields` of the config: `vocab_size`."""
  block = Hgrn2.Config(head_dim=head_dim, norm=NORM), GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=NORM, context_length=context_length, **fields)


preset('hgrn2-340m', 'hgrn2', hgrn2(1024, 24, 2816, vocab_size=32000))
preset('hgrn2-1.3b', 'hgrn2', hgrn2(2048, 24, 5632, vocab_size=32000))
preset('hgrn2-tiny', 'hgrn2', hgrn2(128, 4, 344, head_dim=HEAD, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return hgrn2(width, layers, hidden, head_dim=width // heads_for(width), **sizes)


family('hgrn2', _grown, width_step=HEAD, hidden=two_thirds)

step(
  'hgrn2',
  Chapter.LINEAR_ATTENTION,
  2024,
  formula='S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, f_t >= b_l, which rises with depth l',
  change='Keys are what the forget gates leave over, and higher layers forget more slowly.',
  source='Qin et al. 2024',
)
