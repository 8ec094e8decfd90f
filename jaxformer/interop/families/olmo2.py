"""OLMo 2 and 3: norms on the outputs of layers, and norms of queries and keys over all heads. OLMo
3 has windows in three of four layers, and scaled rotary positions in the others alone."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import (
  NORMS_AFTER,
  attentions_of,
  decoder_rules,
  read_decoder,
  read_layer_types,
  read_norm,
  read_windows,
  write_decoder,
  write_windows,
)
from jaxformer.interop.families.llama import LLAMA
from jaxformer.interop.family import branches_of, family, part
from jaxformer.interop.rotary import (
  FULL,
  SLIDING,
  read_rotary,
  read_rotary_by_type,
  rotary_by_type,
  write_rotary,
  write_rotary_by_type,
)
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import Rule
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.position import Rotary
from jaxformer.models.block import NormAfter
from jaxformer.models.language_model import LanguageModel

DEFAULTS = {
  'vocab_size': 50304,
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'max_position_embeddings': 2048,
  'rms_norm_eps': 1e-5,
  'sliding_window': 4096,
}
THETA = {FULL: 5e5, SLIDING: 5e5}
OLD = {FULL: 'rope_theta'}


def _read(hf: Settings, rotary: list[Rotary], windows: list[int | None]) -> LanguageModel.Config:
  """The architecture, with the positions and the window of each layer."""
  shared = {
    'bias': hf.get('attention_bias', bool, False),
    'qk_norm': read_norm(hf),
    'qk_norm_over': 'width',
  }
  return read_decoder(
    hf,
    lambda i, attention: attention.replace(position=rotary[i], window=windows[i], **shared),
    branch=NormAfter,
  )


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS)
  n = hf.count('num_hidden_layers')
  hf.only('layer_types', None, [FULL] * n)
  return _read(hf, [read_rotary(hf)] * n, [None] * n)


def read_olmo3(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS, 'sliding_window')
  types = read_layer_types(hf, lambda i: SLIDING if (i + 1) % 4 else FULL)
  rotary = read_rotary_by_type(hf, THETA, OLD)
  windows = read_windows(hf, types, hf.count('sliding_window', None))
  return _read(hf, [rotary[t] for t in types], windows)


def _write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config, branch=NormAfter)
  return {**write_decoder(config, first.layer, second.layer), 'attention_bias': first.layer.bias}


def write(config: LanguageModel.Config) -> dict[str, Any]:
  rotary = part(attentions_of(config)[0].position, Rotary, 'the position of layer 0 of block 0')
  return {'architectures': ['Olmo2ForCausalLM'], **_write(config), **write_rotary(rotary)}


def write_olmo3(config: LanguageModel.Config) -> dict[str, Any]:
  return {
    'architectures': ['Olmo3ForCausalLM'],
    **_write(config),
    **write_windows(config),
    **write_rotary_by_type(rotary_by_type(attentions_of(config)), OLD),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  return decoder_rules(NORMS_AFTER)


OLMO2 = dataclasses.replace(
  LLAMA,
  name='olmo2',
  read=read,
  write=write,
  rules=rules,
  token_ids={'pad_token_id': 1, 'eos_token_id': 50279},
)
family(OLMO2)
family(dataclasses.replace(OLMO2, name='olmo3', read=read_olmo3, write=write_olmo3))
