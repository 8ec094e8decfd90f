"""Weights of other libraries, both ways: folders of Hugging Face (`load_hf`, `save_hf`, `describe`;
a format is a file in `families/`) and files of RWKV (`load_rwkv`, `save_rwkv`)."""

from jaxformer.interop.huggingface import describe, load_hf, save_hf
from jaxformer.interop.rwkv import is_rwkv, load_rwkv, save_rwkv

__all__ = ['describe', 'is_rwkv', 'load_hf', 'load_rwkv', 'save_hf', 'save_rwkv']
