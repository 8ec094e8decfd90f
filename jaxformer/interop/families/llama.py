"""Llama 2, 3, 3.1, 3.2, and Mistral, which is Llama with a sliding window."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxformer.interop.decoder import decoder_rules, read_decoder, write_decoder
from jaxformer.interop.family import branches_of, family, part
from jaxformer.interop.rotary import FULL, SLIDING, read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import CheckpointFormat, Rule
from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.position import Rotary
from jaxformer.models.language_model import LanguageModel

# ---- what Llama and its descendants share ------------------------------------------------------

_LLAMA = {
  'vocab_size': 32000,
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'max_position_embeddings': 2048,
}


def build(
  hf: Settings,
  *,
  bias: bool = False,
  mlp_bias: bool = False,
  window: int | None = None,
  feed_forward: Callable[[GatedMlp.Config], LayerConfig] = lambda mlp: mlp,
) -> LanguageModel.Config:
  """The architecture, from the shared fields, with Llama's defaults.

  Args:
    feed_forward: makes the second layer of a block from Llama's.
  """
  hf = hf.with_defaults(_LLAMA)
  kind = FULL if window is None else SLIDING
  hf.only('layer_types', None, [kind] * hf.count('num_hidden_layers'))
  rotary = read_rotary(hf)
  return read_decoder(
    hf,
    lambda _, attention: attention.replace(position=rotary, window=window, bias=bias),
    mlp_bias=mlp_bias,
    feed_forward=lambda _, mlp: feed_forward(mlp),
  )


def write_shared(
  config: LanguageModel.Config, attention: Attention.Config, mlp: GatedMlp.Config
) -> dict[str, Any]:
  """The shared fields, from the layers of a block."""
  rotary = part(attention.position, Rotary, 'the position of layer 0 of block 0')
  return write_decoder(config, attention, mlp) | write_rotary(rotary)


def rules(config: LanguageModel.Config) -> list[Rule]:
  return decoder_rules()


# ---- Llama and Mistral -------------------------------------------------------------------------


def read(hf: Settings) -> LanguageModel.Config:
  """`pretraining_tp` is ignored: it splits products and does not affect the function."""
  return build(
    hf, bias=hf.get('attention_bias', bool, False), mlp_bias=hf.get('mlp_bias', bool, False)
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return write_shared(config, first.layer, second.layer) | {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': first.layer.bias,
    'mlp_bias': second.layer.bias,
  }


_MISTRAL = {
  'intermediate_size': 14336,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'sliding_window': 4096,
}


def read_mistral(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_MISTRAL, 'sliding_window')
  return build(hf, window=hf.count('sliding_window', None))


def write_mistral(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return write_shared(config, first.layer, second.layer) | {
    'architectures': ['MistralForCausalLM'],
    'sliding_window': first.layer.window,
  }


LLAMA = CheckpointFormat(
  'llama',
  read,
  write,
  rules,
  prefix='model.',
  ignored=(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq',),
  copies={'lm_head.weight': 'model.embed_tokens.weight'},
)
family(LLAMA)
family(dataclasses.replace(LLAMA, name='mistral', read=read_mistral, write=write_mistral))
