"""Import and export of weights: Hugging Face folders (`load_hf`, `save_hf`; one file per
format in `families/`) and RWKV files (`load_rwkv`, `save_rwkv`)."""

from jaxformer.interop.generation import UNKNOWN, Generation, read_generation
from jaxformer.interop.huggingface import load_hf, save_hf
from jaxformer.interop.rwkv import is_rwkv, load_rwkv, save_rwkv

__all__ = [
  'UNKNOWN',
  'Generation',
  'is_rwkv',
  'load_hf',
  'load_rwkv',
  'read_generation',
  'save_hf',
  'save_rwkv',
]
