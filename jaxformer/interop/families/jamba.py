"""Jamba: Mamba and attention layers, feed-forward layers and mixtures of experts. On disk, every
expert has separate tensors."""

import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.families import mamba
from jaxformer.interop.families.mixtral import balance, write_router
from jaxformer.interop.family import depth, family, part, std_of
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import SoftmaxTopK
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group, grouped

MODEL: Table = {
  'vocab_size': ('vocab_size', 65536),
  'width': ('hidden_size', 4096),
  'context_length': ('max_position_embeddings', 262144),
  'tied': ('tie_word_embeddings', False),
}
LAYER: Table = {
  'd_state': ('mamba_d_state', 16),
  'expand': ('mamba_expand', 2),
  'd_conv': ('mamba_d_conv', 4),
  'bias': ('mamba_proj_bias', False),
  'conv_bias': ('mamba_conv_bias', True),
}


def periodic(hf: Settings, what: str, period: int, offset: int) -> tuple[int, int]:
  """(period, offset) of the layers of a kind: those with index = offset modulo period."""
  period = hf.count(f'{what}_layer_period', period)
  offset = hf.get(f'{what}_layer_offset', int, offset)
  if not 0 <= offset < period:
    raise hf.fail(f'{what}_layer_offset', f'at least 0 and below the period, {period}')
  return period, offset


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba layers is the authors', which transformers does not follow."""
  hf.only('hidden_act', 'silu', 'swish')
  hf.only('sliding_window', None)
  hf.only('router_jitter_noise', 0.0, None)
  model, init = hf.read(MODEL), Normal(std=hf.get('initializer_range', float, 0.02))
  norm = RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6))
  mixer = Mamba.Config(
    **hf.read(LAYER), dt_rank=mamba.dt_rank(hf, 'mamba_dt_rank', model['width']), inner_norm=norm
  )
  attention = Attention.Config(
    heads=hf.count('num_attention_heads', 32),
    kv_heads=hf.count('num_key_value_heads', 8),
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    init=init,
    out_init=init,
  )
  mlp = GatedMlp.Config(hidden=hf.count('intermediate_size', 14336), init=init, out_init=init)
  experts = hf.count('num_experts', 16)
  router = SoftmaxTopK(k=hf.count('num_experts_per_tok', 2), pooled_balance=balance(hf), init=init)
  moe = mlp if experts == 1 else Moe.Config(experts=experts, expert=mlp, router=router)
  attends, sparse = periodic(hf, 'attn', 8, 4), periodic(hf, 'expert', 2, 1)

  def block(i: int) -> Block.Config:
    layers = (
      attention if i % attends[0] == attends[1] else mixer,
      moe if i % sparse[0] == sparse[1] else mlp,
    )
    return Block.Config(branches=tuple(PreNorm(layer=layer, norm=norm) for layer in layers))

  indices = range(hf.count('num_hidden_layers', 32))
  attending = [i % attends[0] == attends[1] for i in indices]
  hf.only('layers_block_type', None, ['attention' if a else 'mamba' for a in attending])
  hf.only('layer_types', None, [f'{"full" if a else "linear"}_attention' for a in attending])
  hf.only(
    'layers_num_experts', None, [experts if i % sparse[0] == sparse[1] else 1 for i in indices]
  )
  hf.only('head_dim', None, model['width'] // attention.heads)
  blocks, period = [block(i) for i in indices], math.lcm(attends[0], sparse[0])
  # The groups of the zoo, which are whole periods even where there is only one.
  periods = Group(pattern=tuple(blocks[:period]), repeats=len(blocks) // period)
  stack = grouped(blocks) if len(blocks) % period else (periods,)
  return LanguageModel.Config(**model, stack=stack, final_norm=norm, embedding_init=init)


def _period(where: list[bool]) -> tuple[int, int]:
  """The period and offset of the positions that are True, as if they were periodic."""
  at, n = [i for i, true in enumerate(where) if true], len(where)
  return (n + 1, n) if not at else (n, at[0]) if len(at) == 1 else (at[1] - at[0], at[0])


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = [
    {type(branch.layer): branch.layer for branch in block.branches}
    for group in config.stack
    for _ in range(group.repeats)
    for block in group.pattern
  ]
  first: dict[type, Any] = {kind: layer for b in reversed(blocks) for kind, layer in b.items()}
  mixer, moe = first.get(Mamba.Config), first.get(Moe.Config)
  mlp = first.get(GatedMlp.Config) or (moe and moe.expert)
  if mixer is None or mlp is None:
    raise InputError('stack', problem='no block has a Mamba layer and a feed-forward layer')
  attends = _period([Attention.Config in b for b in blocks])
  sparse = _period([Moe.Config in b for b in blocks])
  router = part(moe.router, SoftmaxTopK, 'the router') if moe else SoftmaxTopK()
  attention = first.get(Attention.Config, Attention.Config())
  return {
    'architectures': ['JambaForCausalLM'],
    **written(config, MODEL),
    **written(mixer, LAYER),
    **write_router(router),
    'intermediate_size': part(mlp, GatedMlp.Config, 'the feed-forward layer').hidden,
    'num_hidden_layers': depth(config.stack),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'hidden_act': 'silu',
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'attention_dropout': attention.attention_dropout,
    'num_experts': moe.experts if moe else 1,
    'attn_layer_period': attends[0],
    'attn_layer_offset': attends[1],
    'expert_layer_period': sparse[0],
    'expert_layer_offset': sparse[1],
    'mamba_dt_rank': mixer.rank(config.width),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, ours = 'model.layers.{layer}.', f'{FEED_FORWARD}.layer.'
  parts = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  return [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}input_layernorm',
        f'{FEED_FORWARD}.norm': f'{layer}pre_ff_layernorm',
        'final_norm': 'model.final_layernorm',
        'head': 'lm_head',
      }
    ),
    *modules({p: f'self_attn.{p}_proj' for p in 'qkvo'}, f'{MIXER}.layer.', layer),
    *mamba.mixer_rules(f'{layer}mamba.'),
    *modules(
      {f'norms.{i}': f'{n}_layernorm' for i, n in enumerate(('dt', 'b', 'c'))},
      f'{MIXER}.layer.',
      f'{layer}mamba.',
    ),
    *modules({**parts, 'router': 'router'}, ours, f'{layer}feed_forward.'),
    *modules(parts, f'{ours}expert_', f'{layer}feed_forward.experts.{{item}}.'),
  ]


family(
  CheckpointFormat(
    'jamba',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
    aliases={'num_local_experts': 'num_experts'},
  )
)
