"""Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024): blocks of one pre-norm branch, no
feed-forward, no positions, a residual stream in fp32, tied head."""

import functools
from typing import Any

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import TINY, family, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step


def mamba(
  layer: LayerConfig, width: int, layers: int, *, context_length: int = 2048, **fields: Any
) -> LanguageModel.Config:
  """The architecture of both, around a `Mamba` or a `Mamba2`; `fields` of the config:
  `vocab_size`."""
  return pre_norm_model(
    width,
    layers,
    (layer,),
    norm=RMSNorm(),
    tied=True,
    context_length=context_length,
    residual_dtype='float32',
    **fields,
  )


# The vocabulary of GPT-NeoX, 50277, padded to a multiple of 8 and of 16.
for size, width, layers in (
  ('130m', 768, 24),
  ('370m', 1024, 48),
  ('790m', 1536, 48),
  ('1.4b', 2048, 48),
  ('2.8b', 2560, 64),
):
  preset(f'mamba-{size}', 'mamba', mamba(Mamba.Config(), width, layers, vocab_size=50280))
preset('mamba-tiny', 'mamba', mamba(Mamba.Config(), 128, 4, **TINY))

for size, width, layers in (
  ('130m', 768, 24),
  ('370m', 1024, 48),
  ('780m', 1536, 48),
  ('1.3b', 2048, 48),
  ('2.7b', 2560, 64),
):
  preset(f'mamba2-{size}', 'mamba2', mamba(Mamba2.Config(), width, layers, vocab_size=50288))
preset('mamba2-tiny', 'mamba2', mamba(Mamba2.Config(d_state=64, head_dim=32), 128, 4, **TINY))

family('mamba', functools.partial(mamba, Mamba.Config()))
family('mamba2', functools.partial(mamba, Mamba2.Config(d_state=64, head_dim=16)))

step(
  'mamba',
  Chapter.STATE_SPACES,
  2023,
  'h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t',
  'B, C and the step size depend on the input: the state selects what it keeps.',
  'Gu and Dao 2023',
)

step(
  'mamba2',
  Chapter.STATE_SPACES,
  2024,
  'h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, A one number per head',
  'State-space duality: the scan is masked attention, and runs as matrix products.',
  'Dao and Gu 2024',
)
