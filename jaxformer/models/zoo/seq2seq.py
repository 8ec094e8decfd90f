"""Recurrent encoder-decoders without and with attention: Sutskever et al. 2014, Bahdanau et al.
2014, Luong et al. 2015.

Conventions of the sizes: `seq2seq-lstm` has one bias vector per gate and a bias on the logits:
384,112,000. `rnnsearch` has no biases, as in the equations of the paper's appendix: 80,401,000.
`luong` is the global model with input feeding and the score that served it best, the dot product
(Luong et al. 2015, section 5.2); it has no biases, as in its equations and the authors' code:
220,000,000. Its local attention is left out."""

import math
from typing import Any

from jaxformer.layers.attentive_decoder import RnnSearch
from jaxformer.layers.bidirectional import Bidirectional
from jaxformer.layers.cross_attention import LuongAttention
from jaxformer.layers.gru import Gru
from jaxformer.layers.init import FanInUniform, Init, Normal, Orthogonal, Uniform, Zeros
from jaxformer.layers.input_feeding import InputFeeding
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lstm import Lstm
from jaxformer.models.block import Plain
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group, group
from jaxformer.models.zoo.preset import as_wide, family, preset
from jaxformer.models.zoo.story import Chapter, step

# Larger than the papers' initialization, with which a tiny model takes longer to leave zero.
WIDE, FAN, LSTM = Normal(std=1.0), FanInUniform(), Lstm.Config()


def plain(layer: LayerConfig, repeats: int = 1, dropout: float = 0.0) -> Group:
  """Stacked layers without residuals."""
  return group(Plain(layer=layer, dropout=dropout), repeats=repeats)


def seq2seq_lstm(
  width: int, layers: int, layer: Lstm.Config, *, dropout: float = 0.0, **settings: Any
) -> EncoderDecoder.Config:
  """LSTMs on both sides. The source is reversed, and the decoder starts from the final states of
  the encoder; it sees nothing else of the source. `settings` are fields of the config: the
  vocabularies, `context_length`, `embedding_init`, `head_init`, `head_bias`."""
  stack = (plain(layer, layers, dropout),)
  fields: dict[str, Any] = {'head_bias': Zeros()} | settings
  return EncoderDecoder.Config(
    width=width,
    encoder=stack,
    decoder=stack,
    reverse_source=True,
    init_from_encoder=True,
    dropout=dropout,
    **fields,
  )


def luong(
  width: int,
  layers: int,
  score_init: Init | None,
  layer: Lstm.Config = LSTM,
  *,
  attention_init: Init = FAN,
  dropout: float = 0.0,
  input_feeding: bool = True,
  **settings: Any,
) -> EncoderDecoder.Config:
  """The same with global attention on top of the decoder; with `input_feeding`, the next step reads
  the attentional vector too."""
  settings = {'embedding_init': WIDE, 'head_init': FAN} | settings
  base = seq2seq_lstm(width, layers, layer, dropout=dropout, **settings)
  attention = LuongAttention.Config(score_init=score_init, init=attention_init)
  fed = InputFeeding.Config(layers=layers, lstm=layer, attention=attention, dropout=dropout)
  return base.replace(decoder=(plain(fed),) if input_feeding else (*base.decoder, plain(attention)))


def rnnsearch(
  width: int,
  hidden: int,
  attention: int,
  maxout: int,
  *,
  gru: Gru.Config,
  search: RnnSearch.Config,
  **settings: Any,
) -> EncoderDecoder.Config:
  """A bidirectional GRU encoder, and a GRU decoder with additive attention; `gru` and `search` give
  the initialization, `settings` are fields of the config."""
  encoder = Bidirectional.Config(layer=gru.replace(hidden=hidden, project=False))
  decoder = search.replace(
    hidden=hidden, attention=attention, source_width=2 * hidden, maxout=maxout
  )
  return EncoderDecoder.Config(
    width=width, encoder=(plain(encoder),), decoder=(plain(decoder),), **settings
  )


