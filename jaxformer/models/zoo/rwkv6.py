"""RWKV-6 "Finch" (Peng et al. 2024): the World models. RWKV-5's blocks; at width 4096 the low-rank
projections have twice the rank."""

import functools
from typing import Any

from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import HEAD, TINY, family, preset
from jaxformer.models.zoo.rwkv5 import hidden_size, world
from jaxformer.models.zoo.story import Chapter, step


def rwkv6(
  width: int, layers: int, ranks: tuple[int, int] = (32, 64), *, head_dim: int = 64, **sizes: Any
) -> LanguageModel.Config:
  """The RWKV-6 architecture. `ranks` are those of the mixing of tokens and of the decay, `sizes`
  those of `world`."""
  time = TimeMix6.Config(head_dim=head_dim, mix_rank=ranks[0], decay_rank=ranks[1])
  return world(width, layers, time, version=6, **sizes)


for name, width, layers, ranks in (
  ('rwkv6-1.6b', 2048, 24, (32, 64)),
  ('rwkv6-3b', 2560, 32, (32, 64)),
  ('rwkv6-7b', 4096, 32, (64, 128)),
  ('rwkv6-14b', 4096, 61, (64, 128)),
):
  preset(name, 'rwkv6', rwkv6(width, layers, ranks))
preset('rwkv6-tiny', 'rwkv6', rwkv6(128, 4, (8, 16), head_dim=HEAD, **TINY))
family(
  'rwkv6',
  functools.partial(rwkv6, ranks=(8, 16), head_dim=HEAD),
  width_step=HEAD,
  hidden=hidden_size,
)

step(
  'rwkv6',
  Chapter.RWKV,
  2024,
  "S_t = diag(w_t) S_{t-1} + k_t' v_t",
  'The decay depends on the data.',
  'Peng et al. 2024',
)
