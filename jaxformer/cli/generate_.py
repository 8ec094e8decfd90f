"""Continues a text with a trained model, printing it as it comes.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older checkpoint, or a folder of Hugging
Face weights (safetensors) with its tokenizer.json.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jaxformer.cli.common import Overrides, load_writer, sampling_arguments, sampling_of
from jaxformer.config import InputError

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run_name', metavar='RUN')
  parser.add_argument('--prompt', action='append', help='the text to continue; - reads it from standard input; may be given '
                      'several times')
  parser.add_argument('--max-new-tokens', type=int, default=200)
  parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help='ends the text before TEXT; may be given '
                      'several times')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='of weights and activations; by default bfloat16 on TPU and '
                      'GPU')
  sampling_arguments(parser)
  parser.add_argument('--json', action='store_true', help='an array of {prompt, text, tokens, finished}, printed at the end')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  import json

  import jax.numpy as jnp

  from jaxformer.inference import generate_text, stream
  from jaxformer.sharding import platform
  sampling = sampling_of(args)
  if args.max_new_tokens < 1:
    raise InputError(f'--max-new-tokens {args.max_new_tokens}: must be positive')
  trained = load_writer(args.run_name, '`jaxformer generate`')
  texts = [sys.stdin.read() if p == '-' else p for p in args.prompt or ['']]
  prompts = [trained.tokenizer.encode(t).tolist() for t in texts]
  dtype = args.dtype or ('float32' if platform() == 'cpu' else 'bfloat16')
  options: dict[str, Any] = {
    'max_new_tokens': args.max_new_tokens, 'stop': args.stop, 'sampling': sampling, 'seed': args.seed, 'dtype': jnp.dtype(dtype),
    'end_of_document': trained.tokenizer.end_of_document, 'vocab_size': trained.tokenizer.vocab_size}
  decode = trained.tokenizer.decode_bytes
  if args.json:
    done = generate_text(trained.definition, trained.params, prompts, decode, **options)
    print(json.dumps([
      {'prompt': t, 'text': d.text, 'tokens': d.tokens, 'finished': d.finished} for t, d in zip(texts, done, strict=True)]))
  elif len(texts) == 1:
    pieces = stream(trained.definition, trained.params, prompts, decode, **options)
    print(texts[0], end='', flush=True)
    for (piece,) in pieces:
      print(piece, end='', flush=True)
    print()
  else:
    for text, d in zip(texts, generate_text(trained.definition, trained.params, prompts, decode, **options), strict=True):
      print(f'{text}{d.text}\n')
