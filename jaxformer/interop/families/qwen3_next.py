"""Qwen3-Next: gated DeltaNet and attention with an output gate, and many small experts beside a
gated shared one.

On disk every expert has separate tensors; `in_proj_qkvz` and `in_proj_ba` have the parts of one key
head after another, and `q_proj` the query and the gate of one head after another. Published files
have layers of multi-token prediction too, which are not read."""

import dataclasses
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.decoder import (
  ATTENTION,
  attention_rules,
  decoder_rules,
  read_decoder,
  read_norm,
  write_decoder,
)
from jaxformer.interop.delta_net import (
  LAYER,
  convolution_rules,
  every,
  gated_and_attention,
  layer_rules,
  read_kinds,
  rules_by_kind,
  write_kinds,
  write_layer,
)
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.families.mixtral import balance, write_router
from jaxformer.interop.family import blocks_of, family, first_of, part
from jaxformer.interop.rotary import FULL, read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import FEED_FORWARD, MIXER, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import GatedDeltaNet
from jaxformer.layers.init import Normal, Ones
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import LogUniformRate
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import SoftmaxTopK
from jaxformer.models.language_model import LanguageModel

DEFAULTS = {
  'vocab_size': 151936,
  'hidden_size': 2048,
  'intermediate_size': 5632,
  'num_hidden_layers': 48,
  'num_attention_heads': 16,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32768,
  'head_dim': 256,
  'partial_rotary_factor': 0.25,
  'moe_intermediate_size': 512,
  'shared_expert_intermediate_size': 512,
  'num_experts_per_tok': 10,
  'num_experts': 512,
  'norm_topk_prob': True,
}
IGNORED = (*LLAMA.ignored, r'mtp\..*')


# ---- from their fields -------------------------------------------------------------------------


def read_hybrid(hf: Settings, feed_forward: Any) -> LanguageModel.Config:
  """The architecture with these second layers of blocks, from a block's index and the feed-forward
  layer of the shared fields; `hf` has their defaults."""
  hf.only('hidden_act', 'silu', 'swish')  # of the convolutions too
  hf.only('attn_output_gate', True, None)
  kinds = read_kinds(hf, every(hf.count('full_attention_interval', 4)))
  init, norm = Normal(std=hf.get('initializer_range', float, 0.02)), read_norm(hf, True)
  layer = GatedDeltaNet.Config(
    **hf.read(LAYER),
    norm_eps=norm.eps,
    init=init,
    out_init=init,
    dt_init=Ones(),
    rate_init=LogUniformRate(low=0.01),
  )
  settings = {
    'position': read_rotary(hf, partial=True),
    'bias': hf.get('attention_bias', bool, False),
    'qk_norm': norm,
    'output_gate': True,
  }

  def mixer(i: int, attention: Attention.Config) -> LayerConfig:
    return attention.replace(**settings) if kinds[i] == FULL else layer

  return read_decoder(hf, mixer, unit_offset=True, feed_forward=feed_forward)


def read_experts(hf: Settings, mlp: GatedMlp.Config) -> Moe.Config:
  """The experts, from the feed-forward layer of the shared fields."""
  router = SoftmaxTopK(
    k=hf.count('num_experts_per_tok'),
    normalized=hf.get('norm_topk_prob', bool, True),
    pooled_balance=balance(hf),
    init=mlp.init,
  )
  return Moe.Config(
    experts=hf.count('num_experts'),
    expert=mlp.replace(hidden=hf.count('moe_intermediate_size')),
    router=router,
    shared=mlp.replace(hidden=hf.count('shared_expert_intermediate_size')),
    shared_gate=True,
  )


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS)
  step, dense = hf.count('decoder_sparse_step', 1), hf.value('mlp_only_layers') or []
  if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
    raise hf.fail('mlp_only_layers', 'a list of indices of layers')

  def feed_forward(i: int, mlp: GatedMlp.Config) -> LayerConfig:
    return mlp if i in dense or (i + 1) % step else read_experts(hf, mlp)

  return read_hybrid(hf, feed_forward)


