"""DeepSeek-V2 and DeepSeek-V3: latent attention, and many small experts beside a shared one from
layer `first_k_dense_replace` on.

On disk every expert has separate tensors, as in the published files. Files of DeepSeek-V3 have a
layer more, of multi-token prediction, which is not read. Both versions of transformers' attention
multiply the logits by the square of YaRN's magnitude at `mscale_all_dim`; norms of latents have
`eps` 1e-6 whatever the config."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.decoder import blocks_of, decoder_rules, read_decoder, write_decoder
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.family import family, first_of, part
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import FEED_FORWARD, Rule, arrays, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.latent_attention import LatentAttention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary, YarnScaling
from jaxformer.layers.rotary_scaling import yarn_magnitude
from jaxformer.layers.router import BiasBalanced, GroupedConfig, SoftmaxTopK
from jaxformer.models.language_model import LanguageModel

_V2 = {
  'vocab_size': 102400,
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'moe_intermediate_size': 1407,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'max_position_embeddings': 2048,
  'kv_lora_rank': 512,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'v_head_dim': 128,
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'first_k_dense_replace': 0,
  'routed_scaling_factor': 1.0,
  'topk_method': 'greedy',
}
_V3 = _V2 | {
  'vocab_size': 129280,
  'hidden_size': 7168,
  'intermediate_size': 18432,
  'moe_intermediate_size': 2048,
  'num_hidden_layers': 61,
  'num_attention_heads': 128,
  'max_position_embeddings': 4096,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'n_group': 8,
  'topk_group': 4,
  'num_experts_per_tok': 8,
  'first_k_dense_replace': 3,
  'routed_scaling_factor': 2.5,
  'norm_topk_prob': True,
  'rope_interleave': True,
  'topk_method': 'noaux_tc',
}
LATENT: Table = {
  'head_dim': ('qk_nope_head_dim', int),
  'rope_head_dim': ('qk_rope_head_dim', int),
  'v_head_dim': ('v_head_dim', int),
  'kv_rank': ('kv_lora_rank', int),
  'bias': ('attention_bias', False),
}
LATENT_NORM = RMSNorm(eps=1e-6)
GROUPS: Table = {'groups': ('n_group', int), 'groups_per_token': ('topk_group', int)}
_GREEDY, _IN_GROUPS = 'greedy', 'group_limited_greedy'


# ---- from their fields -------------------------------------------------------------------------


def _read(
  hf: Settings,
  router: Callable[..., GroupedConfig],
  *,
  interleaved: bool = True,
  mlp_bias: bool = False,
) -> LanguageModel.Config:
  """The architecture; `hf` has the defaults of its version.

  Args:
    router: its config, from the experts per token and the factor on their weights.
  """
  hf.only('num_key_value_heads', None, hf.count('num_attention_heads'))
  hf.only('moe_layer_freq', 1, None)
  rotary = read_rotary(hf).replace(interleaved=interleaved)
  latent = LatentAttention.Config(
    **hf.read(LATENT),
    q_rank=hf.count('q_lora_rank', None),
    position=rotary,
    latent_norm=LATENT_NORM,
  )
  latent = latent.replace(scale=_scale(rotary, latent.query_size))
  dense = hf.get('first_k_dense_replace', int)
  if dense < 0:
    raise hf.fail('first_k_dense_replace', 'at least 0')
  hidden, shared = hf.count('moe_intermediate_size'), hf.count('n_shared_experts')
  experts = hf.count('n_routed_experts')
  chosen = router(k=hf.count('num_experts_per_tok'), scale=hf.positive('routed_scaling_factor'))

  def attention_of(_: int, attention: Attention.Config) -> LayerConfig:
    names = 'heads', 'attention_dropout', 'init', 'out_init'
    return latent.replace(**{name: getattr(attention, name) for name in names})

  def feed_forward(i: int, mlp: GatedMlp.Config) -> LayerConfig:
    if i < dense:
      return mlp
    return Moe.Config(
      experts=experts,
      expert=mlp.replace(hidden=hidden, bias=False),
      router=chosen.replace(init=mlp.init),
      shared=mlp.replace(hidden=shared * hidden),
    )

  return read_decoder(hf, attention_of, feed_forward=feed_forward, mlp_bias=mlp_bias)


def _scale(rotary: Rotary, query_size: int) -> float | None:
  """The factor on the logits of attention; None where positions do not change it."""
  scaling = rotary.scaling
  if type(scaling) is not YarnScaling or scaling.mscale_all_dim is None:
    return None
  growth = yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
  return growth**2 / math.sqrt(query_size)


def read_v2(hf: Settings) -> LanguageModel.Config:
  """Neither norm_topk_prob nor rope_interleave have an effect in transformers."""
  hf = hf.with_defaults(_V2, *_V2)
  hf.only('scoring_func', 'softmax', None)
  hf.only('norm_topk_prob', False, None)
  hf.only('rope_interleave', True, None)
  hf.only('topk_method', _GREEDY, _IN_GROUPS)
  groups = hf.read(GROUPS) if hf.value('topk_method') == _IN_GROUPS else {}
  balance = None
  if hf.get('seq_aux', bool, True):
    balance = hf.get('aux_loss_alpha', float, None) or None

  def router(**fields: Any) -> SoftmaxTopK:
    return SoftmaxTopK(**fields, **groups, sequence_balance=balance)

  return _read(hf, router, mlp_bias=hf.get('mlp_bias', bool, False))


def read_v3(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_V3, *_V3)
  hf.only('scoring_func', 'sigmoid', None)
  hf.only('topk_method', 'noaux_tc')
  hf.only('mlp_bias', False, None)
  normalized = hf.get('norm_topk_prob', bool)
  groups = hf.read(GROUPS)

  def router(**fields: Any) -> BiasBalanced:
    return BiasBalanced(**fields, **groups, normalized=normalized)

  return _read(hf, router, interleaved=hf.get('rope_interleave', bool))


# ---- to their fields ---------------------------------------------------------------------------


def _write(
  config: LanguageModel.Config, router: type[GroupedConfig]
) -> tuple[dict[str, Any], LatentAttention.Config, Moe.Config]:
  """The fields that both versions share, and the layers of the first block with experts."""
  blocks = blocks_of(config)
  sparse = next((i for i, b in enumerate(blocks) if b.branches[-1].layer.expert_count), None)
  if sparse is None:
    raise InputError('stack', problem='no block has a mixture of experts')
  where = f'of block {sparse}'
  first, last = blocks[sparse].branches[0].layer, blocks[sparse].branches[-1].layer
  latent = part(first, LatentAttention.Config, f'the first layer {where}')
  moe = part(last, Moe.Config, f'the last layer {where}')
  expert = part(moe.expert, GatedMlp.Config, f'the expert {where}')
  chosen = part(moe.router, router, f'the router {where}')
  # theirs reads its rotary dimension from `head_dim`
  attention = Attention.Config(
    heads=latent.heads, head_dim=latent.rope_head_dim, attention_dropout=latent.attention_dropout
  )
  fields = {
    **write_decoder(config, attention, first_of(blocks, GatedMlp.Config) or expert),
    **write_rotary(part(latent.position, Rotary, f'the position {where}')),
    **written(latent, LATENT),
    **written(chosen, GROUPS),
    'q_lora_rank': latent.q_rank,
    'first_k_dense_replace': sparse,
    'moe_layer_freq': 1,
    'moe_intermediate_size': expert.hidden,
    'n_routed_experts': moe.experts,
    'n_shared_experts': 0 if moe.shared is None else moe.shared.hidden // expert.hidden,
    'num_experts_per_tok': chosen.k,
    'norm_topk_prob': chosen.normalized,
    'routed_scaling_factor': chosen.scale,
  }
  return fields, latent, moe


def write_v2(config: LanguageModel.Config) -> dict[str, Any]:
  fields, _, moe = _write(config, SoftmaxTopK)
  router = part(moe.router, SoftmaxTopK, 'the router')
  return fields | {
    'architectures': ['DeepseekV2ForCausalLM'],
    'mlp_bias': moe.shared is not None and moe.shared.bias,
    'scoring_func': 'softmax',
    'topk_method': _GREEDY if router.groups == 1 else _IN_GROUPS,
    'aux_loss_alpha': router.sequence_balance or 0.0,
    'seq_aux': True,
  }


def write_v3(config: LanguageModel.Config) -> dict[str, Any]:
  fields, latent, _ = _write(config, BiasBalanced)
  return fields | {
    'architectures': ['DeepseekV3ForCausalLM'],
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'rope_interleave': part(latent.position, Rotary, 'the position').interleaved,
    'num_nextn_predict_layers': 0,
  }


# ---- weights -----------------------------------------------------------------------------------


def attention_names(config: LanguageModel.Config) -> dict[str, str]:
  """Ours -> theirs of the parts of latent attention."""
  latent = first_of(blocks_of(config), LatentAttention.Config)
  low_rank = latent is not None and latent.q_rank is not None
  return {
    'q_down': 'q_a_proj',
    'q_norm': 'q_a_layernorm',
    'q': 'q_b_proj' if low_rank else 'q_proj',
    'kv_down': 'kv_a_proj_with_mqa',
    'kv_norm': 'kv_a_layernorm',
    'kv_up': 'kv_b_proj',
    'o': 'o_proj',
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = f'{FEED_FORWARD}.layer.', 'model.layers.{layer}.mlp.'
  parts = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  return [
    *decoder_rules(attention=attention_names(config)),
    *modules(parts, f'{ours}shared.', f'{theirs}shared_experts.'),
    *modules(parts, f'{ours}expert_', f'{theirs}experts.{{item}}.'),
    Rule((f'{ours}router.kernel',), f'{theirs}gate.weight', transposed=True),
    *arrays({'router.bias': 'gate.e_score_correction_bias'}, ours, theirs),
  ]


V2 = dataclasses.replace(
  LLAMA,
  name='deepseek_v2',
  read=read_v2,
  write=write_v2,
  rules=rules,
  token_ids={'bos_token_id': 1, 'eos_token_id': 2},
  aliases={'num_experts': 'n_routed_experts'},
)
family(V2)
family(
  dataclasses.replace(
    V2,
    name='deepseek_v3',
    read=read_v3,
    write=write_v3,
    # the layer of multi-token prediction in the published files
    ignored=(*V2.ignored, r'model\.layers\.61\..*'),
    token_ids={'bos_token_id': 0, 'eos_token_id': 1},
    aliases={'num_local_experts': 'n_routed_experts'},
  )
)
