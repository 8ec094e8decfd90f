"""What the contract suite runs over: every registered layer's examples and every tiny preset."""

import functools
import re

import jax

from jaxformer import config as configs
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lssl import LSSL
from jaxformer.layers.s4 import S4
from jaxformer.models.classifier import Classifier
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.jamba import jamba
from jaxformer.models.zoo.s4 import state_space
from jaxformer.testing.case import BATCH, LENGTH, WIDTH, Alone, Case, close, inputs, segments
from tests import tiers

__all__ = ['BATCH', 'LENGTH', 'WIDTH', 'Alone', 'Case', 'close', 'inputs', 'segments']


def _named(example: LayerConfig) -> str:
  given = configs.differences(configs.to_json(type(example)()), configs.to_json(example))
  # of a part of another type, the type
  given = [re.sub(r'\{"type": "(\w+)".*?(?= -> |$)', r'\1', d) for d in given]
  return f'{example.tag}({", ".join(d.replace(": null", "").replace(" ", "")[:28] for d in given)})'


EXAMPLES = [
  e
  for kind in configs.types_of(LayerConfig)
  if kind.__module__.startswith('jaxformer.')
  for e in kind.examples()
]
LAYERS = {_named(example): example for example in EXAMPLES}
assert len(LAYERS) == len(EXAMPLES), (
  'two examples share a name, and only one of them would be tested'
)
# of each layer
FIRST = {
  next(name for name, c in LAYERS.items() if c.tag == tag)
  for tag in {c.tag for c in EXAMPLES}.difference(tiers.PART_OF_OTHERS)
}
DECODING = {name: c for name, c in LAYERS.items() if c.decodes}
TINY = sorted(
  n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, LanguageModel.Config)
)
CLASSIFIERS = sorted(
  n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, Classifier.Config)
)
PAIRS = sorted(
  n for n in PRESETS if n.endswith('-tiny') and isinstance(PRESETS[n].model, EncoderDecoder.Config)
)

# As the presets are made, but smaller, where one costs as much time as ten others: Jamba by the
# length of its period, which here is repeated too, S4 and LSSL by the systems that they solve at
# every step.
SMALLER = {
  'jamba-tiny': jamba(
    64,
    4,
    96,
    4,
    2,
    experts=4,
    d_state=8,
    attention_every=2,
    attention_first=1,
    vocab_size=264,
    context_length=256,
  ),
  's4-tiny': state_space(
    S4.Config(d_state=16, length=64), 64, 2, vocab_size=264, context_length=256
  ),
  'lssl-tiny': state_space(
    LSSL.Config(d_state=16, copies=2), 64, 2, vocab_size=264, context_length=256
  ),
}


@functools.cache
def layer(name: str) -> Case:
  return Case(Alone(layer=LAYERS[name]))


@functools.cache
def model(name: str) -> Case:
  """A tiny preset with at most two periods: what more of them would show, only compile time pays
  for."""
  config = SMALLER.get(name, PRESETS[name].model)
  return Case(
    config.replace(
      **{
        stack: tuple(g.replace(repeats=min(g.repeats, 2)) for g in getattr(config, stack))
        for stack in ('stack', 'encoder', 'decoder')
        if hasattr(config, stack)
      }
    )
  )


def tokens(case: Case, length: int, batch: int = BATCH):
  return jax.random.randint(
    jax.random.key(3), (batch, length), 0, case.definition.config.vocab_size
  )
