"""Sequence classifiers of state-space layers that read in both directions: S4D (Gu et al. 2022b),
mean pooling.

Blocks are pre-norm with LayerNorm; those for the Long Range Arena have BatchNorm, whose statistics
would couple the rows of a batch, and padding."""

from __future__ import annotations

from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.s4d import S4D
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.classifier import Classifier
from jaxformer.models.embedder import InputConfig, LinearInput, TokenInput
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import preset

LISTOPS, DIGITS = TokenInput.Config(vocab_size=15), LinearInput.Config(features=1)


def state_space_classifier(
  layer: LayerConfig,
  width: int,
  layers: int,
  *,
  input: InputConfig,
  classes: int,
  context_length: int,
  dropout: float = 0.0,
) -> Classifier.Config:
  """A stack of state-space layers, each with its own gate, and one class per sequence."""
  block = Block.Config(branches=(PreNorm(layer=layer, norm=LayerNorm(), dropout=dropout),))
  return Classifier.Config(
    input=input,
    classes=classes,
    width=width,
    context_length=context_length,
    stack=(Group(pattern=(block,), repeats=layers),),
  )


# The sizes of S4's third configuration for ListOps: 6 layers of width 256 with state size 4 per
# channel.
preset(
  's4d-listops',
  's4d-classifier',
  state_space_classifier(
    S4D.Config(d_state=4, causal=False), 256, 6, input=LISTOPS, classes=10, context_length=2000
  ),
)
# The sizes that the authors give for a first try on images: 4 layers of width 128, state size
# 64.
preset(
  's4d-digits',
  's4d-classifier',
  state_space_classifier(
    S4D.Config(causal=False), 128, 4, input=DIGITS, classes=10, context_length=64, dropout=0.1
  ),
)
preset(
  's4d-classifier-tiny',
  's4d-classifier',
  state_space_classifier(
    S4D.Config(d_state=16, causal=False), 64, 2, input=DIGITS, classes=10, context_length=64
  ),
)
