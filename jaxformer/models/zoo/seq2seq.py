"""Recurrent encoder-decoders without and with attention: Sutskever et al. 2014, Bahdanau et al. 2014, Luong et al. 2015.

Conventions of the sizes: `seq2seq-lstm` has one vector of offsets a gate and offsets on the logits, which makes 384,112,000;
`rnnsearch` has no offsets at all, as the equations of the paper's appendix, 80,401,000.
"""

from __future__ import annotations

from jaxformer.layers.bidirectional import Bidirectional
from jaxformer.layers.cross_attention import LuongAttention, Score
from jaxformer.layers.gru import Gru
from jaxformer.layers.init import FanInUniform, Init, Normal, Orthogonal, Uniform
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.lstm import Lstm
from jaxformer.layers.search import RnnSearch
from jaxformer.models.block import Block, Plain
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import as_wide, pair_family, preset


def plain(layer: LayerConfig, repeats: int = 1, dropout: float = 0.0) -> Group:
  """Layers one on the other, without residuals."""
  return Group(pattern=(Block.Config(branches=(Plain.Config(layer=layer, dropout=dropout),)),), repeats=repeats)


def seq2seq_lstm(
  width: int, layers: int, *, source_vocab_size: int, vocab_size: int, context: int, layer: Lstm.Config, embedding_init: Init,
  head_init: Init, dropout: float = 0.0,
) -> EncoderDecoder.Config:
  """LSTMs on both sides; the source is reversed, and all layers' states are handed over: all that the decoder knows of it."""
  stack = (plain(layer, layers, dropout),)
  return EncoderDecoder.Config(
    source_vocab_size=source_vocab_size, vocab_size=vocab_size, width=width, context=context, encoder=stack, decoder=stack,
    reverse_source=True, hand_over=True, head_bias=True, dropout=dropout, embedding_init=embedding_init, head_init=head_init)


def luong(
  width: int, layers: int, score: Score, *, source_vocab_size: int, vocab_size: int, context: int, dropout: float = 0.0,
) -> EncoderDecoder.Config:
  """The same with global attention on top: the decoder's output is compared with every output of the encoder."""
  base = seq2seq_lstm(
    width, layers, source_vocab_size=source_vocab_size, vocab_size=vocab_size, context=context, layer=Lstm.Config(),
    embedding_init=Normal(std=1.0), head_init=FanInUniform(), dropout=dropout)
  return base.replace(decoder=(*base.decoder, plain(LuongAttention.Config(score=score))))


def rnnsearch(
  width: int, hidden: int, attention: int, maxout: int, *, source_vocab_size: int, vocab_size: int, context: int,
  embedding_init: Init, head_init: Init, gru: Gru.Config, search: RnnSearch.Config,
) -> EncoderDecoder.Config:
  """A GRU in both directions, and one that searches what they made of the source; `gru` and `search` give the initial values."""
  encoder = Bidirectional.Config(layer=gru.replace(hidden=hidden, project=False))
  decoder = search.replace(hidden=hidden, attention=attention, source_width=2 * hidden, maxout=maxout)
  return EncoderDecoder.Config(
    source_vocab_size=source_vocab_size, vocab_size=vocab_size, width=width, context=context, encoder=(plain(encoder),),
    decoder=(plain(decoder),), embedding_init=embedding_init, head_init=head_init)


_UNIFORM = Uniform(bound=0.08)
preset('seq2seq-lstm', 'seq2seq-lstm', seq2seq_lstm(
  1000, 4, source_vocab_size=160_000, vocab_size=80_000, context=50, embedding_init=_UNIFORM, head_init=_UNIFORM,
  layer=Lstm.Config(init=_UNIFORM, recurrent_init=_UNIFORM, bias=_UNIFORM, forget_bias=0.0)))
_NORMAL = Normal(std=0.01)
preset('rnnsearch', 'rnnsearch', rnnsearch(
  620, 1000, 1000, 500, source_vocab_size=30_000, vocab_size=30_000, context=50, embedding_init=_NORMAL, head_init=_NORMAL,
  gru=Gru.Config(init=_NORMAL, recurrent_init=Orthogonal(), bias=None), search=RnnSearch.Config()))

# The tiny ones begin with weights of a size that trains in a minute, where the papers' would take longer to leave zero.
_TINY = {'source_vocab_size': 264, 'vocab_size': 264, 'context': 128}
_WIDE, _FAN = Normal(std=1.0), FanInUniform()
preset('seq2seq-lstm-tiny', 'seq2seq-lstm', seq2seq_lstm(
  128, 2, **_TINY, layer=Lstm.Config(), embedding_init=_WIDE, head_init=_FAN))
preset('luong-tiny', 'luong', luong(128, 2, LuongAttention.Config().score, **_TINY))
preset('rnnsearch-tiny', 'rnnsearch', rnnsearch(
  64, 96, 96, 64, **_TINY, embedding_init=_WIDE, head_init=_FAN, gru=Gru.Config(recurrent_init=Orthogonal()),
  search=RnnSearch.Config(init=_FAN, attention_init=_FAN, score_init=_FAN, start_init=_FAN, out_init=_FAN)))


def _grown_lstm(
  *, width: int, layers: int, hidden: int, source_vocab_size: int, vocab_size: int, context: int,
) -> EncoderDecoder.Config:
  layer = Lstm.Config(hidden=hidden, project=False)
  stack = (plain(layer), *((plain(layer, layers - 1),) if layers > 1 else ()))
  return seq2seq_lstm(
    width, 1, source_vocab_size=source_vocab_size, vocab_size=vocab_size, context=context, layer=layer,
    embedding_init=Normal(std=1.0), head_init=FanInUniform()).replace(encoder=stack, decoder=stack)


def _grown_search(
  *, width: int, layers: int, hidden: int, source_vocab_size: int, vocab_size: int, context: int,
) -> EncoderDecoder.Config:
  """One layer, whatever is asked; attention and maxout in the paper's proportion to the recurrences."""
  fan = FanInUniform()
  return rnnsearch(
    width, hidden, hidden, hidden // 2, source_vocab_size=source_vocab_size, vocab_size=vocab_size, context=context,
    embedding_init=Normal(std=1.0), head_init=fan, gru=Gru.Config(recurrent_init=Orthogonal()),
    search=RnnSearch.Config(init=fan, attention_init=fan, score_init=fan, start_init=fan, out_init=fan))


pair_family('seq2seq-lstm', _grown_lstm, hidden=as_wide)
pair_family('rnnsearch', _grown_search, hidden=lambda width: round(width * 1000 / 620 / 8) * 8, grows_deeper=False)
