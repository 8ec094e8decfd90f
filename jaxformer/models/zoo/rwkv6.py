"""RWKV-6 "Finch" (Peng et al. 2024): the World models. RWKV-5's blocks; at width 4096 the low-rank
projections have twice the rank."""

from __future__ import annotations

import functools

from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import HEAD, family, preset
from jaxformer.models.zoo.rwkv5 import hidden_size, world


def rwkv6(
  width: int,
  layers: int,
  ranks: tuple[int, int] = (32, 64),
  *,
  context_length: int = 4096,
  vocab_size: int = 65536,
  hidden: int | None = None,
  head_dim: int = 64,
) -> LanguageModel.Config:
  """The RWKV-6 architecture. `ranks` are those of the mixing of tokens and of the decay."""
  mix, decay = ranks
  time, channels = (
    TimeMix6.Config(head_dim=head_dim, mix_rank=mix, decay_rank=decay),
    ChannelMix.Config(version=6, hidden=hidden or hidden_size(width)),
  )
  return world(width, layers, time, channels, context_length, vocab_size)


for name, width, layers, ranks in (
  ('rwkv6-1.6b', 2048, 24, (32, 64)),
  ('rwkv6-3b', 2560, 32, (32, 64)),
  ('rwkv6-7b', 4096, 32, (64, 128)),
  ('rwkv6-14b', 4096, 61, (64, 128)),
):
  preset(name, 'rwkv6', rwkv6(width, layers, ranks))
preset(
  'rwkv6-tiny', 'rwkv6', rwkv6(128, 4, (8, 16), context_length=256, vocab_size=264, head_dim=32)
)
family(
  'rwkv6',
  functools.partial(rwkv6, ranks=(8, 16), head_dim=HEAD),
  width_step=HEAD,
  hidden=hidden_size,
)
