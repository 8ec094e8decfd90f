"""The text models of Gemma 3: Gemma 2 with norms of each head's query and key, rotary bases and
windows of local and global layers, and no soft cap of attention."""

import dataclasses
from typing import Any

from jaxformer.interop.decoder import attentions_of, read_layer_types, read_norm, read_windows
from jaxformer.interop.families import gemma2
from jaxformer.interop.family import family
from jaxformer.interop.rotary import (
  FULL,
  SLIDING,
  read_rotary_by_type,
  rotary_by_type,
  write_rotary_by_type,
)
from jaxformer.interop.settings import Settings
from jaxformer.models.language_model import LanguageModel

DEFAULTS = gemma2.SHARED | {'vocab_size': 262208, 'max_position_embeddings': 131072}
THETA = {FULL: 1e6, SLIDING: 1e4}
OLD = {FULL: 'rope_theta', SLIDING: 'rope_local_base_freq'}


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS, 'sliding_window')
  hf.only('attn_logit_softcapping', None)  # which theirs ignores
  period = hf.count('sliding_window_pattern', 6)
  types = read_layer_types(hf, lambda i: SLIDING if (i + 1) % period else FULL)
  each = read_windows(hf, types, hf.count('sliding_window', None))
  rotary = read_rotary_by_type(hf, THETA, OLD)
  shared = gemma2.read_attention(hf) | {'qk_norm': read_norm(hf, unit_offset=True)}
  return gemma2.read_gemma(
    hf, lambda i, attention: attention.replace(window=each[i], position=rotary[types[i]], **shared)
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  return {
    'architectures': ['Gemma3ForCausalLM'],
    **gemma2.write_gemma(config),
    **write_rotary_by_type(rotary_by_type(attentions_of(config)), OLD),
  }


family(dataclasses.replace(gemma2.GEMMA2, name='gemma3_text', read=read, write=write))