_UNIFORM = Uniform(bound=0.08)
preset(
  'seq2seq-lstm',
  'seq2seq-lstm',
  seq2seq_lstm(
    1000,
    4,
    source_vocab_size=160_000,
    vocab_size=80_000,
    context_length=50,
    embedding_init=_UNIFORM,
    head_init=_UNIFORM,
    head_bias=_UNIFORM,
    layer=Lstm.Config(init=_UNIFORM, recurrent_init=_UNIFORM, bias=_UNIFORM, forget_bias=0.0),
  ),
)
_NORMAL = Normal(std=0.01)
preset(
  'rnnsearch',
  'rnnsearch',
  rnnsearch(
    620,
    1000,
    1000,
    500,
    source_vocab_size=30_000,
    vocab_size=30_000,
    context_length=50,
    embedding_init=_NORMAL,
    head_init=_NORMAL,
    gru=Gru.Config(init=_NORMAL, recurrent_init=Orthogonal(), bias=None),
    search=RnnSearch.Config(),
  ),
)
_TENTH = Uniform(bound=0.1)
preset(
  'luong',
  'luong',
  luong(
    1000,
    4,
    None,
    source_vocab_size=50_000,
    vocab_size=50_000,
    context_length=50,
    dropout=0.2,
    head_bias=None,
    layer=Lstm.Config(init=_TENTH, recurrent_init=_TENTH, bias=None, forget_bias=0.0),
    attention_init=_TENTH,
    embedding_init=_TENTH,
    head_init=_TENTH,
  ),
)

_TINY: dict[str, Any] = {'source_vocab_size': 264, 'vocab_size': 264, 'context_length': 128}
# Outputs of an LSTM start far below 1, so weights that read them are three times as large as by
# fan-in. Without attention the states must hold the complete source, so they are wider.
_LARGE = FanInUniform(gain=3.0)
_LSTM: dict[str, Any] = {
  'layer': Lstm.Config(init=_LARGE, recurrent_init=Orthogonal()),
  'head_init': FanInUniform(gain=math.sqrt(3.0)),
  'embedding_init': WIDE,
}
_SEARCH: dict[str, Any] = {
  'gru': Gru.Config(recurrent_init=Orthogonal()),
  'search': RnnSearch.Config(
    init=FAN, attention_init=FAN, score_init=FAN, start_init=FAN, out_init=FAN
  ),
  'head_init': FAN,
  'embedding_init': WIDE,
}
preset('seq2seq-lstm-tiny', 'seq2seq-lstm', seq2seq_lstm(192, 2, **_TINY, **_LSTM))
preset('luong-tiny', 'luong', luong(128, 2, _LARGE, attention_init=_LARGE, **_TINY, **_LSTM))
preset('rnnsearch-tiny', 'rnnsearch', rnnsearch(64, 96, 96, 64, **_TINY, **_SEARCH))


def _grown_lstm(*, width: int, layers: int, hidden: int, **sizes: Any) -> EncoderDecoder.Config:
  layer = _LSTM['layer'].replace(hidden=hidden, project=False)
  stack = (plain(layer), *((plain(layer, layers - 1),) if layers > 1 else ()))
  return seq2seq_lstm(width, 1, **sizes, **_LSTM).replace(encoder=stack, decoder=stack)


def _grown_search(*, width: int, layers: int, hidden: int, **sizes: Any) -> EncoderDecoder.Config:
  """Always one layer; attention and maxout in the paper's proportion to the recurrences."""
  return rnnsearch(width, hidden, hidden, hidden // 2, **sizes, **_SEARCH)


family('seq2seq-lstm', _grown_lstm, hidden=as_wide, of_pairs=True)
family(
  'rnnsearch',
  _grown_search,
  hidden=lambda width: round(width * 1000 / 620 / 8) * 8,
  grows_deeper=False,
  of_pairs=True,
)

step(
  'seq2seq-lstm',
  Chapter.RECURRENCE,
  2014,
  'p(target | source) = decoder(encoder(source))',
  'A sequence becomes a sequence, through one vector between an encoder and a decoder.',
  'Sutskever et al. 2014',
)

step(
  'rnnsearch',
  Chapter.RECURRENCE,
  2014,
  'c_t = sum_s a_ts h_s, a_t = softmax(v tanh(W d_{t-1} + U h_s))',
  'The decoder looks at every position of the source, and learns where.',
  'Bahdanau et al. 2014',
)

step(
  'luong',
  Chapter.RECURRENCE,
  2015,
  'a_t = softmax(d_t h_s), d~ = tanh(W [c, d])',
  'The score becomes a dot product, and what was attended to is fed to the next step.',
  'Luong et al. 2015',
)
