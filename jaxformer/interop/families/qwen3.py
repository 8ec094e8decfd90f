"""Qwen3: Llama with norms of each head's query and key."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import read_decoder, read_norm
from jaxformer.interop.families import qwen2
from jaxformer.interop.families.llama import write_shared
from jaxformer.interop.family import branches_of, family
from jaxformer.interop.rotary import read_rotary
from jaxformer.interop.settings import Settings
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.models.language_model import LanguageModel


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(qwen2.DEFAULTS | {'head_dim': 128}, *qwen2.NULLABLE)
  rotary, each = read_rotary(hf), qwen2.windows(hf)
  bias, norm = hf.get('attention_bias', bool, False), read_norm(hf)
  return read_decoder(
    hf,
    lambda i, attention: attention.replace(
      position=rotary, window=each[i], bias=bias, qk_norm=norm
    ),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, GatedMlp.Config)
  return {
    'architectures': ['Qwen3ForCausalLM'],
    **write_shared(config, first.layer, second.layer),
    **qwen2.write_windows_of(config),
    'attention_bias': first.layer.bias,
  }


family(dataclasses.replace(qwen2.QWEN2, name='qwen3', read=read, write=write))
