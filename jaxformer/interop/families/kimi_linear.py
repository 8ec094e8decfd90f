"""Kimi Linear: Kimi Delta Attention, latent attention without positions, and the experts of
DeepSeek-V3.

On disk every expert has separate tensors, w1 (gate), w3 (up) and w2 (down), as in the published
files; `save_pretrained` of transformers gives dense feed-forward layers the name of the others."""

import dataclasses
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.decoder import attention_rules, decoder_rules, read_decoder, write_decoder
from jaxformer.interop.delta_net import (
  CONVOLUTIONS,
  LINEAR,
  both_of,
  convolution_rules,
  layer_rules,
  read_kinds,
  rules_by_kind,
  write_kinds,
)
from jaxformer.interop.families import deepseek
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.family import blocks_of, family, first_of, part
from jaxformer.interop.rotary import FULL
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.tensors import Shape
from jaxformer.interop.weights import FEED_FORWARD, Rule, arrays, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import KimiDeltaAttention
from jaxformer.layers.init import Normal
from jaxformer.layers.latent_attention import LatentAttention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.router import BiasBalanced
from jaxformer.models.language_model import LanguageModel

# Their name of a field -> the one that transformers accepts too, and that other formats have.
NAMES = {
  'model_max_length': 'max_position_embeddings',
  'moe_renormalize': 'norm_topk_prob',
  'num_expert_group': 'n_group',
  'num_experts': 'num_local_experts',
  'num_experts_per_token': 'num_experts_per_tok',
  'num_shared_experts': 'n_shared_experts',
}
DEFAULTS = {
  'vocab_size': 163840,
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'moe_intermediate_size': 1024,
  'num_hidden_layers': 27,
  'num_attention_heads': 32,
  'max_position_embeddings': 1048576,
  'n_shared_experts': 1,
  'routed_scaling_factor': 2.446,
  'kv_lora_rank': 512,
  'qk_rope_head_dim': 64,
  'qk_nope_head_dim': 128,
  'v_head_dim': 128,
  'n_group': 1,
  'topk_group': 1,
  'num_experts_per_tok': 8,
  'norm_topk_prob': True,
  'rms_norm_eps': 1e-5,
  'num_local_experts': 256,
  'linear_head_dim': 128,
  'linear_num_heads': 32,
  'linear_conv_kernel_dim': 4,
}
# Of `linear_attn_config` in the published files -> our name of it above.
OF_LINEAR = {
  'head_dim': 'linear_head_dim',
  'num_heads': 'linear_num_heads',
  'short_conv_kernel_size': 'linear_conv_kernel_dim',
}
LAYER: Table = {
  'heads': ('linear_num_heads', int),
  'head_dim': ('linear_head_dim', int),
  'd_conv': ('linear_conv_kernel_dim', int),
}
DENSE, SPARSE = 'dense', 'sparse'
TOKEN_IDS = {'pad_token_id': 163839, 'bos_token_id': 163584, 'eos_token_id': 163586}


# ---- from their fields -------------------------------------------------------------------------


def _with_names(hf: Settings) -> Settings:
  """The fields under the names that other formats have, with those of `linear_attn_config`."""
  fields = dict(hf.fields)
  for theirs, ours in NAMES.items():
    if (value := hf.value(theirs)) is not None:
      hf.only(ours, None, value)
      fields[ours] = value
  linear = Settings(hf.get('linear_attn_config', dict, {}), f'{hf.where}: linear_attn_config')
  for theirs, ours in OF_LINEAR.items():
    if (value := linear.value(theirs)) is not None:
      fields[ours] = value
  n, given = hf.count('num_hidden_layers', DEFAULTS['num_hidden_layers']), {}
  for kind, name in ((FULL, 'full_attn_layers'), (LINEAR, 'kda_layers')):
    given |= dict.fromkeys(linear.get(name, list, []), kind)
  if fields.get('layer_types') is None and given:
    if set(given) != set(range(1, n + 1)):
      raise hf.fail('linear_attn_config', f'full_attn_layers and kda_layers with all of 1 to {n}')
    fields['layer_types'] = [given[i] for i in range(1, n + 1)]
  if unread := linear.unread():
    raise linear.fail(unread[0], 'absent')
  found = Settings(fields, hf.where)
  found.read_names = hf.read_names
  return found.with_defaults(DEFAULTS)


def _read_sparse(hf: Settings) -> list[bool]:
  """Whether each layer has experts."""
  n, dense = hf.count('num_hidden_layers'), hf.get('first_k_dense_replace', int, 1)
  kinds = hf.value('mlp_layer_types') or [DENSE if i < dense else SPARSE for i in range(n)]
  if not isinstance(kinds, list) or len(kinds) != n or not {DENSE, SPARSE}.issuperset(kinds):
    raise hf.fail('mlp_layer_types', f'a list of {n} of {DENSE} and {SPARSE}')
  return [kind == SPARSE for kind in kinds]


