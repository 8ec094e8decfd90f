"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434) and DeepSeek-V3 (DeepSeek-AI 2024, arXiv
2412.19437, without multi-token prediction): latent attention, and many small SwiGLU experts beside
shared ones in all layers but the first. Pre-norm RMSNorm, no biases."""

import functools
import math
from typing import Any

from jaxformer.layers.init import Normal
from jaxformer.layers.latent_attention import LatentAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary, YarnScaling
from jaxformer.layers.rotary_scaling import yarn_magnitude
from jaxformer.layers.router import BiasBalanced, RouterConfig, SoftmaxTopK
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, heads_for, preset, two_thirds
from jaxformer.models.zoo.story import Chapter, step


def deepseek(
  width: int,
  layers: int,
  hidden: int,
  attention: LatentAttention.Config,
  *,
  dense: int,
  experts: int,
  expert_hidden: int,
  shared: int,
  router: RouterConfig,
  std: float = 0.006,
  **fields: Any,
) -> LanguageModel.Config:
  """The DeepSeek architecture.

  Args:
    hidden: hidden units of the feed-forward layers of the first `dense` layers.
    expert_hidden: of each expert; the shared layer has those of `shared` experts.
    std: of the initialization of all matrices.
    fields: of the config: `vocab_size`, `context_length`.
  """
  norm, init = RMSNorm(eps=1e-6), Normal(std=std)
  drawn: dict[str, Any] = {'init': init, 'out_init': init}
  attention = attention.replace(**drawn)
  moe = Moe.Config(
    experts=experts,
    expert=GatedMlp.Config(hidden=expert_hidden, **drawn),
    router=router.replace(init=init),
    shared=GatedMlp.Config(hidden=shared * expert_hidden, **drawn) if shared else None,
  )
  groups = (
    (pre_norm(norm, attention, GatedMlp.Config(hidden=hidden, **drawn)), dense),
    (pre_norm(norm, attention, moe), layers - dense),
  )
  return LanguageModel.Config(
    width=width,
    stack=tuple(Group(pattern=(block,), repeats=n) for block, n in groups if n),
    final_norm=norm,
    embedding_init=init,
    head_init=init,
    **fields,
  )


def latent(
  heads: int, head_dim: int, *, q_rank: int | None, mscale: float | None = None
) -> LatentAttention.Config:
  """Latent attention in the proportions of the papers: a rotary key of half a head and a latent of
  four heads, whatever the number of heads.

  Args:
    mscale: weight in the growth of the logits by the extension of the context to 40 times 4,096
      tokens; None for no extension.
  """
  rotary = head_dim // 2
  scaling, scale = None, None
  if mscale is not None:
    scaling = YarnScaling(factor=40.0, original_context=4096, mscale=mscale, mscale_all_dim=mscale)
    scale = yarn_magnitude(40.0, mscale) ** 2 / math.sqrt(head_dim + rotary)
  return LatentAttention.Config(
    heads=heads,
    head_dim=head_dim,
    rope_head_dim=rotary,
    v_head_dim=head_dim,
    kv_rank=4 * head_dim,
    q_rank=q_rank,
    position=Rotary(scaling=scaling, interleaved=True),
    scale=scale,
  )


V2 = functools.partial(SoftmaxTopK, k=6, sequence_balance=0.003)
# The step of the biases is 0.001 in the paper, and here at the peak learning rate.
V3 = functools.partial(BiasBalanced, sequence_balance=1e-4, bias_rate=0.001 / 2.2e-4)

preset(
  'deepseek-v2-lite',
  'deepseek-v2',
  deepseek(
    2048,
    27,
    10944,
    latent(16, 128, q_rank=None, mscale=0.707),
    dense=1,
    experts=64,
    expert_hidden=1408,
    shared=2,
    router=V2(sequence_balance=0.001),
    vocab_size=102400,
    context_length=163840,
  ),
)
preset(
  'deepseek-v2',
  'deepseek-v2',
  deepseek(
    5120,
    60,
    12288,
    latent(128, 128, q_rank=1536, mscale=0.707),
    dense=1,
    experts=160,
    expert_hidden=1536,
    shared=2,
    router=V2(groups=8, groups_per_token=3, scale=16.0),
    vocab_size=102400,
    context_length=163840,
  ),
)
preset(
  'deepseek-v3',
  'deepseek-v3',
  deepseek(
    7168,
    61,
    18432,
    latent(128, 128, q_rank=1536, mscale=1.0),
    dense=3,
    experts=256,
    expert_hidden=2048,
    shared=1,
    router=V3(k=8, groups=8, groups_per_token=4, scale=2.5),
    vocab_size=129280,
    context_length=163840,
  ),
)


def _small(
  make_router: Any, q_rank: int | None, *, width: int, layers: int, hidden: int, **sizes: Any
) -> LanguageModel.Config:
  """Three of sixteen experts per token and a shared one, which together have the hidden units of a
  dense layer."""
  heads = heads_for(width)
  return deepseek(
    width,
    layers,
    hidden,
    latent(heads, width // heads, q_rank=q_rank),
    dense=1,
    experts=16,
    expert_hidden=max(8, hidden // 4),
    shared=1,
    router=make_router(k=3, groups=4, groups_per_token=2, scale=2.5),
    **sizes,
  )


def _v2(**sizes: Any) -> LanguageModel.Config:
  return _small(V2, None, **sizes)


def _v3(*, width: int, **sizes: Any) -> LanguageModel.Config:
  return _small(V3, width // 2, width=width, **sizes)


for name, grown in (('deepseek-v2', _v2), ('deepseek-v3', _v3)):
  preset(f'{name}-tiny', name, grown(width=96, layers=3, hidden=256, **TINY))
  family(name, grown, width_step=HEAD, hidden=two_thirds, fewest_layers=2)

step(
  'deepseek-v2',
  Chapter.LATENT,
  2024,
  'k, v = c W_ukv with one latent c = norm(x W_dkv) for all heads',
  'The cache of 128 heads shrinks to 576 numbers per token and layer.',
  'DeepSeek-AI 2024, DeepSeek-V2',
)
step(
  'deepseek-v3',
  Chapter.LATENT,
  2024,
  'top k of sigmoid(x W) + b in the best groups, b -= rate sign(load - mean load)',
  'The load of 256 experts is balanced by a bias on the choice, nearly without a loss.',
  'DeepSeek-AI 2024, DeepSeek-V3',
)
