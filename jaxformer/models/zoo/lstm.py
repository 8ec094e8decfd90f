"""Language models of stacked LSTMs and GRUs, without norms, residuals and positions.

`lstm-zaremba-*` are the word-level models of Zaremba et al. 2014 (section 4.1, Penn Treebank): two
layers as wide as the embedding; dropout between layers (after the embedding, between the LSTMs,
before the head), never through time. Every weight is initialized uniformly within one bound. The
context length is that of truncated backpropagation."""

from __future__ import annotations

from typing import Any

from jaxformer.layers.gru import Gru
from jaxformer.layers.init import FanInUniform, Init, Normal, Uniform
from jaxformer.layers.lstm import Lstm, RecurrentConfig
from jaxformer.models.block import Block, Plain
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import Make, family, preset


def recurrent(
  layer: RecurrentConfig,
  width: int,
  layers: int,
  *,
  vocab_size: int,
  context_length: int,
  dropout: float = 0.0,
  embedding_init: Init,
  head_init: Init,
) -> LanguageModel.Config:
  """Layers one on the other."""
  block = Block.Config(branches=(Plain(layer=layer, dropout=dropout),))
  return LanguageModel.Config(
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    final_norm=None,
    head_bias=True,
    dropout=dropout,
    embedding_init=embedding_init,
    head_init=head_init,
    stack=(Group(pattern=(block,), repeats=layers),),
  )


def zaremba(width: int, dropout: float, bound: float, context_length: int) -> LanguageModel.Config:
  """The models of Zaremba et al. 2014."""
  init = Uniform(bound=bound)
  layer = Lstm.Config(init=init, recurrent_init=init, bias=init, forget_bias=0.0)
  return recurrent(
    layer,
    width,
    2,
    vocab_size=10_000,
    context_length=context_length,
    dropout=dropout,
    embedding_init=init,
    head_init=init,
  )


preset('lstm-zaremba-small', 'lstm', zaremba(200, 0.0, 0.1, 20))
preset('lstm-zaremba-medium', 'lstm', zaremba(650, 0.5, 0.05, 35))
preset('lstm-zaremba-large', 'lstm', zaremba(1500, 0.65, 0.04, 35))
for name, layer in (('lstm', Lstm.Config()), ('gru', Gru.Config())):
  # No norm comes between the embedding and the first gates, which see nothing of numbers much below
  # 1.
  preset(
    f'{name}-tiny',
    name,
    recurrent(
      layer,
      128,
      2,
      vocab_size=264,
      context_length=256,
      embedding_init=Normal(std=1.0),
      head_init=FanInUniform(),
    ),
  )


def _grown(layer: RecurrentConfig) -> Make:
  def make(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
    return recurrent(
      layer, width, layers, **sizes, embedding_init=Normal(std=1.0), head_init=FanInUniform()
    )

  return make


family('lstm', _grown(Lstm.Config()))
family('gru', _grown(Gru.Config()))
