"""RWKV-5.2 "Eagle" (Peng et al. 2024): the World models. The blocks of RWKV-4, with heads of 64 and
channel mixing of 3.5 D."""

import functools
from typing import Any

from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, preset
from jaxformer.models.zoo.rwkv4 import LAYER_NORM, rwkv
from jaxformer.models.zoo.story import Chapter, step


def world(
  width: int,
  layers: int,
  time: TimeMix5.Config,
  *,
  version: int = 5,
  hidden: int | None = None,
  context_length: int = 4096,
  vocab_size: int = 65536,
) -> LanguageModel.Config:
  """The World models of RWKV-5 and 6, around their time mixing."""
  channels = ChannelMix.Config(version=version, hidden=hidden or hidden_size(width))
  group = Group(pattern=(pre_norm(LAYER_NORM, time, channels),), repeats=layers)
  return rwkv(width, group, context_length=context_length, vocab_size=vocab_size)


def hidden_size(width: int) -> int:
  """3.5 D, rounded down to a multiple of 32."""
  return 7 * width // 2 // 32 * 32


def rwkv5(width: int, layers: int, *, head_dim: int = 64, **sizes: Any) -> LanguageModel.Config:
  """The RWKV-5.2 architecture; `sizes` are those of `world`."""
  return world(width, layers, TimeMix5.Config(head_dim=head_dim), **sizes)


for name, *sizes in (  # width, layers
  ('rwkv5-0.4b', 1024, 24),
  ('rwkv5-1.5b', 2048, 24),
  ('rwkv5-3b', 2560, 32),
  ('rwkv5-7b', 4096, 32),
):
  preset(name, 'rwkv5', rwkv5(*sizes))
preset('rwkv5-tiny', 'rwkv5', rwkv5(128, 4, head_dim=HEAD, **TINY))
family('rwkv5', functools.partial(rwkv5, head_dim=HEAD), width_step=HEAD, hidden=hidden_size)

step(
  'rwkv5',
  Chapter.RWKV,
  2024,
  "S_t = diag(w) S_{t-1} + k_t' v_t",
  'The state becomes a matrix per head.',
  'Peng et al. 2024',
)