# ---- to their fields ---------------------------------------------------------------------------


def write_hybrid(config: LanguageModel.Config, mlp: GatedMlp.Config) -> dict[str, Any]:
  """The fields of all but the experts; `mlp` is a dense feed-forward layer."""
  layer, attention = gated_and_attention(config)
  return {
    **write_decoder(config, attention, mlp),
    **write_layer(layer),
    **write_kinds(config),
    **write_rotary(part(attention.position, Rotary, 'the position of attention')),
    'attention_bias': attention.bias,
  }


def write_experts(config: LanguageModel.Config) -> tuple[dict[str, Any], GatedMlp.Config]:
  """The fields of the experts, and one of them."""
  moe = first_of(blocks_of(config.stack), Moe.Config)
  if moe is None or moe.shared is None:
    raise InputError('stack', problem='no block has a mixture of experts with a shared one')
  expert = part(moe.expert, GatedMlp.Config, 'the expert')
  router = part(moe.router, SoftmaxTopK, 'the router')
  fields = {
    **write_router(router),
    'moe_intermediate_size': expert.hidden,
    'shared_expert_intermediate_size': moe.shared.hidden,
    'num_experts': moe.experts,
  }
  return fields, expert


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = blocks_of(config.stack)
  experts, expert = write_experts(config)
  router = part(first_of(blocks, Moe.Config), Moe.Config, 'the experts').router
  return {
    'architectures': ['Qwen3NextForCausalLM'],
    **write_hybrid(config, first_of(blocks, GatedMlp.Config) or expert),
    **experts,
    'norm_topk_prob': part(router, SoftmaxTopK, 'the router').normalized,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [
      i for i, block in enumerate(blocks) if not block.branches[-1].layer.expert_count
    ],
  }


# ---- weights -----------------------------------------------------------------------------------


def per_head(ours: tuple[str, ...], theirs: str, heads: int) -> list[Rule]:
  """Rules for linear layers of the mixer that are one of theirs, with the parts of one head after
  another."""
  names = {end: tuple(f'{MIXER}.layer.{o}.{end}' for o in ours) for end in ('kernel', 'bias')}
  return [
    Rule(names['kernel'], f'{theirs}.weight', transposed=True, groups=heads),
    Rule(names['bias'], f'{theirs}.bias', groups=heads),
  ]


def full_rules(config: LanguageModel.Config) -> list[Rule]:
  """Rules for attention."""
  _, attention = gated_and_attention(config)
  theirs = 'model.layers.{layer}.self_attn.'
  return [
    *per_head(('q', 'gate'), f'{theirs}q_proj', attention.heads),
    *attention_rules({o: t for o, t in ATTENTION.items() if o != 'q'}),
  ]


def expert_rules() -> list[Rule]:
  """Rules for the experts."""
  ours, theirs = f'{FEED_FORWARD}.layer.', 'model.layers.{layer}.mlp.'
  parts = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  return [
    *modules(parts, f'{ours}shared.', f'{theirs}shared_expert.'),
    *modules(parts, f'{ours}expert_', f'{theirs}experts.{{item}}.'),
    *modules({'router': 'gate', 'shared_gate': 'shared_expert_gate'}, ours, theirs),
  ]


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, _ = gated_and_attention(config)
  theirs = 'model.layers.{layer}.linear_attn.'
  linear = [
    *per_head(('q', 'k', 'v', 'gate'), f'{theirs}in_proj_qkvz', layer.heads),
    *per_head(('beta', 'a'), f'{theirs}in_proj_ba', layer.heads),
    *convolution_rules(theirs),
    *layer_rules(theirs, {'norm': 'norm', 'out': 'out_proj'}),
  ]
  return [
    *decoder_rules(attention={}),
    *expert_rules(),
    *rules_by_kind(config, linear, full_rules(config)),
  ]


family(
  dataclasses.replace(
    LLAMA, name='qwen3_next', read=read, write=write, rules=rules, ignored=IGNORED
  )
)
