"""Mamba-3 (Lahoti et al. 2026): the blocks of Mamba around another recurrence, and blocks with a
gated feed-forward layer each, as in the paper's models."""

import functools
from typing import Any

from jaxformer.layers.mamba3 import Mamba3
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import TINY, family, pre_norm_model, preset
from jaxformer.models.zoo.story import Chapter, step


def mamba3(
  layer: Mamba3.Config, width: int, layers: int, *, context_length: int = 2048, **fields: Any
) -> LanguageModel.Config:
  """Blocks of one pre-norm branch, no feed-forward, no positions, a residual stream in fp32;
  `fields` of the config: `vocab_size`, `tied`."""
  return pre_norm_model(
    width,
    layers,
    (layer,),
    norm=RMSNorm(),
    context_length=context_length,
    residual_dtype='float32',
    **{'tied': True, **fields},
  )


# The default configuration of flash-linear-attention's `Mamba3Config`; its head is not tied.
preset('mamba3-1.3b', 'mamba3', mamba3(Mamba3.Config(), 2048, 48, vocab_size=32000, tied=False))
preset('mamba3-tiny', 'mamba3', mamba3(Mamba3.Config(d_state=64, head_dim=32), 128, 4, **TINY))
preset(
  'mamba3-mimo-tiny',
  'mamba3-mimo',
  mamba3(Mamba3.Config(d_state=32, head_dim=32, rank=2), 128, 4, **TINY),
)

family('mamba3', functools.partial(mamba3, Mamba3.Config(d_state=64, head_dim=16)))
family('mamba3-mimo', functools.partial(mamba3, Mamba3.Config(d_state=64, head_dim=16, rank=4)))

step(
  'mamba3',
  Chapter.STATE_SPACES,
  2026,
  'h_t = a_t h_{t-1} + (1 - l_t) dt_t a_t B_{t-1} x_{t-1} + l_t dt_t B_t x_t, '
  'a_t = exp(dt_t (A_t - i w_t))',
  'A second-order discretization in place of the convolution, and complex states that track by '
  'rotation.',
  'Lahoti et al. 2026',
)
step(
  'mamba3-mimo',
  Chapter.STATE_SPACES,
  2026,
  'h_t = a_t h_{t-1} + X_t B_t^T, Y_t = h_t C_t with X_t [P, R], B_t and C_t [N, R]',
  'Inputs and outputs of rank R: more computation per number of the state that decoding reads.',
  'Lahoti et al. 2026',
)
