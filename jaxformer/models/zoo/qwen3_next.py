"""Qwen3-Next (Qwen Team 2025) and Qwen3.5 (Qwen Team 2026): gated DeltaNet in three of four layers,
attention with an output gate, norms of queries and keys and rotary positions of a quarter of the
channels in the fourth. Norms multiply by 1 + w. Each block of Qwen3-Next and of the larger Qwen3.5
has many small SwiGLU experts and a shared one with a gate; the smaller Qwen3.5 is dense. Without
multi-token prediction, and of Qwen3.5 the text model.

Sizes and the weight of the balancing loss are those of the configurations in transformers, base and
context those of the published files as remembered."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import GatedDeltaNet
from jaxformer.layers.init import Ones
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import LogUniformRate
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import SoftmaxTopK
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

NORM = RMSNorm(eps=1e-6, unit_offset=True)
ROTARY = Rotary(theta=1e7, fraction=0.25)
PERIOD = 4  # the last layer of each period attends


def qwen3_next(
  width: int,
  layers: int,
  feed_forward: LayerConfig,
  heads: tuple[int, int],
  head_dim: int,
  delta_heads: tuple[int, int],
  delta_head_dim: int,
  **fields: Any,
) -> LanguageModel.Config:
  """The Qwen3-Next architecture.

  Args:
    heads: of queries, and of keys and values; `head_dim` their channels.
    delta_heads: of keys and of values of gated DeltaNet; `delta_head_dim` the channels of both.
    fields: of the config: `vocab_size`, `context_length`.
  """
  delta = GatedDeltaNet.Config(
    heads=delta_heads[0],
    value_heads=delta_heads[1],
    head_dim=delta_head_dim,
    value_head_dim=delta_head_dim,
    norm_eps=NORM.eps,
    dt_init=Ones(),
    rate_init=LogUniformRate(low=0.01),
  )
  attention = Attention.Config(
    heads=heads[0],
    kv_heads=heads[1],
    head_dim=head_dim,
    position=ROTARY,
    qk_norm=NORM,
    output_gate=True,
  )
  blocks = ((mixer, feed_forward) for mixer in (*[delta] * (PERIOD - 1), attention))
  return pre_norm_model(width, layers, *blocks, norm=NORM, **fields)


def experts(number: int, k: int, hidden: int) -> Moe.Config:
  """`k` experts per token and a shared one, all with the same hidden units."""
  expert = GatedMlp.Config(hidden=hidden)
  router = SoftmaxTopK(k=k, normalized=True, pooled_balance=0.001)
  return Moe.Config(experts=number, expert=expert, router=router, shared=expert, shared_gate=True)


preset(
  'qwen3-next-80b-a3b',
  'qwen3-next',
  qwen3_next(
    2048,
    48,
    experts(512, 10, 512),
    (16, 2),
    256,
    (16, 32),
    128,
    vocab_size=151936,
    context_length=262144,
  ),
)

preset(
  'qwen3.5-9b',
  'qwen3.5',
  qwen3_next(
    4096,
    32,
    GatedMlp.Config(hidden=12288),
    (16, 4),
    256,
    (16, 32),
    128,
    vocab_size=248320,
    context_length=262144,
  ),
)
preset(
  'qwen3.5-35b-a3b',
  'qwen3.5',
  qwen3_next(
    2048,
    40,
    experts(256, 8, 512),
    (16, 2),
    256,
    (16, 32),
    128,
    vocab_size=248320,
    context_length=262144,
  ),
)


def _small(
  feed_forward: LayerConfig, *, width: int, layers: int, **sizes: Any
) -> LanguageModel.Config:
  """Keys and queries of gated DeltaNet as wide as the model, and values and attention twice."""
  n = heads_for(width, 2)
  return qwen3_next(
    width, layers, feed_forward, (n, n // 2), 2 * width // n, (n, 2 * n), width // n, **sizes
  )


def _next(*, hidden: int, **sizes: Any) -> LanguageModel.Config:
  """Three of sixteen experts per token and a shared one, which together have the hidden units of a
  dense layer."""
  return _small(experts(16, 3, max(8, hidden // 4)), **sizes)


def _dense(*, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return _small(GatedMlp.Config(hidden=hidden), **sizes)


preset('qwen3.5-tiny', 'qwen3.5', _dense(width=64, layers=4, hidden=192, **TINY))
family('qwen3.5', _dense, width_step=2 * HEAD, layer_step=PERIOD, hidden=two_thirds)
preset('qwen3-next-tiny', 'qwen3-next', _next(width=64, layers=4, hidden=192, **TINY))
family('qwen3-next', _next, width_step=2 * HEAD, layer_step=PERIOD, hidden=two_thirds)

step(
  'qwen3-next',
  Chapter.HYBRIDS,
  2025,
  'y = gated delta rule, or (softmax(q k^T) v * sigmoid(x W_g)) W_o, 3 : 1; 10 of 512 experts',
  'Two value heads read each key head; attention has a gate on its output too, and so has the '
  'shared expert.',
  'Qwen Team 2025',
)
step(
  'qwen3.5',
  Chapter.HYBRIDS,
  2026,
  'y = gated delta rule, or gated attention, 3 : 1; dense or 8 of 256 experts',
  'The hybrid becomes the text model of a series of all sizes, with experts and without.',
  'Qwen Team 2026',
)
