"""H3 (Fu et al. 2023): pre-norm LayerNorm, H3 for token mixing except in two or three layers
of attention, GELU (tanh), biases everywhere, no positions, tied head. Sizes, positions of the
attention layers and a vocabulary padded to a multiple of 8 are those of the published models; 2.7b
is the one with three layers of attention."""

import itertools
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.h3 import H3
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, four_times, heads_for, preset
from jaxformer.models.zoo.story import Chapter, step


def h3(
  width: int,
  layers: int,
  heads: int,
  attention_at: tuple[int, ...],
  *,
  d_state: int = 64,
  head_dim: int = 1,
  hidden: int | None = None,
  vocab_size: int = 50264,
  context_length: int = 2048,
  **fields: Any,
) -> LanguageModel.Config:
  """The H3 architecture; `heads` are those of the layers with attention, counted from 0, `head_dim`
  that of the others, `fields` of the config: `dropout`."""
  norm = LayerNorm()
  mlp = Mlp.Config(hidden=hidden or 4 * width, bias=True, out_init=Normal(residual=True))
  attention = Attention.Config(heads=heads, bias=True, out_init=Normal(residual=True))
  mixer = H3.Config(d_state=d_state, head_dim=head_dim)

  def group(layer: LayerConfig, repeats: int) -> Group:
    return Group(pattern=(pre_norm(norm, layer, mlp),), repeats=repeats)

  runs = itertools.groupby(i in attention_at for i in range(layers))
  return LanguageModel.Config(
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    tied=True,
    final_norm=norm,
    stack=tuple(group(attention if attends else mixer, len(list(run))) for attends, run in runs),
    **fields,
  )


for name, width, layers, heads, attention_at in (
  ('h3-125m', 768, 12, 12, (6,)),
  ('h3-355m', 1024, 24, 16, (8, 16)),
  ('h3-1.3b', 2048, 24, 16, (8, 16)),
  ('h3-2.7b', 2560, 32, 20, (8, 16, 24)),
):
  preset(name, 'h3', h3(width, layers, heads, attention_at, dropout=0.1))
preset('h3-tiny', 'h3', h3(128, 4, 4, (3,), d_state=16, **TINY))


def _grown(*, width: int, layers: int, **sizes: Any) -> LanguageModel.Config:
  # One layer of attention in the middle up to 16 layers, as in the smallest published model, and
  # two in the larger ones.
  attention_at = (layers // 2,) if layers <= 16 else (layers // 3, 2 * layers // 3)
  return h3(width, layers, heads_for(width), attention_at, d_state=16, **sizes)


family('h3', _grown, width_step=HEAD, hidden=four_times)

step(
  'h3',
  Chapter.STATE_SPACES,
  2022,
  'q * SSM_diag(SSM_shift(k) * v)',
  'Multiplications between state spaces recall and compare tokens, as attention does.',
  'Fu et al. 2023',
)
