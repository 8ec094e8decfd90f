"""Google's neural machine translation system (Wu et al. 2016): LSTMs, the encoder's bottom layer
bidirectional; residual sums from the third layer on; additive attention keyed on
the bottom layer of the decoder, whose context every layer of the decoder reads beside its input.
Source, target and head have separate tables; gates and logits have biases: 280,858,880 parameters
with a vocabulary of 32,000."""

import functools
from typing import Any

from jaxformer.layers.attentive_decoder import GnmtAttention
from jaxformer.layers.bidirectional import Bidirectional
from jaxformer.layers.init import FanInUniform, Init, Normal, Uniform, Zeros
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lstm import Lstm
from jaxformer.models.block import Plain, Residual
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group, group
from jaxformer.models.zoo.preset import as_wide, family, preset
from jaxformer.models.zoo.story import Chapter, step

ZEROS = Zeros()


def gnmt(
  width: int,
  layers: int,
  *,
  init: Init,
  dropout: float = 0.0,
  hidden: int | None = None,
  vocab_size: int,
  source_vocab_size: int | None = None,
  head_bias: Init = ZEROS,
  **fields: Any,
) -> EncoderDecoder.Config:
  """The GNMT architecture, with `layers` of `hidden` units on each side, at least three, as wide as
  the embedding unless given. The bottom layer of the decoder starts from the backward
  state of the encoder's, the others from the state of the layer at their height.
  `fields` of the config: `context_length`, `embedding_init`, `head_init`."""
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

  def stack(bottom: LayerConfig, above: Lstm.Config) -> tuple[Group, ...]:
    plain = (group(Plain(layer=layer, dropout=dropout)) for layer in (bottom, above))
    return *plain, group(Residual(layer=above, dropout=dropout), repeats=layers - 2)

  return EncoderDecoder.Config(
    source_vocab_size=source_vocab_size or vocab_size,
    vocab_size=vocab_size,
    width=width,
    init_from_encoder=True,
    head_bias=head_bias,
    dropout=dropout,
    encoder=stack(Bidirectional.Config(layer=lstm), lstm),
    decoder=stack(bottom, beside),
    **fields,
  )


_UNIFORM: dict[str, Any] = dict.fromkeys(
  ('init', 'embedding_init', 'head_init', 'head_bias'), Uniform(bound=0.04)
)
_FAN: dict[str, Any] = {
  'init': FanInUniform(),
  'embedding_init': Normal(std=1.0),
  'head_init': FanInUniform(),
}
preset(
  'gnmt', 'gnmt', gnmt(1024, 8, vocab_size=32_000, context_length=128, dropout=0.2, **_UNIFORM)
)
preset('gnmt-tiny', 'gnmt', gnmt(96, 3, vocab_size=264, context_length=128, **_FAN))
family('gnmt', functools.partial(gnmt, **_FAN), hidden=as_wide, fewest_layers=3, of_pairs=True)

step(
  'gnmt',
  Chapter.RECURRENCE,
  2016,
  'eight LSTM layers, x + LSTM(x), one attention',
  'Residual sums make recurrent encoder-decoders deep; it was a product.',
  'Wu et al. 2016',
)
