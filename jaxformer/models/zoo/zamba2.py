"""Zamba2 (Glorioso et al. 2024): blocks of Mamba-2, and one or two transformer blocks whose weights
are used at several depths in turn, with an adapter of low rank at each. A shared block reads the
stream and the embeddings side by side, has no residual sums of its own, and what it makes, times a
matrix of that depth, is added to the input of a Mamba-2 layer."""

import math
from collections.abc import Collection
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp, LinearMap
from jaxformer.layers.norm import NormConfig, RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.shared import Shared
from jaxformer.layers.stack_input import WithStackInput
from jaxformer.models.block import (
  Block,
  BlockLayer,
  BranchConfig,
  NormOnly,
  Plain,
  Residual,
  pre_norm,
)
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, four_times, heads_for, preset
from jaxformer.models.zoo.story import Chapter, step

FIRST, SECOND = 'layer.block.branches.0.layer', 'layer.block.branches.1.layer'
ON_ATTENTION = tuple(f'{FIRST}.{projection}' for projection in 'qkv')
ON_MLP = (f'{SECOND}.gate+up',)

NORM, INIT = RMSNorm(), Normal()


def _in_turn(*branches: BranchConfig) -> BlockLayer.Config:
  return BlockLayer.Config(block=Block.Config(branches=branches))


def shared_block(
  width: int, attention: Attention.Config, mlp: LayerConfig, norm: NormConfig, **fields: Any
) -> Shared.Config:
  """The shared transformer block; `fields` of the config: `name`, `rank`, `adapted`, `init`."""
  transformer = _in_turn(
    NormOnly(layer=attention.replace(out_size=width), norm=norm), NormOnly(layer=mlp, norm=norm)
  )
  return Shared.Config(layer=WithStackInput.Config(layer=transformer), **fields)


def hybrid(
  shared: Shared.Config, mamba: Mamba2.Config, norm: NormConfig, init: Init
) -> Block.Config:
  """x + mamba(norm(x + shared([x, e]) W))."""
  added = _in_turn(Plain(layer=shared), Plain(layer=LinearMap.Config(init=init)))
  layer = _in_turn(Residual(layer=added), NormOnly(layer=mamba, norm=norm))
  return Block.Config(branches=(Residual(layer=layer),))


def zamba2(
  width: int,
  layers: int,
  hybrids: Collection[int],
  *,
  attention: Attention.Config,
  mlp: GatedMlp.Config,
  mamba: Mamba2.Config,
  shared: int = 1,
  rank: int = 128,
  adapted_attention: bool = False,
  norm: NormConfig = NORM,
  init: Init = INIT,
  **fields: Any,
) -> LanguageModel.Config:
  """The architecture.

  Args:
    hybrids: indices of the blocks with a shared transformer block.
    attention, mlp: the layers of the shared blocks (`attention_of`).
    mamba: the layer of every block.
    shared: number of shared transformer blocks, in turn.
    rank: of the adapters.
    adapted_attention: whether attention has adapters too, beside the feed-forward layer.
    init: of embeddings, adapters and the matrices after the shared blocks.
    fields: of the config: `vocab_size`, `context_length`.
  """
  adapted = ON_ATTENTION + ON_MLP if adapted_attention else ON_MLP
  blocks = [
    shared_block(
      width, attention, mlp, norm, name=f'transformer{i}', rank=rank, adapted=adapted, init=init
    )
    for i in range(shared)
  ]
  at = {layer: blocks[i % shared] for i, layer in enumerate(sorted(hybrids))}
  stack = [
    hybrid(at[i], mamba, norm, init) if i in at else pre_norm(norm, mamba) for i in range(layers)
  ]
  return LanguageModel.Config(
    width=width, stack=grouped(stack), final_norm=norm, tied=True, embedding_init=init, **fields
  )


def attention_of(width: int, heads: int, **fields: Any) -> Attention.Config:
  """Attention whose heads have twice the width together, with the scale of half a head."""
  return Attention.Config(heads=heads, scale=1 / math.sqrt(width / heads), **fields)


# The step sizes are at least this in transformers; the authors' code has no limit.
DT_MIN = 1e-3
PUBLISHED = 6, 12, 18, 24, 30, 36, 42, 47, 51  # the blocks with a shared one, of 54

preset(
  'zamba2-2.7b',
  'zamba2',
  zamba2(
    2560,
    54,
    PUBLISHED,
    attention=attention_of(2560, 32),
    mlp=GatedMlp.Config(hidden=10240, activation='gelu'),
    mamba=Mamba2.Config(d_state=64, heads=80, head_dim=64, dt_min=DT_MIN),
    shared=2,
    vocab_size=32000,
    context_length=4096,
  ),
)


def _small(
  width: int, layers: int, hidden: int, heads: int, rank: int, **fields: Any
) -> LanguageModel.Config:
  """Two shared blocks, at the end of every three blocks."""
  mamba = Mamba2.Config(d_state=32, heads=width // 16, head_dim=32, dt_min=DT_MIN)
  return zamba2(
    width,
    layers,
    range(2, layers, 3),
    attention=attention_of(width, heads, position=Rotary()),
    mlp=GatedMlp.Config(hidden=hidden, activation='gelu'),
    mamba=mamba,
    shared=2,
    rank=rank,
    **fields,
  )


preset('zamba2-tiny', 'zamba2', _small(64, 6, 256, 4, 8, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return _small(width, layers, hidden, heads_for(width), width // 16, **sizes)


family('zamba2', _grown, width_step=HEAD, layer_step=6, fewest_layers=6, hidden=four_times)

step(
  'zamba2',
  Chapter.HYBRIDS,
  2024,
  'y = x + mamba(norm(x + T([x, e]; W + A_l B_l) W_l)), one or two T for all depths l',
  'One transformer block serves many depths, each with a small adapter; it sees the embeddings '
  'again.',
  'Glorioso et al. 2024',
)