def read(hf: Settings) -> LanguageModel.Config:
  hf = _with_names(hf)
  hf.only('hidden_act', 'silu', 'swish')  # of the convolutions too
  hf.only('num_key_value_heads', None, hf.count('num_attention_heads'))
  hf.only('moe_layer_freq', 1, None)
  hf.only('moe_router_activation_func', 'sigmoid', None)
  hf.only('mla_use_nope', True, None)
  hf.only('rope_scaling', None)
  # as in transformers the first layer of all is no full one
  kinds = read_kinds(hf, lambda i: FULL if i and i % 4 == 0 else LINEAR)
  sparse, init = _read_sparse(hf), Normal(std=hf.get('initializer_range', float, 0.02))
  delta = KimiDeltaAttention.Config(
    **hf.read(LAYER),
    gate_bias=False,
    norm_eps=hf.get('rms_norm_eps', float),
    init=init,
    out_init=init,
  )
  latent = LatentAttention.Config(
    **hf.read(deepseek.LATENT),
    q_rank=hf.count('q_lora_rank', None),
    position=None,
    latent_norm=deepseek.LATENT_NORM,
  )
  router = BiasBalanced(
    k=hf.count('num_experts_per_tok'),
    scale=hf.positive('routed_scaling_factor'),
    normalized=hf.get('norm_topk_prob', bool),
    init=init,
    **hf.read(deepseek.GROUPS),
  )
  hidden, shared = hf.count('moe_intermediate_size'), hf.count('n_shared_experts')
  experts = hf.count('num_local_experts')

  def mixer(i: int, attention: Attention.Config) -> LayerConfig:
    names = 'heads', 'attention_dropout', 'init', 'out_init'
    settings = {name: getattr(attention, name) for name in names}
    return latent.replace(**settings) if kinds[i] == FULL else delta

  def feed_forward(i: int, mlp: GatedMlp.Config) -> LayerConfig:
    expert = mlp.replace(hidden=hidden)
    moe = Moe.Config(experts=experts, expert=expert, router=router)
    return moe.replace(shared=mlp.replace(hidden=shared * hidden)) if sparse[i] else mlp

  return read_decoder(hf, mixer, feed_forward=feed_forward)


# ---- to their fields ---------------------------------------------------------------------------


def write(config: LanguageModel.Config) -> dict[str, Any]:
  delta, latent = both_of(config, KimiDeltaAttention.Config, LatentAttention.Config)
  blocks = blocks_of(config.stack)
  moe = first_of(blocks, Moe.Config)
  if moe is None or moe.shared is None:
    raise InputError('stack', problem='no block has a mixture of experts with a shared one')
  expert = part(moe.expert, GatedMlp.Config, 'the expert')
  router = part(moe.router, BiasBalanced, 'the router')
  # theirs reads its rotary dimension from `head_dim`
  attention = Attention.Config(
    heads=latent.heads, head_dim=latent.rope_head_dim, attention_dropout=latent.attention_dropout
  )
  fields = {
    **write_decoder(config, attention, first_of(blocks, GatedMlp.Config) or expert),
    **written(latent, deepseek.LATENT),
    **written(router, deepseek.GROUPS),
    **written(delta, LAYER),
    **write_kinds(config),
    'architectures': ['KimiLinearForCausalLM'],
    'q_lora_rank': latent.q_rank,
    'moe_intermediate_size': expert.hidden,
    'num_local_experts': moe.experts,
    'n_shared_experts': moe.shared.hidden // expert.hidden,
    'num_experts_per_tok': router.k,
    'norm_topk_prob': router.normalized,
    'routed_scaling_factor': router.scale,
    'mlp_layer_types': [
      SPARSE if block.branches[-1].layer.expert_count else DENSE for block in blocks
    ],
  }
  theirs = {ours: name for name, ours in NAMES.items()}
  return {theirs.get(name, name): value for name, value in fields.items()}


# ---- weights -----------------------------------------------------------------------------------


def _rate(shape: Shape) -> Shape:
  """[H] -> [1, 1, H, 1]."""
  return 1, 1, *shape, 1


def rules(config: LanguageModel.Config) -> list[Rule]:
  theirs, ours = 'model.layers.{layer}.self_attn.', f'{FEED_FORWARD}.layer.'
  names = {'beta': 'b', 'decay_in': 'f_a', 'decay_out': 'f_b', 'gate_in': 'g_a', 'gate_out': 'g_b'}
  names |= {p: p for p in 'qkv'} | {'out': 'o'}
  projections = {o: f'{t}_proj' for o, t in names.items()} | {'norm': 'o_norm'}
  linear = [*layer_rules(theirs, projections, rate=_rate), *convolution_rules(theirs, CONVOLUTIONS)]
  moe = 'model.layers.{layer}.block_sparse_moe.'
  parts = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  experts = {'expert_gate': 'w1', 'expert_up': 'w3', 'expert_down': 'w2'}
  return [
    *decoder_rules(attention={}),
    *rules_by_kind(config, linear, attention_rules(deepseek.attention_names(config))),
    *modules(parts, f'{ours}shared.', f'{moe}shared_experts.'),
    *modules(experts, ours, f'{moe}experts.{{item}}.'),
    Rule((f'{ours}router.kernel',), f'{moe}gate.weight', transposed=True),
    *arrays({'router.bias': 'gate.e_score_correction_bias'}, ours, moe),
  ]


family(
  dataclasses.replace(
    LLAMA,
    name='kimi_linear',
    read=read,
    write=write,
    rules=rules,
    renamed={r'\.block_sparse_moe\.(gate|up|down)_proj\.': r'.mlp.\1_proj.'},
    token_ids=TOKEN_IDS,
  )
)
