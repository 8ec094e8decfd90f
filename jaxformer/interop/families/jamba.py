"""Jamba: Mamba and attention layers, feed-forward layers and mixtures of experts. On disk, every
expert has separate tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from jaxformer.config import InputError
from jaxformer.interop.families import mamba
from jaxformer.interop.families.mixtral import EXPERTS, balance, write_router
from jaxformer.interop.family import CheckpointFormat, blocks, branches, family, part, std_of
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import Names, Rule, linear, same
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import SoftmaxTopK
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.user_code import is_a

L = TypeVar('L', bound=LayerConfig)


def periodic(hf: Settings, what: str, period: int, offset: int) -> tuple[int, int]:
  """(period, offset) of the layers of a kind: those with index = offset modulo period."""
  period = hf.count(f'{what}_layer_period', period)
  offset = hf.get(f'{what}_layer_offset', int, offset)
  if not 0 <= offset < period:
    raise hf.fail(f'{what}_layer_offset', f'at least 0 and below the period, {period}')
  return period, offset


def shortest(blocks: list[Block.Config]) -> Group:
  """The shortest repeated pattern that equals the blocks."""
  n = len(blocks)
  period = next(p for p in range(1, n + 1) if n % p == 0 and blocks == blocks[:p] * (n // p))
  return Group(pattern=tuple(blocks[:period]), repeats=n // period)


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba layers is the authors', which transformers does not follow."""
  hf.only('hidden_act', 'silu', 'swish')
  hf.only('sliding_window', None)
  width, std = hf.count('hidden_size', 4096), hf.get('initializer_range', float, 0.02)
  init, norm, automatic = (
    Normal(std=std),
    RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6)),
    -(-width // 16),
  )
  rank = (
    automatic
    if hf.fields.get('mamba_dt_rank', 'auto') in ('auto', None)
    else hf.count('mamba_dt_rank')
  )
  mixer = Mamba.Config(
    d_state=hf.count('mamba_d_state', 16),
    expand=hf.count('mamba_expand', 2),
    d_conv=hf.count('mamba_d_conv', 4),
    dt_rank=None if rank == automatic else rank,
    bias=hf.get('mamba_proj_bias', bool, False),
    conv_bias=hf.get('mamba_conv_bias', bool, True),
    inner_norm=norm,
  )
  attention = Attention.Config(
    heads=hf.count('num_attention_heads', 32),
    kv_heads=hf.count('num_key_value_heads', 8),
    init=init,
    out_init=init,
  )
  mlp = GatedMlp.Config(hidden=hf.count('intermediate_size', 14336), init=init, out_init=init)
  experts, layers = hf.count('num_experts', 16), hf.count('num_hidden_layers', 32)
  router = SoftmaxTopK(k=hf.count('num_experts_per_tok', 2), balance=balance(hf, 0.001), init=init)
  moe = mlp if experts == 1 else Moe.Config(experts=experts, expert=mlp, router=router)
  attends, sparse = periodic(hf, 'attn', 8, 4), periodic(hf, 'expert', 2, 1)

  def block(i: int) -> Block.Config:
    parts = (
      attention if i % attends[0] == attends[1] else mixer,
      moe if i % sparse[0] == sparse[1] else mlp,
    )
    return Block.Config(branches=tuple(PreNorm(layer=layer, norm=norm) for layer in parts))

  return LanguageModel.Config(
    vocab_size=hf.count('vocab_size', 65536),
    width=width,
    context_length=hf.count('max_position_embeddings', 262144),
    stack=(shortest([block(i) for i in range(layers)]),),
    final_norm=norm,
    tied=hf.get('tie_word_embeddings', bool, False),
    embedding_init=init,
  )


def _period(where: list[bool]) -> tuple[int, int]:
  """The period and offset of the positions that are True, as if they were periodic."""
  at, n = [i for i, true in enumerate(where) if true], len(where)
  return (n + 1, n) if not at else (n, at[0]) if len(at) == 1 else (at[1] - at[0], at[0])


