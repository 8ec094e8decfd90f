"""Decoding in compiled programs: sampling, streaming and stop strings for language models; greedy
and beam search and alignments for encoder-decoders."""

from jaxformer.inference.alignment import align, draw
from jaxformer.inference.beam import Beam
from jaxformer.inference.benchmark import DecodeTime, time_decode
from jaxformer.inference.decoding import Generated, Request, generate, request
from jaxformer.inference.sampling import GREEDY, Sampling
from jaxformer.inference.text import generate_text, stream
from jaxformer.inference.token_rules import TokenRules
from jaxformer.inference.translate import Translation, translate

__all__ = [
  'GREEDY',
  'Beam',
  'DecodeTime',
  'Generated',
  'Request',
  'Sampling',
  'TokenRules',
  'Translation',
  'align',
  'draw',
  'generate',
  'generate_text',
  'request',
  'stream',
  'time_decode',
  'translate',
]
