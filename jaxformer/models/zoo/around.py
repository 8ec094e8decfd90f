"""A family around any sequence layer: Llama's blocks (pre-norm RMSNorm, SwiGLU) with the layer in
place of attention."""

from __future__ import annotations

from typing import Any

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, Family, two_thirds


def around(layer: LayerConfig) -> Family:
  """Return a family whose blocks are `layer` and a gated feed-forward layer. Positions, if needed,
  are up to the layer."""

  def make(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
    norm = RMSNorm()
    block = pre_norm(norm, layer, GatedMlp.Config(hidden=hidden))
    return LanguageModel.Config(
      **sizes, width=width, final_norm=norm, stack=(Group(pattern=(block,), repeats=layers),)
    )

  return Family(layer.tag, make, HEAD, 1, two_thirds)
