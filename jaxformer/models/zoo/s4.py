"""Linear time-invariant state-space models as language models: LSSL (Gu et al. 2021), S4
(Gu, Goel and Re 2022), S4D (Gu, Gupta, Goel and Re 2022) and S5 (Smith et al. 2023). Pre-norm
blocks of one layer each, which ends in its own gate or projection; no feed-forward layer and
no positions."""

import functools
from typing import Any

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lssl import LSSL
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.s4 import S4
from jaxformer.layers.s4d import S4D
from jaxformer.layers.s5 import S5
from jaxformer.layers.state_space import StateSpaceConfig
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import TINY, family, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step


def state_space(layer: LayerConfig, width: int, layers: int, **fields: Any) -> LanguageModel.Config:
  """A stack of state-space layers; `fields` of the config: `vocab_size`, `context_length`."""
  return pre_norm_model(width, layers, (layer,), norm=LayerNorm(), tied=True, **fields)


def _grown(layer: StateSpaceConfig, *, context_length: int, **sizes: Any) -> LanguageModel.Config:
  mixer = layer.for_length(context_length)
  return state_space(mixer, context_length=context_length, **sizes)


for name, layer in (
  ('lssl', LSSL.Config(d_state=32, copies=2)),
  ('s4', S4.Config(length=256)),
  ('s4d', S4D.Config()),
  ('s5', S5.Config()),
):
  preset(f'{name}-tiny', name, state_space(layer, 128, 6, **TINY))
  family(name, functools.partial(_grown, layer))

step(
  'lssl',
  Chapter.STATE_SPACES,
  2021,
  'h_t = A h_{t-1} + B x_t, y_t = C h_t + D x_t',
  'A state space is a recurrence, a convolution and a differential equation at once.',
  'Gu et al. 2021',
)

step(
  's4',
  Chapter.STATE_SPACES,
  2021,
  'A = diagonal + rank one, K = FFT^-1(C (z - A)^-1 B)',
  'Structure in A makes the convolution cheap, and memory reaches over thousands of steps.',
  'Gu, Goel and Re 2022',
)

step(
  's4d',
  Chapter.STATE_SPACES,
  2022,
  'A diagonal: K_t = sum_n C_n A_n^t B_n',
  'A diagonal A does as well, in a few lines.',
  'Gu, Gupta, Goel and Re 2022',
)

step(
  's5',
  Chapter.STATE_SPACES,
  2022,
  'one state for all channels, by an associative scan',
  'Many inputs, many outputs and one scan replace a convolution per channel.',
  'Smith et al. 2023',
)
