"""RetNet (Sun et al. 2023): retention and SwiGLU in pre-norm RMSNorm blocks, untied head, in the
sizes of the flash-linear-attention library, by which later papers compare it."""

from typing import Any

from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.retention import Retention
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-6)


def retnet(
  width: int, layers: int, hidden: int, heads: int, *, context_length: int = 2048, **fields: Any
) -> LanguageModel.Config:
  """The RetNet architecture; `fields` of the config: `vocab_size`."""
  block = Retention.Config(heads=heads, norm=NORM), GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=NORM, context_length=context_length, **fields)


preset('retnet-1.3b', 'retnet', retnet(2048, 24, 2816, 8, vocab_size=32000))
preset('retnet-tiny', 'retnet', retnet(128, 4, 176, 4, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return retnet(width, layers, hidden, heads_for(width), **sizes)


# The feed-forward layer has half the parameters of the usual one, as values are twice as wide.
family('retnet', _grown, width_step=HEAD, hidden=lambda width: round(width / 6) * 8)

step(
  'retnet',
  Chapter.LINEAR_ATTENTION,
  2023,
  "S_t = g_h S_{t-1} + k_t' v_t, o_t = q_t S_t",
  'A fixed decay per head in place of the softmax: parallel, recurrent and in chunks.',
  'Sun et al. 2023',
)
