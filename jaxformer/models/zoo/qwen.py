"""Qwen2.5 (Qwen Team 2024, arXiv:2412.15115) and the dense models of Qwen3 (Qwen Team 2025,
arXiv:2505.09388): Llama's blocks with biases of queries, keys and values, and in Qwen3 norms of
each head's query and key in their place. The embedding of the small models is tied."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
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

ROTARY = Rotary(theta=1e6)


def qwen2(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  eps: float = 1e-6,
  **fields: Any,
) -> LanguageModel.Config:
  """The Qwen2 and Qwen2.5 architecture; `fields` of the config: `vocab_size`, `context_length`,
  `tied`."""
  attention = Attention.Config(
    heads=heads, kv_heads=kv_heads, position=ROTARY, bias=True, out_bias=False
  )
  block = attention, GatedMlp.Config(hidden=hidden)
  return pre_norm_model(width, layers, block, norm=RMSNorm(eps=eps), **fields)


def qwen3(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  *,
  head_dim: int | None = 128,
  **fields: Any,
) -> LanguageModel.Config:
  """The Qwen3 architecture; `fields` as of `qwen2`."""
  norm = RMSNorm(eps=1e-6)
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    head_dim=None if head_dim and head_dim * heads == width else head_dim,
    position=ROTARY,
    qk_norm=norm,
  )
  return pre_norm_model(
    width, layers, (attention, GatedMlp.Config(hidden=hidden)), norm=norm, **fields
  )


for name, tied, vocab_size, context_length, eps, *sizes in (
  # width, layers, hidden, heads, kv_heads
  ('qwen2.5-0.5b', True, 151936, 32768, 1e-6, 896, 24, 4864, 14, 2),
  ('qwen2.5-1.5b', True, 151936, 131072, 1e-6, 1536, 28, 8960, 12, 2),
  ('qwen2.5-3b', True, 151936, 32768, 1e-6, 2048, 36, 11008, 16, 2),
  ('qwen2.5-7b', False, 152064, 131072, 1e-6, 3584, 28, 18944, 28, 4),
  ('qwen2.5-14b', False, 152064, 131072, 1e-5, 5120, 48, 13824, 40, 8),
  ('qwen2.5-32b', False, 152064, 131072, 1e-5, 5120, 64, 27648, 40, 8),
  ('qwen2.5-72b', False, 152064, 131072, 1e-5, 8192, 80, 29568, 64, 8),
):
  model = qwen2(*sizes, eps=eps, vocab_size=vocab_size, context_length=context_length, tied=tied)
  preset(name, 'qwen2.5', model)
preset('qwen2.5-tiny', 'qwen2.5', qwen2(128, 4, 352, 4, 2, tied=True, **TINY))

for name, tied, *sizes in (  # width, layers, hidden, heads, kv_heads
  ('qwen3-0.6b', True, 1024, 28, 3072, 16, 8),
  ('qwen3-1.7b', True, 2048, 28, 6144, 16, 8),
  ('qwen3-4b', True, 2560, 36, 9728, 32, 8),
  ('qwen3-8b', False, 4096, 36, 12288, 32, 8),
  ('qwen3-14b', False, 5120, 40, 17408, 40, 8),
  ('qwen3-32b', False, 5120, 64, 25600, 64, 8),
):
  model = qwen3(*sizes, vocab_size=151936, context_length=40960, tied=tied)
  preset(name, 'qwen3', model)
preset('qwen3-tiny', 'qwen3', qwen3(128, 4, 352, 4, 2, head_dim=48, tied=True, **TINY))


def _grown2(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return qwen2(width, layers, hidden, n, n // 2, **sizes)


def _grown3(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  n = heads_for(width, 2)
  return qwen3(width, layers, hidden, n, n // 2, head_dim=None, **sizes)


family('qwen2.5', _grown2, width_step=2 * HEAD, hidden=two_thirds)
family('qwen3', _grown3, width_step=2 * HEAD, hidden=two_thirds)

step(
  'qwen2.5',
  Chapter.TRANSFORMERS,
  2024,
  'q, k, v = x W + b; o without a bias',
  'Biases of queries, keys and values alone; eighteen trillion tokens for models of every size.',
  'Qwen Team 2024',
)
step(
  'qwen3',
  Chapter.TRANSFORMERS,
  2025,
  'softmax(norm(q_h) norm(k_h)^T / sqrt(K)) v_h',
  "A norm of each head's query and key bounds the logits, in place of biases.",
  'Qwen Team 2025',
)
