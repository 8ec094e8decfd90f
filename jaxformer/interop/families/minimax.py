"""MiniMax-01: layers of lightning attention and of softmax attention, and mixtures of experts;
residual sums start from the normalized stream, with constant factors.

On disk, experts are Mixtral's. Decays of lightning attention are buffers there, which follow from
the config and are not written. transformers rotates whole heads; the authors' code, and the preset,
rotate half of each."""

import dataclasses
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.decoder import MODEL
from jaxformer.interop.families import llama, mixtral
from jaxformer.interop.family import depth, family, part, std_of
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name, written
from jaxformer.interop.weights import MIXER, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.lightning import LightningAttention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.block import Block, ResidualOfNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped

_DEFAULTS = {
  'vocab_size': 32000,
  'hidden_size': 4096,
  'num_key_value_heads': 8,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'rope_theta': 1e6,
}
_KINDS = {'linear_attention': 'linear_attn', 'full_attention': 'full_attn'}
_INNER_NORM = RMSNorm(eps=1e-6)  # of lightning attention, whatever the config


def _residual(hf: Settings, kind: str) -> dict[str, Any]:
  """The factors of the branches of a kind."""
  scale = hf.positive(f'{kind}_beta_factor', 1.0)
  return {
    'residual': hf.positive(f'{kind}_alpha_factor', 1.0),
    'scale': None if scale == 1.0 else scale,
  }


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_DEFAULTS)
  hf.only('router_jitter_noise', 0.0, 0, None)
  model, init = hf.read(MODEL), Normal(std=hf.get('initializer_range', float, 0.02))
  heads, head_dim = hf.count('num_attention_heads', 32), hf.count('head_dim', None)
  norm = RMSNorm(eps=hf.get('rms_norm_eps', float))
  head_dim = None if head_dim and head_dim * heads == model['width'] else head_dim
  activation = hf.choose('hidden_act', ACTIVATIONS, 'silu')
  inits: dict[str, Any] = {'init': init, 'out_init': init}
  full = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads'),
    head_dim=head_dim,
    position=read_rotary(hf),
    window=hf.count('sliding_window', None),
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    **inits,
  )
  linear = LightningAttention.Config(
    heads=heads, head_dim=head_dim, activation=activation, norm=_INNER_NORM, **inits
  )
  moe = Moe.Config(
    experts=hf.count('num_local_experts', 8),
    expert=GatedMlp.Config(hidden=hf.count('intermediate_size'), activation=activation, **inits),
    router=TopKSoftmax(
      k=hf.count('num_experts_per_tok', 2), pooled_balance=mixtral.balance(hf), init=init
    ),
  )
  experts = ResidualOfNorm(layer=moe, norm=norm, **_residual(hf, 'mlp'))
  blocks = {
    kind: Block.Config(
      branches=(ResidualOfNorm(layer=layer, norm=norm, **_residual(hf, _KINDS[kind])), experts)
    )
    for kind, layer in (('linear_attention', linear), ('full_attention', full))
  }
  return LanguageModel.Config(
    **model,
    stack=grouped([blocks[kind] for kind in _layer_types(hf)]),
    final_norm=norm,
    embedding_init=init,
  )


def _layer_types(hf: Settings) -> list[str]:
  """The kind of each layer; by default they alternate."""
  layers = hf.count('num_hidden_layers', 32)
  kinds = hf.value('layer_types')
  if kinds is None:
    return [('full_attention', 'linear_attention')[i % 2] for i in range(layers)]
  if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(_KINDS):
    raise hf.fail('layer_types', f'a list of {layers} of {", ".join(_KINDS)}')
  return kinds


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = [b for g in config.stack for _ in range(g.repeats) for b in g.pattern]
  of_type: dict[type, Any] = {}
  for block in blocks:
    for branch in block.branches:
      part(branch, ResidualOfNorm, 'a branch of a block')
      of_type.setdefault(type(branch.layer), branch)
  if not {LightningAttention.Config, Moe.Config} <= set(of_type):
    raise InputError('stack', problem='no block has lightning attention and experts')
  linear, experts = of_type[LightningAttention.Config], of_type[Moe.Config]
  full = of_type.get(Attention.Config)
  attention = full.layer if full else Attention.Config(heads=linear.layer.heads)
  moe = experts.layer
  expert = part(moe.expert, GatedMlp.Config, 'the expert of a block')
  names = {LightningAttention.Config: 'linear_attention', Attention.Config: 'full_attention'}
  kinds = [names.get(type(b.branches[0].layer), '') for b in blocks]
  factors = {
    f'{name}_{field}_factor': value
    for name, branch in (('linear_attn', linear), ('full_attn', full), ('mlp', experts))
    if branch is not None
    for field, value in (('alpha', branch.residual), ('beta', branch.scale or 1.0))
  }
  rotary = {} if full is None else write_rotary(full.layer.position)
  return {
    'architectures': ['MiniMaxForCausalLM'],
    **written(config, MODEL),
    **mixtral.write_router(part(moe.router, TopKSoftmax, 'the router of a block')),
    **factors,
    **rotary,
    'intermediate_size': expert.hidden,
    'num_hidden_layers': depth(config.stack),
    'num_attention_heads': linear.layer.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'head_dim': linear.layer.head_size(config.width),
    'hidden_act': activation_name(expert.activation),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'attention_dropout': attention.attention_dropout,
    'num_local_experts': moe.experts,
    'router_jitter_noise': 0.0,
    'sliding_window': attention.window,
    'layer_types': kinds,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  lightning = {'qkv': 'qkv_proj', 'g': 'output_gate', 'out': 'out_proj', 'norm': 'norm'}
  return [
    *mixtral.rules(config),
    *modules(lightning, f'{MIXER}.layer.', 'model.layers.{layer}.self_attn.'),
  ]


family(
  dataclasses.replace(
    llama.LLAMA,
    name='minimax',
    read=read,
    write=write,
    rules=rules,
    ignored=(
      *llama.LLAMA.ignored,
      r'model\.layers\.\d+\.self_attn\.(slope_rate|(query|key|diagonal)_decay)',
    ),
    aliases={'num_experts': 'num_local_experts'},
  )
)
