"""A family around any sequence layer: Llama's blocks (pre-norm RMSNorm, SwiGLU) with the layer in
place of attention."""

from typing import Any

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import HEAD, Family, pre_norm_model, two_thirds


def around(layer: LayerConfig) -> Family:
  """Return a family whose blocks are `layer` and a gated feed-forward layer. Positions, if needed,
  are up to the layer."""

  def make(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
    block = layer, GatedMlp.Config(hidden=hidden)
    return pre_norm_model(width, layers, block, norm=RMSNorm(), **sizes)

  return Family(layer.tag, make, HEAD, 1, two_thirds)
