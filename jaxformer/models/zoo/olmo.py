"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656) and OLMo 3 (OLMo Team 2025): Llama's layers with norms
on their outputs, x + norm(f(x)), and norms of queries and keys over all heads. OLMo 3 has a window
in three of four layers; the others' rotary frequencies are scaled for longer contexts."""

from collections.abc import Sequence
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary, YarnScaling
from jaxformer.models.block import Block, NormAfter
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-6)
ROTARY = Rotary(theta=5e5)
LONG = ROTARY.replace(scaling=YarnScaling(factor=8.0, original_context=8192))


def olmo2(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  windows: Sequence[int | None] = (None,),
  rotary: Rotary = ROTARY,
  **fields: Any,
) -> LanguageModel.Config:
  """The OLMo 2 architecture, and with `windows`, of each layer of a period, that of OLMo 3.

  Args:
    rotary: positions of layers without a window.
    fields: of the config: `vocab_size`, `context_length`."""
  attention = Attention.Config(
    heads=heads, kv_heads=kv_heads, position=ROTARY, qk_norm=NORM, qk_norm_over='width'
  )
  mlp = GatedMlp.Config(hidden=hidden)

  def block(window: int | None) -> Block.Config:
    mixer = attention.replace(window=window, position=rotary if window is None else ROTARY)
    return Block.Config(branches=tuple(NormAfter(layer=x, norm=NORM) for x in (mixer, mlp)))

  blocks = [block(windows[i % len(windows)]) for i in range(layers)]
  return LanguageModel.Config(width=width, stack=grouped(blocks), final_norm=NORM, **fields)


def olmo3(*sizes: int, window: int = 4096, **fields: Any) -> LanguageModel.Config:
  """The OLMo 3 architecture; arguments as of `olmo2`."""
  return olmo2(*sizes, windows=(window, window, window, None), **fields)


for name, *sizes in (  # width, layers, hidden, heads, kv_heads
  ('olmo2-1b', 2048, 16, 8192, 16, 16),
  ('olmo2-7b', 4096, 32, 11008, 32, 32),
  ('olmo2-13b', 5120, 40, 13824, 40, 40),
  ('olmo2-32b', 5120, 64, 27648, 40, 8),
):
  preset(name, 'olmo2', olmo2(*sizes, vocab_size=100352, context_length=4096))
preset('olmo2-tiny', 'olmo2', olmo2(128, 4, 352, 4, 4, **TINY))

for name, *sizes in (  # as above
  ('olmo3-7b', 4096, 32, 11008, 32, 32),
  ('olmo3-32b', 5120, 64, 27648, 40, 8),
):
  model = olmo3(*sizes, rotary=LONG, vocab_size=100278, context_length=65536)
  preset(name, 'olmo3', model)
preset('olmo3-tiny', 'olmo3', olmo3(128, 4, 352, 4, 4, window=128, **TINY))


def _grown2(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width)
  return olmo2(width, layers, hidden, n, n, **sizes)


def _grown3(
  *, width: int, layers: int, hidden: int, context_length: int, **sizes: Any
) -> LanguageModel.Config:
  # half of the context, as in the training before the extension
  n, window = heads_for(width), max(1, context_length // 2)
  return olmo3(width, layers, hidden, n, n, window=window, context_length=context_length, **sizes)


family('olmo2', _grown2, width_step=HEAD, hidden=two_thirds)
family('olmo3', _grown3, width_step=HEAD, layer_step=4, hidden=two_thirds)

step(
  'olmo2',
  Chapter.TRANSFORMERS,
  2024,
  'x + norm(layer(x)); softmax(norm(q) norm(k)^T / sqrt(K)) v',
  'Norms move from the inputs of layers to their outputs, and training stays stable.',
  'OLMo Team 2024',
)
step(
  'olmo3',
  Chapter.TRANSFORMERS,
  2025,
  'the same, with windows in three of four layers',
  'Data, code and checkpoints of the whole training are open; windows make long contexts cheap.',
  'OLMo Team 2025',
)
