"""Linear time-invariant state-space models as language models: LSSL (Gu et al. 2021), S4
(Gu, Goel and Re 2022), S4D (Gu, Gupta, Goel and Re 2022) and S5 (Smith et al. 2023). Pre-norm
blocks of one layer each, which ends in its own gate or projection; no feed-forward layer and
no positions."""

from __future__ import annotations

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lssl import LSSL
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.s4 import S4
from jaxformer.layers.s4d import S4D
from jaxformer.layers.s5 import S5
from jaxformer.layers.state_space import StateSpaceConfig
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import Make, family, preset


def state_space(
  layer: LayerConfig, width: int, layers: int, *, vocab_size: int, context_length: int
) -> LanguageModel.Config:
  """A stack of state-space layers."""
  norm = LayerNorm()
  block = Block.Config(branches=(PreNorm(layer=layer, norm=norm),))
  return LanguageModel.Config(
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    tied=True,
    final_norm=norm,
    stack=(Group(pattern=(block,), repeats=layers),),
  )


preset(
  'lssl-tiny',
  'lssl',
  state_space(LSSL.Config(d_state=32, copies=2), 128, 6, vocab_size=264, context_length=256),
)
preset(
  's4-tiny', 's4', state_space(S4.Config(length=256), 128, 6, vocab_size=264, context_length=256)
)
preset('s4d-tiny', 's4d', state_space(S4D.Config(), 128, 6, vocab_size=264, context_length=256))
preset('s5-tiny', 's5', state_space(S5.Config(), 128, 6, vocab_size=264, context_length=256))


def _grown(layer: StateSpaceConfig) -> Make:
  def make(
    *, width: int, layers: int, hidden: int, vocab_size: int, context_length: int
  ) -> LanguageModel.Config:
    mixer = layer.for_length(context_length)
    return state_space(mixer, width, layers, vocab_size=vocab_size, context_length=context_length)

  return make


for name, layer in (
  ('lssl', LSSL.Config(d_state=32, copies=2)),
  ('s4', S4.Config(length=256)),
  ('s4d', S4D.Config()),
  ('s5', S5.Config()),
):
  family(name, _grown(layer))
