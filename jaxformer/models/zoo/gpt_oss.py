"""gpt-oss (OpenAI 2025): pre-norm RMSNorm, grouped-query attention with biases and a sink per head,
in a window of 128 positions in every second layer from the first; rotary positions scaled by YaRN;
a mixture of experts in every block, four per token, with biases everywhere and a clamped SwiGLU.
The weight of the balancing loss is the default of transformers."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary, YarnScaling
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import (
  HEAD,
  TINY,
  family,
  heads_for,
  pre_norm_model,
  preset,
  two_thirds,
)
from jaxformer.models.zoo.story import Chapter, step

YARN = YarnScaling(factor=32.0, original_context=4096, truncate=False)
ROTARY = Rotary(theta=150_000.0, scaling=YARN)


def gpt_oss(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  experts: int,
  k: int = 4,
  head_dim: int | None = None,
  window: int = 128,
  balance: float | None = 0.001,
  **fields: Any,
) -> LanguageModel.Config:
  """The gpt-oss architecture; `fields` of the config: `vocab_size`, `context_length`."""
  attention = Attention.Config(
    heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=ROTARY, bias=True, sinks=True
  )
  moe = Moe.Config(
    experts=experts,
    expert=GatedMlp.Config(
      hidden=hidden, activation='gelu_sigmoid', bias=True, limit=7.0, up_offset=1.0
    ),
    router=TopKSoftmax(k=k, logit_bias=True, pooled_balance=balance),
  )
  blocks = (attention.replace(window=window), moe), (attention, moe)
  return pre_norm_model(width, layers, *blocks, norm=RMSNorm(), **fields)


for name, layers, experts in ('gpt-oss-20b', 24, 32), ('gpt-oss-120b', 36, 128):
  sizes: dict[str, int] = {'vocab_size': 201088, 'context_length': 131072}
  model = gpt_oss(2880, layers, 2880, 64, 8, experts=experts, head_dim=64, **sizes)
  preset(name, 'gpt-oss', model)
preset('gpt-oss-tiny', 'gpt-oss', gpt_oss(64, 4, 64, 4, 2, experts=4, k=2, window=32, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return gpt_oss(width, layers, hidden, n, n // 2, experts=4, k=2, **sizes)


# Two experts per token have the hidden units of one dense layer.
family(
  'gpt-oss', _grown, width_step=2 * HEAD, layer_step=2, hidden=lambda width: two_thirds(width) // 2
)

step(
  'gpt-oss',
  Chapter.EXPERTS,
  2025,
  'softmax(...) with exp(sink) in the denominator; top 4 of 32 or 128 experts',
  'A head may attend to nothing; half of the layers see a window of 128 positions.',
  'OpenAI 2025',
)
