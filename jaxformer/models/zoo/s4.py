"""State-space models that do not change with time, as language models: S4D (Gu et al. 2022b). Pre-norm blocks of one layer each,
which has its own gate; no feed-forward layer and no positions."""

from __future__ import annotations

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.s4d import S4D
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import preset


def state_space(layer: LayerConfig, width: int, layers: int, *, vocab_size: int, context: int) -> LanguageModel.Config:
  """A stack of state-space layers."""
  norm = LayerNorm.Config()
  block = Block.Config(branches=(PreNorm.Config(layer=layer, norm=norm),))
  return LanguageModel.Config(
    vocab_size=vocab_size, width=width, context=context, tied=True, final_norm=norm,
    stack=(Group(pattern=(block,), repeats=layers),))


preset('s4d-tiny', 's4d', state_space(S4D.Config(), 128, 6, vocab_size=264, context=256))
