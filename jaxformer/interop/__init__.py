"""Hugging Face weights, both ways, from local safetensors: `load_hf`, `save_hf`, `describe`. A format is a file in `families/`."""

from jaxformer.interop.huggingface import describe, load_hf, save_hf

__all__ = ['describe', 'load_hf', 'save_hf']
