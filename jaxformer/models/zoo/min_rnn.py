"""minGRU and minLSTM (Feng et al. 2024): pre-norm RMSNorm blocks of a convolution and a recurrence,
and of a feed-forward layer. No sizes were published with their weights."""

import functools
from typing import Any

from jaxformer.layers.min_rnn import MinGru, MinLstm, MinRnnConfig
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import TINY, family, four_times, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step


def min_rnn(
  layer: type[MinRnnConfig], width: int, layers: int, hidden: int, **fields: Any
) -> LanguageModel.Config:
  """The architecture of both, around a `MinGru` or a `MinLstm`; `fields` of the config:
  `vocab_size`, `context_length`."""
  block = layer(hidden=2 * width, d_conv=4), Mlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(), **fields)


for name, layer in (('mingru', MinGru.Config), ('minlstm', MinLstm.Config)):
  preset(f'{name}-tiny', name, min_rnn(layer, 128, 3, 512, **TINY))
  family(name, functools.partial(min_rnn, layer), hidden=four_times)

step(
  'mingru',
  Chapter.GATED,
  2024,
  formula='h_t = (1 - z_t) h_{t-1} + z_t g(x_t W_h), z_t = sigmoid(x_t W_z)',
  change='A GRU whose gates do not read the state is a scan, and trains in parallel.',
  source='Feng et al. 2024',
)
step(
  'minlstm',
  Chapter.GATED,
  2024,
  formula="h_t = f'_t h_{t-1} + i'_t g(x_t W_h), f' + i' = 1, gates of x_t alone",
  change='An LSTM without a cell, whose gates share out the state between old and new.',
  source='Feng et al. 2024',
)
