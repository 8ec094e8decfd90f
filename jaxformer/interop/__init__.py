"""Import and export of weights: Hugging Face folders (`load_hf`, `save_hf`; one file per
format in `families/`) and RWKV files (`load_rwkv`, `save_rwkv`)."""

from jaxformer.interop.huggingface import load_hf, save_hf
from jaxformer.interop.rwkv import is_rwkv, load_rwkv, save_rwkv

__all__ = ['is_rwkv', 'load_hf', 'load_rwkv', 'save_hf', 'save_rwkv']
