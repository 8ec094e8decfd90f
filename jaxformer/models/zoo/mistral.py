"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) and Mistral Nemo: Llama's blocks; the first
version has a sliding window, Nemo heads that do not make up the width."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import (
  HEAD,
  TINY,
  family,
  heads_for,
  pre_norm_model,
  preset,
  two_thirds,
)
from jaxformer.models.zoo.story import Chapter, step


def mistral(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  theta: float = 1e4,
  window: int | None = None,
  head_dim: int | None = None,
  **fields: Any,
) -> LanguageModel.Config:
  """The Mistral architecture; `fields` of the config: `vocab_size`, `context_length`."""
  attention = Attention.Config(
    heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=Rotary(theta=theta), window=window
  )
  block = attention, GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(), **fields)


SIZES = 4096, 32, 14336, 32, 8
preset(
  'mistral-7b-v0.1', 'mistral', mistral(*SIZES, window=4096, vocab_size=32000, context_length=32768)
)
preset(
  'mistral-7b-v0.3', 'mistral', mistral(*SIZES, theta=1e6, vocab_size=32768, context_length=32768)
)
preset(
  'mistral-nemo-12b',
  'mistral',
  mistral(
    5120, 40, 14336, 32, 8, theta=1e6, head_dim=128, vocab_size=131072, context_length=131072
  ),
)
preset('mistral-tiny', 'mistral', mistral(128, 4, 352, 4, 2, window=128, **TINY))


def _grown(
  *, width: int, layers: int, hidden: int, context_length: int, **sizes: Any
) -> LanguageModel.Config:
  # half of the context, as in the training of the first version
  n, window = heads_for(width, 2), max(1, context_length // 2)
  return mistral(
    width, layers, hidden, n, n // 2, window=window, context_length=context_length, **sizes
  )


family('mistral', _grown, width_step=2 * HEAD, hidden=two_thirds)

step(
  'mistral',
  Chapter.TRANSFORMERS,
  2023,
  'position t attends to t - w + 1, ..., t',
  'A window bounds the cache, and what lies before it is reached through the layers.',
  'Jiang et al. 2023',
)
