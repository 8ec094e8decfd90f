"""Text from a language model: prompts and the whole decode loop in compiled programs, sampling, streaming with stop strings."""

from __future__ import annotations

from jaxformer.inference.benchmark import DecodeTime, time_decode
from jaxformer.inference.generate import Generated, generate
from jaxformer.inference.sampling import GREEDY, Sampling
from jaxformer.inference.text import GeneratedText, generate_text, stream

__all__ = ['GREEDY', 'DecodeTime', 'Generated', 'GeneratedText', 'Sampling', 'generate', 'generate_text', 'stream', 'time_decode']
