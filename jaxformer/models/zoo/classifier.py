"""Sequence classifiers of state-space layers that read in both directions: S4D (Gu et al. 2022b),
mean pooling.

Blocks are pre-norm with LayerNorm; those for the Long Range Arena have BatchNorm, whose statistics
would couple the rows of a batch, and padding."""

from typing import Any

from jaxformer.layers.init import FanInUniform
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.s4d import S4D
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.classifier import Classifier
from jaxformer.models.embedder import LinearInput, TokenInput
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import preset
from jaxformer.models.zoo.story import Chapter, step

LISTOPS, DIGITS = TokenInput(vocab_size=15), LinearInput.Config(features=1)


def state_space_classifier(
  layer: LayerConfig,
  width: int,
  layers: int,
  *,
  dropout: float = 0.0,
  tied_dropout: float = 0.0,
  **fields: Any,
) -> Classifier.Config:
  """A stack of state-space layers, each with its own gate, and one class per sequence. The maps in
  and out are initialized as PyTorch's `Linear`, biases too. `fields` of the config: `input`,
  `classes`, `context_length`."""
  branch = PreNorm(layer=layer, norm=LayerNorm(), dropout=dropout, tied_dropout=tied_dropout)
  block = Block.Config(branches=(branch,))
  return Classifier.Config(
    width=width,
    stack=(Group(pattern=(block,), repeats=layers),),
    head_bias=FanInUniform(),
    **fields,
  )


IMAGES: dict[str, Any] = {'input': DIGITS, 'classes': 10, 'context_length': 64}
for name, model in {
  # S4's third configuration for ListOps: 6 layers of width 256 with state size 4 per channel, one A
  # and B per layer, those of HiPPO-LegS (`init: legs`; here without its rank-one part), softplus of
  # the parameters of step sizes, and a learning rate of A and B.
  's4d-listops': state_space_classifier(
    S4D.Config(
      d_state=4,
      spectrum='legs',
      causal=False,
      n_ssm=1,
      dt_transform='softplus',
      lr_scale=None,
      learning_rate=1e-3,
      dt_lr_scale=1.0,
    ),
    256,
    6,
    input=LISTOPS,
    classes=10,
    context_length=2000,
  ),
  # The sizes that the authors give for a first try on images: 4 layers of width 128, state size 64.
  # Dropout, inside the layer and after it, takes whole channels.
  's4d-digits': state_space_classifier(
    S4D.Config(causal=False, lr_scale=None, learning_rate=1e-3, tied_dropout=0.1),
    128,
    4,
    tied_dropout=0.1,
    **IMAGES,
  ),
  's4d-classifier-tiny': state_space_classifier(
    S4D.Config(d_state=16, causal=False), 64, 2, **IMAGES
  ),
}.items():
  preset(name, 's4d-classifier', model)

step(
  's4d-classifier',
  Chapter.STATE_SPACES,
  2022,
  'class = head(mean_t(S4D in both directions))',
  'State spaces read pixels and nested lists of thousands of steps.',
  'Gu, Gupta, Goel and Re 2022',
)
