"""xLSTM[7:1] (Beck et al. 2024): for every seven blocks with an mLSTM in an up-projection, one with
an sLSTM before a gated feed-forward layer; pre-norm LayerNorm without biases, no positions.

In the paper's notation xLSTM[a:b] has a mLSTM blocks to b sLSTM blocks."""

import math
from collections.abc import Collection
from typing import Any

from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.mlstm import SMALL, PreUpMLstm, WangNormal
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.slstm import SLstm
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import TINY, family, preset
from jaxformer.models.zoo.story import Chapter, step
from jaxformer.models.zoo.xlstm import units

FACTOR = 1.3  # hidden units of the feed-forward layers per channel of the width, then rounded up


def outputs(width: int, inputs: int) -> WangNormal:
  """N(0, (2 / (depth sqrt(width)))^2) for a projection of `inputs` channels."""
  return WangNormal(gain=2 * math.sqrt(inputs / width))


def xlstm_7_1(
  width: int,
  layers: int,
  slstm_at: Collection[int],
  *,
  heads: int = 4,
  hidden: int | None = None,
  **fields: Any,
) -> LanguageModel.Config:
  """The architecture, with sLSTM blocks at the indices `slstm_at`; `fields` of the config:
  `vocab_size`, `context_length`."""
  norm, hidden = LayerNorm(bias=False), hidden or units(width, FACTOR)
  mlstm = PreUpMLstm.Config(heads=heads, out_init=outputs(width, 2 * width))
  mlp = GatedMlp.Config(
    hidden=hidden, activation='gelu', init=SMALL, out_init=outputs(width, hidden)
  )
  blocks = [
    pre_norm(norm, SLstm.Config(heads=heads), mlp) if i in slstm_at else pre_norm(norm, mlstm)
    for i in range(layers)
  ]
  return LanguageModel.Config(
    width=width,
    stack=grouped(blocks),
    final_norm=norm,
    embedding_init=Normal(std=math.sqrt(2 / 5 / width)),
    head_init=SMALL,
    **fields,
  )


PUBLISHED: dict[str, Any] = {'vocab_size': 50304, 'context_length': 2048}

preset('xlstm-7-1-125m', 'xlstm-7-1', xlstm_7_1(768, 24, (3, 20), **PUBLISHED))
for size, width in (('350m', 1024), ('760m', 1536), ('1.3b', 2048)):
  positions = 3, 5, 7, 40, 42, 44
  preset(f'xlstm-7-1-{size}', 'xlstm-7-1', xlstm_7_1(width, 48, positions, **PUBLISHED))
preset('xlstm-7-1-tiny', 'xlstm-7-1', xlstm_7_1(64, 8, (3,), **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return xlstm_7_1(width, layers, range(3, layers, 8), hidden=hidden, **sizes)


family(
  'xlstm-7-1',
  _grown,
  width_step=4,
  layer_step=8,
  fewest_layers=8,
  hidden=lambda w: units(w, FACTOR, multiple=8),
)
step(
  'xlstm-7-1',
  Chapter.GATED,
  2024,
  'c_t = f_t c_{t-1} + i_t z_t, n_t = f_t n_{t-1} + i_t, h_t = o_t c_t / n_t, '
  'gates of [x_t, h_{t-1}] in every eighth block',
  'Seven blocks with a matrix memory, trained in parallel, to one whose gates see its own output '
  'and which can track states.',
  'Beck et al. 2024',
)