def write(config: LanguageModel.Config) -> dict[str, Any]:
  stack = blocks(config)
  layers = [tuple(branch.layer for branch in branches(block, 2)) for block in stack]

  def first(place: int, kind: type[L]) -> L | None:
    found = (layer for pair in layers if is_a(layer := pair[place], kind))
    return next(found, None)

  mixer, attention, moe = first(0, Mamba.Config), first(0, Attention.Config), first(1, Moe.Config)
  mlp = first(1, GatedMlp.Config) or (None if moe is None else moe.expert)
  if mixer is None or mlp is None:
    raise InputError('no block has a Mamba layer and a feed-forward layer')
  attends = _period([is_a(mixer, Attention.Config) for mixer, _ in layers])
  sparse = _period([is_a(feed_forward, Moe.Config) for _, feed_forward in layers])
  router = SoftmaxTopK() if moe is None else part(moe.router, SoftmaxTopK, 'the router')
  attention = attention or Attention.Config()
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': mlp.hidden,
    'num_hidden_layers': len(stack),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'hidden_act': 'silu',
    'max_position_embeddings': config.context_length,
    'rms_norm_eps': branches(stack[0], 2)[0].norm.eps,
    'initializer_range': std_of(config.embedding_init),
    'tie_word_embeddings': config.tied,
    'attention_dropout': 0.0,
    'num_experts': 1 if moe is None else moe.experts,
    'attn_layer_period': attends[0],
    'attn_layer_offset': attends[1],
    'expert_layer_period': sparse[0],
    'expert_layer_offset': sparse[1],
    'mamba_d_state': mixer.d_state,
    'mamba_d_conv': mixer.d_conv,
    'mamba_expand': mixer.expand,
    'mamba_dt_rank': mixer.rank(config.width),
    'mamba_conv_bias': mixer.conv_bias,
    'mamba_proj_bias': mixer.bias,
    **write_router(router),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, mixer, feed_forward = (
    'model.layers.{layer}',
    'stack.{layer}.branches.0',
    'stack.{layer}.branches.1',
  )
  of_mamba = [
    dataclasses.replace(r, theirs=r.theirs.replace(mamba.THEIRS, f'{layer}.mamba'))
    for r in mamba.rules(config)
    if r.theirs.startswith(mamba.THEIRS)
  ]
  return [
    same('embedder.input.table', 'model.embed_tokens.weight'),
    same(f'{mixer}.norm.scale', f'{layer}.input_layernorm.weight'),
    *(linear(f'{mixer}.layer.{p}.kernel', f'{layer}.self_attn.{p}_proj.weight') for p in 'qkvo'),
    *of_mamba,
    *(
      same(f'{mixer}.layer.norms.{i}.scale', f'{layer}.mamba.{n}_layernorm.weight')
      for i, n in enumerate(('dt', 'b', 'c'))
    ),
    same(f'{feed_forward}.norm.scale', f'{layer}.pre_ff_layernorm.weight'),
    *(
      linear(f'{feed_forward}.layer.{p}.kernel', f'{layer}.feed_forward.{p}_proj.weight')
      for p in ('gate', 'up', 'down')
    ),
    linear(f'{feed_forward}.layer.router.kernel', f'{layer}.feed_forward.router.weight'),
    *(
      Rule(
        (f'{feed_forward}.layer.expert_{p}.kernel',),
        f'{layer}.feed_forward.experts.{{item}}.{p}_proj.weight',
        EXPERTS,
      )
      for p in ('gate', 'up', 'down')
    ),
    same('final_norm.scale', 'model.final_layernorm.weight'),
    linear('head.kernel', 'lm_head.weight'),
  ]


def names(config: LanguageModel.Config) -> Names:
  return Names(
    prefix='model.', copies={'lm_head.weight': 'model.embed_tokens.weight'} if config.tied else {}
  )


family(CheckpointFormat('jamba', 'JambaForCausalLM', read, write, rules, names))
