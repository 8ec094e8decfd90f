"""Gemma 2: norms before and after each layer with factors 1 + w, soft caps, and windows in every
second layer.

The embeddings are multiplied by sqrt(D), in the dtype of the weights: in fp32 here as there."""

import dataclasses
import math
from typing import Any

from jaxformer.interop.decoder import (
  SANDWICH_NORMS,
  attentions_of,
  decoder_rules,
  read_decoder,
  read_layer_types,
  read_windows,
  write_decoder,
  write_windows,
)
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.family import branches_of, family, part
from jaxformer.interop.rotary import FULL, SLIDING, read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import CheckpointFormat, Rule
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.position import Rotary
from jaxformer.models.block import SandwichNorm
from jaxformer.models.language_model import LanguageModel

SHARED = {
  'hidden_size': 2304,
  'intermediate_size': 9216,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
}
DEFAULTS = SHARED | {
  'vocab_size': 256000,
  'max_position_embeddings': 8192,
  'final_logit_softcapping': 30.0,
  'attn_logit_softcapping': 50.0,
}


def read_attention(hf: Settings) -> dict[str, Any]:
  """The fields of attention that Gemma 2 and 3 share. Attention in both directions is refused."""
  hf.only('use_bidirectional_attention', None, False)
  return {
    'bias': hf.get('attention_bias', bool, False),
    'scale': 1.0 / math.sqrt(hf.positive('query_pre_attn_scalar')),
  }


def read_gemma(hf: Settings, attention_of: Any) -> LanguageModel.Config:
  """The architecture that Gemma 2 and 3 share."""
  return read_decoder(
    hf,
    attention_of,
    branch=SandwichNorm,
    unit_offset=True,
    activation='hidden_activation',
    embedding_scale=math.sqrt(hf.count('hidden_size')),
    softcap=hf.get('final_logit_softcapping', float, None),
  )


def read(hf: Settings) -> LanguageModel.Config:
  caps = 'final_logit_softcapping', 'attn_logit_softcapping'
  hf = hf.with_defaults(DEFAULTS, 'sliding_window', *caps)
  types = read_layer_types(hf, lambda i: FULL if i % 2 else SLIDING)
  each = read_windows(hf, types, hf.count('sliding_window', None))
  shared = read_attention(hf) | {
    'position': read_rotary(hf),
    'softcap': hf.get('attn_logit_softcapping', float, None),
  }
  return read_gemma(hf, lambda i, attention: attention.replace(window=each[i], **shared))


def write_gemma(config: LanguageModel.Config) -> dict[str, Any]:
  """The fields that Gemma 2 and 3 share."""
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config, branch=SandwichNorm)
  attention = first.layer.resolved(config.width)
  return {
    **write_decoder(config, attention, second.layer, activation='hidden_activation'),
    **write_windows(config),
    'attention_bias': attention.bias,
    'query_pre_attn_scalar': round(attention.scale**-2),
    'final_logit_softcapping': config.softcap,
    'attn_logit_softcapping': attention.softcap,
    'use_bidirectional_attention': False,
  }


def write(config: LanguageModel.Config) -> dict[str, Any]:
  rotary = part(attentions_of(config)[0].position, Rotary, 'the position of layer 0 of block 0')
  return {'architectures': ['Gemma2ForCausalLM'], **write_gemma(config), **write_rotary(rotary)}


def rules(config: LanguageModel.Config) -> list[Rule]:
  return decoder_rules(SANDWICH_NORMS)


GEMMA2: CheckpointFormat = dataclasses.replace(
  LLAMA,
  name='gemma2',
  read=read,
  write=write,
  rules=rules,
  token_ids={'pad_token_id': 0, 'eos_token_id': 1, 'bos_token_id': 2},
)
family(GEMMA2)
