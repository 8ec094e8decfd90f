"""OLMo Hybrid (Ai2 2025): OLMo 3 with gated DeltaNet in three of four layers, in place of windows.
Blocks with attention have no positions and norms on the outputs of their layers; those with the
delta rule have norms on the inputs. Sizes are those of the configuration in transformers."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import GatedDeltaNet
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import Block, NormAfter, pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step

NORM = RMSNorm(eps=1e-6)
PERIOD = 4  # the last layer of each period attends


def olmo_hybrid(
  width: int, layers: int, hidden: int, heads: int, **fields: Any
) -> LanguageModel.Config:
  """The OLMo Hybrid architecture: keys of 3/4 of the width, values of 3/2; `fields` of the config:
  `vocab_size`, `context_length`."""
  attention = Attention.Config(heads=heads, qk_norm=NORM, qk_norm_over='width')
  delta = GatedDeltaNet.Config(
    heads=heads, head_dim=3 * width // (4 * heads), negative_eigenvalues=True, norm_eps=1e-5
  )
  mlp = GatedMlp.Config(hidden=hidden)
  linear = pre_norm(NORM, delta, mlp)
  full = Block.Config(branches=tuple(NormAfter(layer=x, norm=NORM) for x in (attention, mlp)))
  blocks = [linear if (i + 1) % PERIOD else full for i in range(layers)]
  return LanguageModel.Config(width=width, stack=grouped(blocks), final_norm=NORM, **fields)


preset(
  'olmo-hybrid-7b',
  'olmo-hybrid',
  olmo_hybrid(3840, 32, 11008, 30, vocab_size=100352, context_length=65536),
)
preset('olmo-hybrid-tiny', 'olmo-hybrid', olmo_hybrid(128, 4, 352, 4, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return olmo_hybrid(width, layers, hidden, heads_for(width), **sizes)


family('olmo-hybrid', _grown, width_step=HEAD, layer_step=PERIOD, hidden=two_thirds)

step(
  'olmo-hybrid',
  Chapter.HYBRIDS,
  2025,
  'y = gated delta rule, b_t in (0, 2), or attention without positions, 3 : 1',
  'The delta rule takes the place of windows; its transitions may reflect.',
  'Ai2 2025',
)
