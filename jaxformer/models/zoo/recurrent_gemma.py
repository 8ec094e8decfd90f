"""RecurrentGemma (Botev et al. 2024), which is Griffin (De et al. 2024): two recurrent blocks with
an RG-LRU, then one of local attention with a single key head and rotary positions on half of each
head; pre-norm RMSNorm with scales about 1, GeGLU with biases, embeddings times the root of the
width, tied head with a soft cap."""

import math
from typing import Any

import ml_dtypes

from jaxformer.layers.attention import Attention
from jaxformer.layers.init import FanInNormal, Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.rg_lru import DepthNormal, RgLru
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-6, unit_offset=True)


def embedding_scale(width: int) -> float:
  """The root of the width, rounded to bfloat16 as in the authors' code."""
  return float(ml_dtypes.bfloat16(math.sqrt(width)))


def recurrent_gemma(
  width: int,
  layers: int,
  heads: int,
  hidden: int,
  *,
  kv_heads: int = 1,
  window: int = 2048,
  recurrent_heads: int | None = None,
  **fields: Any,
) -> LanguageModel.Config:
  """The architecture: of each three layers the last one attends. `recurrent_heads` are the blocks
  of the gates (None: as many as `heads`); `fields` of the config: `vocab_size`,
  `context_length`."""
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    window=window,
    position=Rotary(fraction=0.5),
    out_bias=True,
    init=FanInNormal(),
    out_init=DepthNormal(),
  )
  mlp = GatedMlp.Config(
    hidden=hidden, activation='gelu_tanh', bias=True, init=FanInNormal(), out_init=DepthNormal()
  )
  recurrent = pre_norm(NORM, RgLru.Config(heads=recurrent_heads or heads), mlp)
  periods, rest = divmod(layers, 3)
  stack = (
    Group(pattern=(recurrent, recurrent, pre_norm(NORM, attention, mlp)), repeats=periods),
    *((Group(pattern=(recurrent,), repeats=rest),) if rest else ()),
  )
  return LanguageModel.Config(
    width=width,
    stack=stack if periods else stack[1:],
    final_norm=NORM,
    tied=True,
    softcap=30.0,
    embedding_scale=embedding_scale(width),
    embedding_init=Normal(std=1 / math.sqrt(width)),
    **fields,
  )


for name, width, layers, heads, hidden in (
  ('recurrentgemma-2b', 2560, 26, 10, 7680),
  ('recurrentgemma-9b', 4096, 38, 16, 12288),
):
  sizes: dict[str, Any] = {'vocab_size': 256_000, 'context_length': 8192}
  preset(name, 'recurrentgemma', recurrent_gemma(width, layers, heads, hidden, **sizes))
preset('recurrentgemma-tiny', 'recurrentgemma', recurrent_gemma(96, 5, 3, 256, window=64, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return recurrent_gemma(width, layers, heads_for(width), hidden, **sizes)


family('recurrentgemma', _grown, width_step=HEAD, fewest_layers=3, hidden=two_thirds)
step(
  'recurrentgemma',
  Chapter.GATED,
  2024,
  'h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t), log a_t = -8 softplus(L) * r_t',
  'A gated recurrence that a scan computes, with local attention in every third block: a state of '
  'constant size.',
  'De et al. 2024; Botev et al. 2024',
)
