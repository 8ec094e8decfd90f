"""SmolLM3: Llama without rotary positions in every fourth layer."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import (
  attentions_of,
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
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.position import Rotary
from jaxformer.models.language_model import LanguageModel

_DEFAULTS = {
  'vocab_size': 128256,
  'hidden_size': 2048,
  'intermediate_size': 11008,
  'num_hidden_layers': 36,
  'num_attention_heads': 16,
  'num_key_value_heads': 4,
  'max_position_embeddings': 32768,
  'tie_word_embeddings': True,
}


def _rotated(hf: Settings) -> list[bool]:
  """Whether each layer has rotary positions, which is what `no_rope_layers` says."""
  n, interval = hf.count('num_hidden_layers'), hf.count('no_rope_layer_interval', 4)
  found = hf.value('no_rope_layers')
  if found is None:
    return [(i + 1) % interval != 0 for i in range(n)]
  if not isinstance(found, list) or len(found) != n or not {0, 1}.issuperset(found):
    raise hf.fail('no_rope_layers', f'a list of {n} of 0 and 1')
  return [bool(x) for x in found]


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_DEFAULTS, 'num_key_value_heads')
  rotary, rotated = read_rotary(hf, 2e6), _rotated(hf)
  used, window = hf.get('use_sliding_window', bool, False), hf.count('sliding_window', None)
  window = window if used else None
  types = read_layer_types(hf, lambda i: FULL if window is None or rotated[i] else SLIDING)
  each, bias = read_windows(hf, types, window), hf.get('attention_bias', bool, False)
  return read_decoder(
    hf,
    lambda i, attention: attention.replace(
      position=rotary if rotated[i] else None, window=each[i], bias=bias
    ),
    mlp_bias=hf.get('mlp_bias', bool, False),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  positions = [a.position for a in attentions_of(config)]
  rotary = next((p for p in positions if p is not None), None)
  windows = write_windows(config)
  return {
    'architectures': ['SmolLM3ForCausalLM'],
    **write_decoder(config, first.layer, second.layer),
    **write_rotary(part(rotary, Rotary, 'the position of any layer')),
    **windows,
    'use_sliding_window': SLIDING in windows['layer_types'],
    'no_rope_layers': [int(p is not None) for p in positions],
    'attention_bias': first.layer.bias,
    'mlp_bias': second.layer.bias,
  }


family(
  dataclasses.replace(
    LLAMA,
    name='smollm3',
    read=read,
    write=write,
    token_ids={'pad_token_id': 128004, 'bos_token_id': 128000, 'eos_token_id': 128001},
  )
)
