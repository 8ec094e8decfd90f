"""DeltaNet (Yang et al. 2024), Gated DeltaNet (Yang et al. 2025) and Kimi Delta Attention alone
(Kimi Team 2025): Llama's blocks with the delta rule in place of attention, no positions, untied
head. Sizes are those of the authors' training configurations (flame) and of
flash-linear-attention 0.6 (KDA)."""

import functools
from collections.abc import Callable
from typing import Any

from jaxformer.layers.delta_net import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
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

EPS = 1e-6  # of all norms


def delta_net(
  layer: DeltaNet.Config, width: int, layers: int, hidden: int, **fields: Any
) -> LanguageModel.Config:
  """The architecture of all three, around one of the layers; `fields` of the config: `vocab_size`,
  `context_length`."""
  block = layer.replace(norm_eps=EPS), GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(eps=EPS), **fields)


for name, family_name, layer, *sizes in (  # width, layers, hidden
  ('deltanet-340m', 'deltanet', DeltaNet.Config(heads=8), 1024, 24, 2816),
  ('deltanet-1.3b', 'deltanet', DeltaNet.Config(heads=16), 2048, 24, 5632),
  ('gated-deltanet-340m', 'gated-deltanet', GatedDeltaNet.Config(), 1024, 21, 2816),
  ('gated-deltanet-1.3b', 'gated-deltanet', GatedDeltaNet.Config(), 2048, 21, 5632),
  ('kda-1.3b', 'kda', KimiDeltaAttention.Config(), 2048, 24, 5632),
):
  model = delta_net(layer, *sizes, vocab_size=32000, context_length=2048)
  preset(name, family_name, model)


def delta(width: int) -> DeltaNet.Config:
  """Heads that make up the width."""
  return DeltaNet.Config(heads=heads_for(width))


def gated(width: int) -> GatedDeltaNet.Config:
  """Keys of 3/4 of the width and values of 3/2, so that the layer has the parameters of 6 D^2."""
  heads = heads_for(width)
  return GatedDeltaNet.Config(heads=heads, head_dim=3 * width // heads // 4)


def kimi(width: int) -> KimiDeltaAttention.Config:
  """Heads that make up the width."""
  heads = heads_for(width)
  return KimiDeltaAttention.Config(heads=heads, head_dim=width // heads)


def _grown(
  layer: Callable[[int], DeltaNet.Config], *, width: int, layers: int, hidden: int, **sizes: Any
) -> LanguageModel.Config:
  return delta_net(layer(width), width, layers, hidden, **sizes)


for name, layer_for in (('deltanet', delta), ('gated-deltanet', gated), ('kda', kimi)):
  preset(f'{name}-tiny', name, delta_net(layer_for(128), 128, 4, 352, **TINY))
  family(name, functools.partial(_grown, layer_for), width_step=HEAD, hidden=two_thirds)

step(
  'deltanet',
  Chapter.DELTA_RULE,
  2024,
  "S_t = S_{t-1} - b_t k_t' (k_t S_{t-1}) + b_t k_t' v_t, o_t = q_t S_t",
  'A value replaces what its key held, and chunks of products of Householder matrices train it in '
  'parallel.',
  'Yang et al. 2024',
)
step(
  'gated-deltanet',
  Chapter.DELTA_RULE,
  2024,
  "S_t = a_t (S_{t-1} - b_t k_t' (k_t S_{t-1})) + b_t k_t' v_t",
  'A decay per head clears the memory where replacing single values would be too slow.',
  'Yang et al. 2025',
)
step(
  'kda',
  Chapter.DELTA_RULE,
  2025,
  "S' = diag(a_t) S_{t-1}, S_t = S' - b_t k_t' (k_t S') + b_t k_t' v_t",
  'The decay is one per channel of the key, from the data.',
  'Kimi Team 2025',
)
