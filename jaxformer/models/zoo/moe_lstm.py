"""The sparsely-gated mixture of experts between two LSTMs (Shazeer et al. 2017, section 5.1 and
appendix C.1): each of the three layers adds to its input; experts of one ReLU layer, four per
token; a sigmoid on their sum. The vocabulary is that of the One Billion Word benchmark. Sizes are
those of the flat models; the hierarchical ones route twice."""

from typing import Any

from jaxformer.layers.init import FanInUniform, Normal, Zeros
from jaxformer.layers.lstm import Lstm
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.router import NoisyTopK
from jaxformer.models.block import Residual
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import group
from jaxformer.models.zoo.preset import TINY, as_wide, family, preset
from jaxformer.models.zoo.story import Chapter, step


def moe_lstm(
  width: int, hidden: int, experts: int, *, k: int = 4, dropout: float = 0.0, **fields: Any
) -> LanguageModel.Config:
  """LSTM, mixture of experts, LSTM; `fields` of the config: `vocab_size`, `context_length`."""
  expert = Mlp.Config(
    hidden=hidden, activation='relu', init=FanInUniform(), out_init=FanInUniform()
  )
  moe = Moe.Config(experts=experts, expert=expert, router=NoisyTopK(k=k), out_activation='sigmoid')
  layers = Lstm.Config(), moe, Lstm.Config()
  return LanguageModel.Config(
    width=width,
    final_norm=None,
    dropout=dropout,
    head_bias=Zeros(),
    embedding_init=Normal(std=1.0),
    head_init=FanInUniform(),
    stack=tuple(group(Residual(layer=layer, dropout=dropout)) for layer in layers),
    **fields,
  )


for experts in (32, 256):
  preset(
    f'moe-lstm-{experts}',
    'moe-lstm',
    moe_lstm(512, 1024, experts, vocab_size=793_471, context_length=20, dropout=0.1),
  )
preset('moe-lstm-tiny', 'moe-lstm', moe_lstm(128, 128, 8, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return moe_lstm(width, hidden, 8, **sizes)


# Its three layers are its design; it grows in width.
family('moe-lstm', _grown, hidden=as_wide, grows_deeper=False)

step(
  'moe-lstm',
  Chapter.EXPERTS,
  2017,
  'y = sum over the top k of G(x)_e E_e(x)',
  'A router sends each token to a few of thousands of experts.',
  'Shazeer et al. 2017',
)
