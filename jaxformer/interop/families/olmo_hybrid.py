"""OLMo Hybrid: gated DeltaNet with norms on the inputs of its block's layers, and attention as in
OLMo 2 with norms on their outputs.

Files have a convolution each for queries, keys and values, as published. (`save_pretrained` of
transformers 5.24 cuts the three in parts of equal sizes, which are refused: they are not theirs.)
"""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import (
  NORMS_AFTER,
  attention_rules,
  decoder_rules,
  read_decoder,
  read_norm,
  write_decoder,
)
from jaxformer.interop.delta_net import (
  CONVOLUTIONS,
  LAYER,
  LINEAR,
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
from jaxformer.interop.family import blocks_of, family, first_of, part
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import FEED_FORWARD, MIXER, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.delta_net import GatedDeltaNet
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import StepBias
from jaxformer.layers.mamba2 import LogUniformRate
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.position import Rotary
from jaxformer.models.block import NormAfter, PreNorm
from jaxformer.models.language_model import LanguageModel

DEFAULTS = {
  'vocab_size': 100352,
  'hidden_size': 3840,
  'intermediate_size': 11008,
  'num_hidden_layers': 32,
  'num_attention_heads': 30,
  'max_position_embeddings': 65536,
}
INNER_EPS = 1e-5  # of the norm of DeltaNet's output, whatever the config
LEAST_RATE = 0.01
PRE_NORMS = {
  f'{MIXER}.norm': 'model.layers.{layer}.attention_layer_norm',
  f'{FEED_FORWARD}.norm': 'model.layers.{layer}.feedforward_layer_norm',
}
# transformers writes the first norm of a block with attention under the name of the second one of
# the others.
RENAMED = {r'\.feedforward_layer_norm\.': '.post_attention_layernorm.'}
PAD = 100277


def _read_rotary(hf: Settings) -> Rotary | None:
  """The positions of attention: none where `rope_parameters` has a `rope_theta` of null."""
  given = hf.get('rope_parameters', dict, {})
  if 'rope_theta' in given and given['rope_theta'] is None:
    rope = Settings(given, f'{hf.where}: rope_parameters')
    rope.only('rope_theta', None)
    rope.only('rope_type', 'default')
    if unread := rope.unread():
      raise rope.fail(unread[0], 'absent without a rope_theta')
    for name in ('rope_scaling', 'rope_theta', 'partial_rotary_factor'):
      hf.only(name, None)
    hf.only('original_max_position_embeddings', None)
    return None
  return read_rotary(hf)


def _read_layer(hf: Settings) -> GatedDeltaNet.Config:
  heads = hf.count('num_attention_heads')
  keys = hf.count('linear_num_key_heads', heads)
  size = hf.count('linear_key_head_dim', int(0.75 * hf.count('hidden_size') / keys))
  sizes = {
    'linear_num_key_heads': keys,
    'linear_num_value_heads': heads,
    'linear_key_head_dim': size,
    'linear_value_head_dim': 2 * size,
  }
  init = Normal(std=hf.get('initializer_range', float, 0.02))
  return GatedDeltaNet.Config(
    **hf.with_defaults(sizes).read(LAYER),
    negative_eigenvalues=hf.get('linear_allow_neg_eigval', bool, True),
    norm_eps=INNER_EPS,
    init=init,
    out_init=init,
    dt_init=StepBias(
      low=hf.positive('linear_dt_min', 1e-3),
      high=hf.positive('linear_dt_max', 1e-1),
      floor=hf.positive('linear_dt_init_floor', 1e-4),
    ),
    rate_init=LogUniformRate(
      low=max(hf.get('linear_a_log_min', float, 0.0), LEAST_RATE),
      high=hf.positive('linear_a_log_max', 16.0),
    ),
  )


def read(hf: Settings) -> LanguageModel.Config:
  """Rates start above `linear_a_log_min` where that is 0, so that their logarithms are finite."""
  hf = hf.with_defaults(DEFAULTS)
  hf.only('hidden_act', 'silu', 'swish')  # of the convolutions too
  kinds = read_kinds(hf, every(min(4, hf.count('num_hidden_layers'))))
  rotary, layer = _read_rotary(hf), _read_layer(hf)
  settings = {'bias': hf.get('attention_bias', bool, False), 'qk_norm': read_norm(hf)}

  def mixer(i: int, attention: Attention.Config) -> LayerConfig:
    if kinds[i] == LINEAR:
      return layer
    return attention.replace(position=rotary, qk_norm_over='width', **settings)

  return read_decoder(hf, mixer, branch_of=lambda i: PreNorm if kinds[i] == LINEAR else NormAfter)


def write(config: LanguageModel.Config) -> dict[str, Any]:
  layer, attention = gated_and_attention(config)
  mlp = part(first_of(blocks_of(config.stack), GatedMlp.Config), GatedMlp.Config, 'layer 1')
  if attention.position is None:
    positions: dict[str, Any] = {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}
  else:
    positions = write_rotary(part(attention.position, Rotary, 'the position of attention'))
  steps, rates = layer.dt_init, layer.rate_init
  inits: dict[str, Any] = {}
  if type(steps) is StepBias:
    inits |= {'linear_dt_min': steps.low, 'linear_dt_max': steps.high}
    inits |= {'linear_dt_init_floor': steps.floor}
  if type(rates) is LogUniformRate:
    inits |= {'linear_a_log_min': rates.low, 'linear_a_log_max': rates.high}
  return {
    'architectures': ['OlmoHybridForCausalLM'],
    **write_decoder(config, attention, mlp),
    **write_layer(layer),
    **write_kinds(config),
    **positions,
    **inits,
    # theirs by default, which lies outside a smaller vocabulary
    'pad_token_id': PAD if config.vocab_size > PAD else None,
    'attention_bias': attention.bias,
    'linear_allow_neg_eigval': layer.negative_eigenvalues,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  projections = {'q': 'q', 'k': 'k', 'v': 'v', 'a': 'a', 'beta': 'b', 'gate': 'g', 'out': 'o'}
  names = {ours: f'{theirs}_proj' for ours, theirs in projections.items()} | {'norm': 'o_norm'}
  theirs = 'model.layers.{layer}.linear_attn.'
  linear = [
    *modules(PRE_NORMS),
    *layer_rules(theirs, names),
    *convolution_rules(theirs, CONVOLUTIONS),
  ]
  return [
    *decoder_rules({}, attention={}),
    *rules_by_kind(config, linear, [*modules(NORMS_AFTER), *attention_rules()]),
  ]


family(
  dataclasses.replace(
    LLAMA,
    name='olmo_hybrid',
    read=read,
    write=write,
    rules=rules,
    renamed=RENAMED,
    token_ids={'pad_token_id': PAD, 'eos_token_id': 100257},
  )
)
