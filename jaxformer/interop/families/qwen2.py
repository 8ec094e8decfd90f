"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import read_decoder, read_layer_types, read_windows, write_windows
from jaxformer.interop.families.llama import LLAMA, write_shared
from jaxformer.interop.family import branches_of, family
from jaxformer.interop.rotary import FULL, SLIDING, read_rotary
from jaxformer.interop.settings import Settings
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.models.language_model import LanguageModel

DEFAULTS = {
  'vocab_size': 151936,
  'hidden_size': 4096,
  'intermediate_size': 22016,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'max_position_embeddings': 32768,
  'sliding_window': 4096,
  'max_window_layers': 28,
}
NULLABLE = 'num_key_value_heads', 'sliding_window'


def windows(hf: Settings) -> list[int | None]:
  """The window of each layer: with `use_sliding_window`, layers from `max_window_layers` on have
  one unless `layer_types` says otherwise."""
  used, window = hf.get('use_sliding_window', bool, False), hf.count('sliding_window', None)
  window, first = window if used else None, hf.get('max_window_layers', int)
  types = read_layer_types(hf, lambda i: SLIDING if window is not None and i >= first else FULL)
  return read_windows(hf, types, window)


def write_windows_of(config: LanguageModel.Config) -> dict[str, Any]:
  """The fields that `windows` reads."""
  fields = write_windows(config)
  return {
    **fields,
    'use_sliding_window': SLIDING in fields['layer_types'],
    'max_window_layers': [*fields['layer_types'], SLIDING].index(SLIDING),
  }


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS, *NULLABLE)
  rotary, each = read_rotary(hf), windows(hf)
  return read_decoder(
    hf,
    lambda i, attention: attention.replace(
      position=rotary, window=each[i], bias=True, out_bias=False
    ),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return {
    'architectures': ['Qwen2ForCausalLM'],
    **write_shared(config, first.layer, second.layer),
    **write_windows_of(config),
  }


QWEN2 = dataclasses.replace(LLAMA, name='qwen2', read=read, write=write)
family(QWEN2)
