"""xLSTM as of the 7B model (Beck et al. 2025): pre-norm RMSNorm, mLSTM with a matrix memory in each
head, SwiGLU, no positions, soft caps on the gates and the logits."""

import math
from typing import Any

from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.mlstm import SMALL, MLstm, WangNormal
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import HEAD, TINY, family, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step


def units(width: int, factor: float = 2.667, multiple: int = 64) -> int:
  """Hidden units of the feed-forward layer: `factor` times the width, rounded up."""
  return math.ceil(int(factor * width) / multiple) * multiple


def xlstm(
  width: int, layers: int, heads: int, *, hidden: int | None = None, **fields: Any
) -> LanguageModel.Config:
  """The architecture; `fields` of the config: `vocab_size`, `context_length`."""
  mlp = GatedMlp.Config(hidden=hidden or units(width), init=SMALL, out_init=WangNormal())
  return pre_norm_model(
    width,
    layers,
    (MLstm.Config(heads=heads), mlp),
    norm=RMSNorm(eps=1e-6),
    softcap=30.0,
    embedding_init=Normal(std=math.sqrt(2 / 5 / width)),
    head_init=SMALL,
    **fields,
  )


preset('xlstm-7b', 'xlstm', xlstm(4096, 32, 8, vocab_size=50304, context_length=8192))
preset('xlstm-tiny', 'xlstm', xlstm(128, 4, 2, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  # as few heads as in the published model, of at least 32 key channels
  heads = next(n for n in (8, 4, 2, 1) if width % (2 * HEAD * n) == 0)
  return xlstm(width, layers, heads, hidden=hidden, **sizes)


family('xlstm', _grown, width_step=2 * HEAD, hidden=lambda width: units(width, multiple=8))
step(
  'xlstm',
  Chapter.GATED,
  2024,
  "C_t = f_t C_{t-1} + i_t k_t' v_t, n_t = f_t n_{t-1} + i_t k_t, "
  'h_t = q_t C_t / max(|q_t n_t|, 1)',
  'The memory of the LSTM becomes a matrix, its input gates exponential: 7B parameters without '
  'attention.',
  'Beck et al. 2024 and 2025',
)
