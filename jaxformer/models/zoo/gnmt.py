"""Google's neural machine translation system (Wu et al. 2016): LSTMs, the encoder's bottom layer
bidirectional; residual sums from the third layer on; additive attention keyed on
the bottom layer of the decoder, whose context every layer of the decoder reads beside its input.
Source, target and head have separate tables; gates and logits have biases: 280,858,880 parameters
with a vocabulary of 32,000."""

from __future__ import annotations

from typing import Any

from jaxformer.layers.attentive_decoder import GnmtAttention
from jaxformer.layers.bidirectional import Bidirectional
from jaxformer.layers.init import FanInUniform, Init, Normal, Uniform
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lstm import Lstm
from jaxformer.models.block import Block, Plain, Residual
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import as_wide, family, preset


def gnmt(
  width: int,
  layers: int,
  *,
  vocab_size: int,
  context_length: int,
  init: Init,
  embedding_init: Init,
  head_init: Init,
  dropout: float = 0.0,
  hidden: int | None = None,
) -> EncoderDecoder.Config:
  """The GNMT architecture, with `layers` of `hidden` units on each side, at least three, as wide as
  the embedding unless given. The bottom layer of the decoder starts from the backward
  state of the encoder's, the others from the state of the layer at their height."""
  units = hidden or width
  lstm = Lstm.Config(
    hidden=units, project=False, init=init, recurrent_init=init, bias=init, forget_bias=0.0
  )
  beside = lstm.replace(context_width=units)
  bottom = GnmtAttention.Config(
    hidden=hidden,
    source_width=hidden,
    init=init,
    recurrent_init=init,
    attention_init=init,
    score_init=init,
    bias=init,
  )

  def plain(layer: LayerConfig) -> Group:
    return Group(pattern=(Block.Config(branches=(Plain(layer=layer, dropout=dropout),)),))

  def residual(layer: LayerConfig) -> Group:
    return Group(
      pattern=(Block.Config(branches=(Residual(layer=layer, dropout=dropout),)),),
      repeats=layers - 2,
    )

  return EncoderDecoder.Config(
    source_vocab_size=vocab_size,
    vocab_size=vocab_size,
    width=width,
    context_length=context_length,
    init_from_encoder=True,
    head_bias=True,
    dropout=dropout,
    embedding_init=embedding_init,
    head_init=head_init,
    encoder=(plain(Bidirectional.Config(layer=lstm)), plain(lstm), residual(lstm)),
    decoder=(plain(bottom), plain(beside), residual(beside)),
  )


_UNIFORM = Uniform(bound=0.04)
preset(
  'gnmt',
  'gnmt',
  gnmt(
    1024,
    8,
    vocab_size=32_000,
    context_length=128,
    init=_UNIFORM,
    embedding_init=_UNIFORM,
    head_init=_UNIFORM,
    dropout=0.2,
  ),
)
preset(
  'gnmt-tiny',
  'gnmt',
  gnmt(
    96,
    3,
    vocab_size=264,
    context_length=128,
    init=FanInUniform(),
    embedding_init=Normal(std=1.0),
    head_init=FanInUniform(),
  ),
)


def _grown(
  *, width: int, layers: int, hidden: int, source_vocab_size: int, **sizes: Any
) -> EncoderDecoder.Config:
  fan = FanInUniform()
  return gnmt(
    width, layers, **sizes, init=fan, embedding_init=Normal(std=1.0), head_init=fan, hidden=hidden
  ).replace(source_vocab_size=source_vocab_size)


family('gnmt', _grown, hidden=as_wide, fewest_layers=3, of_pairs=True)
