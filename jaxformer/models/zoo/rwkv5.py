"""RWKV-5.2 "Eagle" (Peng et al. 2024): the World models. The blocks of RWKV-4, with heads of 64 and
channel mixing of 3.5 D."""

from __future__ import annotations

import functools

from jaxformer.layers.init import Orthogonal, Uniform
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, family, preset


def world(
  width: int,
  layers: int,
  time: LayerConfig,
  channels: LayerConfig,
  context_length: int,
  vocab_size: int,
) -> LanguageModel.Config:
  """The frame that RWKV-5 and 6 share: norms, embedding and head, around one kind of block."""
  norm = LayerNorm()
  block = Block.Config(
    branches=tuple(PreNorm(layer=layer, norm=norm) for layer in (time, channels))
  )
  return LanguageModel.Config(
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    stack=(Group(pattern=(block,), repeats=layers),),
    embedding_norm=norm,
    final_norm=norm,
    embedding_init=Uniform(bound=1e-4),
    head_init=Orthogonal(gain=0.5),
  )


def hidden_size(width: int) -> int:
  """3.5 D, rounded down to a multiple of 32."""
  return 7 * width // 2 // 32 * 32


def rwkv5(
  width: int,
  layers: int,
  *,
  context_length: int = 4096,
  vocab_size: int = 65536,
  hidden: int | None = None,
  head_dim: int = 64,
) -> LanguageModel.Config:
  """The RWKV-5.2 architecture."""
  channels = ChannelMix.Config(version=5, hidden=hidden or hidden_size(width))
  return world(
    width, layers, TimeMix5.Config(head_dim=head_dim), channels, context_length, vocab_size
  )


for name, width, layers in (
  ('rwkv5-0.4b', 1024, 24),
  ('rwkv5-1.5b', 2048, 24),
  ('rwkv5-3b', 2560, 32),
  ('rwkv5-7b', 4096, 32),
):
  preset(name, 'rwkv5', rwkv5(width, layers))
preset('rwkv5-tiny', 'rwkv5', rwkv5(128, 4, context_length=256, vocab_size=264, head_dim=32))
family('rwkv5', functools.partial(rwkv5, head_dim=HEAD), width_step=HEAD, hidden=hidden_size)
