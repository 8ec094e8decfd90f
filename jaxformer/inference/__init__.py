"""Decoding in compiled programs: sampling, streaming and stop strings for language models; greedy
and beam search and alignments for encoder-decoders."""

from __future__ import annotations

from jaxformer.inference.alignment import Alignment, align, draw
from jaxformer.inference.beam import Beam
from jaxformer.inference.benchmark import DecodeTime, time_decode
from jaxformer.inference.generate import Generated, generate
from jaxformer.inference.sampling import GREEDY, Sampling
from jaxformer.inference.text import GeneratedText, generate_text, stream
from jaxformer.inference.translate import Translation, translate

__all__ = [
  'GREEDY',
  'Alignment',
  'Beam',
  'DecodeTime',
  'Generated',
  'GeneratedText',
  'Sampling',
  'Translation',
  'align',
  'draw',
  'generate',
  'generate_text',
  'stream',
  'time_decode',
  'translate',
]
