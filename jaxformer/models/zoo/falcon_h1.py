"""Falcon-H1 (Zuo et al. 2025): in every block, attention with rotary positions and Mamba-2 side by
side on one input, then SwiGLU. Constant factors on all parts, the multipliers of a muP
parametrization that were tuned for training; they are part of the model, since weights that are as
much larger would be trained otherwise."""

import math
from typing import Any

from jaxformer.config import Config
from jaxformer.layers.attention import Attention
from jaxformer.layers.mamba2 import Mamba2, ProjectionScales
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.parallel import ParallelLayers, Summand
from jaxformer.layers.position import Rotary
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step


class Multipliers(Config):
  """The factors of a model, as they are published; those of Mamba-2's projections are its `scales`.

  Attributes:
    embedding, head: on the embeddings and on the logits.
    attention_in, attention_out, ssm_in, ssm_out: on input and output of the layers.
    key: on the keys.
    gate, down: on two projections of the feed-forward layers.
  """

  embedding: float = 1.0
  head: float = 1.0
  attention_in: float = 1.0
  attention_out: float = 1.0
  key: float = 1.0
  ssm_in: float = 1.0
  ssm_out: float = 1.0
  gate: float = 1.0
  down: float = 1.0


def factor(value: float) -> float | None:
  """A constant factor as a setting: None for 1."""
  return None if value == 1.0 else value


def falcon_h1(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  *,
  mamba: Mamba2.Config,
  multipliers: Multipliers | None = None,
  theta: float = 1e11,
  **fields: Any,
) -> LanguageModel.Config:
  """The Falcon-H1 architecture. `fields` of the config: `vocab_size`, `context_length`."""
  norm, m = RMSNorm(), multipliers or Multipliers()
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    position=Rotary(theta=theta),
    scale=m.key / math.sqrt(head_dim),
  )
  mixer = ParallelLayers.Config(
    summands=(
      Summand(layer=mamba, in_scale=factor(m.ssm_in), out_scale=factor(m.ssm_out)),
      Summand(layer=attention, in_scale=factor(m.attention_in), out_scale=factor(m.attention_out)),
    )
  )
  mlp = GatedMlp.Config(hidden=hidden, gate_scale=factor(m.gate))
  branches = PreNorm(layer=mixer, norm=norm), PreNorm(layer=mlp, norm=norm, scale=factor(m.down))
  return LanguageModel.Config(
    width=width,
    stack=(Group(pattern=(Block.Config(branches=branches),), repeats=layers),),
    final_norm=norm,
    embedding_scale=factor(m.embedding),
    logit_scale=factor(m.head),
    **fields,
  )


preset(
  'falcon-h1-0.5b',
  'falcon-h1',
  falcon_h1(
    1024,
    36,
    2048,
    8,
    2,
    64,
    mamba=Mamba2.Config(
      heads=24,
      norm_eps=None,
      scales=ProjectionScales(
        z=0.3535533905932738, x=0.25, B=0.3535533905932738, C=0.5, dt=0.3535533905932738
      ),
    ),
    multipliers=Multipliers(
      embedding=5.656854249492381,
      head=0.0390625,
      attention_out=0.9375,
      key=0.39062499999999994,
      ssm_in=1.25,
      ssm_out=0.23570226039551587,
      gate=0.8838834764831844,
      down=0.5859375,
    ),
    vocab_size=32784,
    context_length=16384,
  ),
)


def _small(
  width: int, layers: int, hidden: int, heads: int, d_state: int, **fields: Any
) -> LanguageModel.Config:
  """As many channels in Mamba-2 as the width, and no factors: they were tuned for other widths."""
  mamba = Mamba2.Config(d_state=d_state, heads=width // 16, head_dim=16, norm_eps=None)
  return falcon_h1(
    width, layers, hidden, heads, heads // 2, width // heads, mamba=mamba, theta=1e4, **fields
  )


preset('falcon-h1-tiny', 'falcon-h1', _small(64, 4, 160, 4, 32, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return _small(width, layers, hidden, heads_for(width, 2), 64, **sizes)


family('falcon-h1', _grown, width_step=2 * HEAD, hidden=two_thirds)

step(
  'falcon-h1',
  Chapter.HYBRIDS,
  2025,
  'y = b_1 Mamba2(a_1 x) + b_2 attention(a_2 x) in every block',
  'Attention and recurrence side by side on one input, in place of one after the other.',
  'Zuo et al. 2025',
)
