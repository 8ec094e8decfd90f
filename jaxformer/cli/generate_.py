"""Continues a text with a trained model, printing it as it comes; with an encoder-decoder,
translates.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older
checkpoint, or a folder of Hugging Face weights (safetensors) with its tokenizer.json. A language
model takes --prompt and the options of sampling. An encoder-decoder takes --source, or each line of
standard input, and the options of search; it prints a line for each."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jaxformer.cli.common import (
  Overrides,
  join_processes,
  load_writer,
  note,
  sampling_arguments,
  sampling_of,
  translated,
  translates,
)
from jaxformer.config import InputError

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run_name', metavar='RUN')
  parser.add_argument(
    '--prompt',
    action='append',
    help='the text to continue; - reads it from standard input; may be given several times',
  )
  parser.add_argument(
    '--source',
    action='append',
    help='a text to translate, by default every line of standard input; may be given several times',
  )
  parser.add_argument(
    '--beam',
    type=int,
    default=1,
    help='hypotheses that are kept; 1 takes the likeliest token at each step (1)',
  )
  parser.add_argument(
    '--length-penalty',
    type=float,
    default=0.6,
    help='how far long translations are made up for (0.6)',
  )
  parser.add_argument(
    '--coverage-penalty',
    type=float,
    default=0.0,
    help='weight of source tokens that got no attention (0)',
  )
  parser.add_argument(
    '--max-new-tokens', type=int, help='200 of a text, of a translation twice the source and ten'
  )
  parser.add_argument(
    '--stop',
    action='append',
    default=[],
    metavar='TEXT',
    help='ends the text before TEXT; may be given several times',
  )
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='of weights and activations; by default bfloat16 on TPU and GPU',
  )
  sampling_arguments(parser)
  parser.add_argument(
    '--json',
    action='store_true',
    help='an array of {prompt, text, tokens, finished}, printed at the end; of '
    'translations, of {source, text, tokens, log_p, score, finished}',
  )


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  import json

  import jax.numpy as jnp

  from jaxformer.inference import generate_text, stream
  from jaxformer.sharding import platform

  sampling = sampling_of(args)
  if args.max_new_tokens is not None and args.max_new_tokens < 1:
    raise InputError(f'--max-new-tokens {args.max_new_tokens}: must be positive')
  join_processes()
  trained = load_writer(args.run_name, '`jaxformer generate`')
  if translates(trained):
    translations(args, trained)
    return
  if args.source is not None or args.beam != 1:
    option = 'source' if args.source is not None else 'beam'
    raise InputError(f'--{option}: {trained.name} is a language model, which takes --prompt')
  texts = [sys.stdin.read() if p == '-' else p for p in args.prompt or ['']]
  prompts = [trained.tokenizer.encode(t).tolist() for t in texts]
  dtype = args.dtype or ('float32' if platform() == 'cpu' else 'bfloat16')
  options: dict[str, Any] = {
    'max_new_tokens': args.max_new_tokens or 200,
    'stop': args.stop,
    'sampling': sampling,
    'seed': args.seed,
    'dtype': jnp.dtype(dtype),
    'end_of_document': trained.tokenizer.end_of_document,
    'vocab_size': trained.tokenizer.vocab_size,
  }
  decode = trained.tokenizer.decode_bytes
  if args.json:
    done = generate_text(trained.definition, trained.params, prompts, decode, **options)
    print(
      json.dumps(
        [
          {'prompt': t, 'text': d.text, 'tokens': d.tokens, 'finished': d.finished}
          for t, d in zip(texts, done, strict=True)
        ]
      )
    )
  elif len(texts) == 1:
    pieces = stream(trained.definition, trained.params, prompts, decode, **options)
    print(texts[0], end='', flush=True)
    for (piece,) in pieces:
      print(piece, end='', flush=True)
    print()
  else:
    for text, d in zip(
      texts,
      generate_text(trained.definition, trained.params, prompts, decode, **options),
      strict=True,
    ):
      print(f'{text}{d.text}\n')


def translations(args: argparse.Namespace, trained: Any) -> None:
  """Translates and prints."""
  import json

  import jax.numpy as jnp

  from jaxformer.inference import Beam
  from jaxformer.sharding import platform

  for option in ('prompt', 'stop', 'top_k', 'top_p', 'min_p', 'repetition_penalty'):
    if getattr(args, option):
      raise InputError(
        f'--{option.replace("_", "-")}: {trained.name} is an encoder-decoder, which takes --source '
        'and searches'
      )
  beam = Beam(
    width=args.beam, length_penalty=args.length_penalty, coverage_penalty=args.coverage_penalty
  )
  if args.source is None and sys.stdin.isatty():
    note('a text to translate a line, up to the end of input (Ctrl-D)')
  texts = args.source if args.source is not None else [line.rstrip('\n') for line in sys.stdin]
  dtype = args.dtype or ('float32' if platform() == 'cpu' else 'bfloat16')
  found = translated(
    trained, texts, beam=beam, max_new_tokens=args.max_new_tokens, dtype=jnp.dtype(dtype)
  )
  if args.json:
    print(
      json.dumps(
        [
          {'source': source, 'text': text, **t._asdict()}
          for source, (text, t) in zip(texts, found, strict=True)
        ]
      )
    )
  else:
    for text, _ in found:
      print(text)
