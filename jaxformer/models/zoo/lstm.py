"""Language models of stacked LSTMs and GRUs, without norms, residuals and positions.

`lstm-zaremba-*` are the word-level models of Zaremba et al. 2014 (section 4.1, Penn Treebank): two
layers as wide as the embedding; dropout between layers (after the embedding, between the LSTMs,
before the head), never through time. Every weight is initialized uniformly within one bound. The
context length is that of truncated backpropagation."""

import functools
from typing import Any

from jaxformer.layers.gru import Gru
from jaxformer.layers.init import FanInUniform, Normal, Uniform, Zeros
from jaxformer.layers.lstm import Lstm, RecurrentConfig
from jaxformer.models.block import Plain
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import group
from jaxformer.models.zoo.preset import TINY, family, preset
from jaxformer.models.zoo.story import Chapter, step

# No norm comes between the embedding and the first gates, which see nothing of numbers much below
# 1.
INITS: dict[str, Any] = {
  'embedding_init': Normal(std=1.0),
  'head_init': FanInUniform(),
  'head_bias': Zeros(),
}


def recurrent(
  layer: RecurrentConfig, width: int, layers: int, *, dropout: float = 0.0, **fields: Any
) -> LanguageModel.Config:
  """Layers one on the other; `fields` of the config: `vocab_size`, `context_length`,
  `embedding_init`, `head_init`, `head_bias`."""
  return LanguageModel.Config(
    width=width,
    final_norm=None,
    dropout=dropout,
    stack=(group(Plain(layer=layer, dropout=dropout), repeats=layers),),
    **INITS | fields,
  )


def zaremba(width: int, dropout: float, bound: float, context_length: int) -> LanguageModel.Config:
  """The models of Zaremba et al. 2014."""
  init = Uniform(bound=bound)
  return recurrent(
    Lstm.Config(init=init, recurrent_init=init, bias=init, forget_bias=0.0),
    width,
    2,
    vocab_size=10_000,
    context_length=context_length,
    dropout=dropout,
    embedding_init=init,
    head_init=init,
    head_bias=init,
  )


preset('lstm-zaremba-small', 'lstm', zaremba(200, 0.0, 0.1, 20))
preset('lstm-zaremba-medium', 'lstm', zaremba(650, 0.5, 0.05, 35))
preset('lstm-zaremba-large', 'lstm', zaremba(1500, 0.65, 0.04, 35))
for name, layer in (('lstm', Lstm.Config()), ('gru', Gru.Config())):
  preset(f'{name}-tiny', name, recurrent(layer, 128, 2, **TINY))
  family(name, functools.partial(recurrent, layer))

step(
  'lstm',
  Chapter.RECURRENCE,
  1997,
  'c = f * c + i * g, h = o * tanh(c)',
  'Gates decide what a memory of constant size keeps, writes and shows.',
  'Hochreiter and Schmidhuber 1997; Zaremba et al. 2014',
)

step(
  'gru',
  Chapter.RECURRENCE,
  2014,
  'h = (1 - z) * n + z * h',
  'Two gates do the work of three, without a separate memory.',
  'Cho et al. 2014',
)
