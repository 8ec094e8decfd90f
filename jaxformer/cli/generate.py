"""Continue a text with a trained model; with an encoder-decoder, translate.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older
checkpoint, or a folder of Hugging Face weights (safetensors) with its tokenizer.json. A language
model takes --prompt and sampling options, and prints text as it is generated. An encoder-decoder
takes --source, or each line of standard input, and beam search options; it prints one line for
each."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import code_option, given, json_option, print_json

OVERRIDES = False
JOINS = True
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
SEARCH = ('beam', 'length_penalty', 'coverage_penalty')
BOTH = ('max_new_tokens', 'dtype')


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add('run_name', metavar='RUN')
  add('--prompt', action='append', help='text to continue; - reads standard input; repeatable')
  add(
    '--source',
    action='append',
    help='text to translate; default: every line of standard input; repeatable',
  )
  add('--beam', type=int, help='beam width; 1 is greedy decoding (1)')
  add(
    '--length-penalty',
    type=float,
    help='length-normalization exponent alpha (Wu et al. 2016) (0.6)',
  )
  add('--coverage-penalty', type=float, help='coverage weight beta (Wu et al. 2016) (0)')
  add('--max-new-tokens', type=int, help='default: 200; for translation 2 x source length + 10')
  add('--stop', action='append', metavar='TEXT', help='end the text before TEXT; repeatable')
  add('--seed', type=int, help='of the random draws (0)')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='of weights and activations; default: bfloat16 on TPU and GPU',
  )
  add('--temperature', type=float, help='divides the logits; 0 is greedy (0.8)')
  add('--top-k', type=int, help='keep the k most likely tokens')
  add('--top-p', type=float, help='keep the most likely tokens whose probabilities add up to p')
  add('--min-p', type=float, help='keep tokens at least p times as likely as the most likely one')
  add('--repetition-penalty', type=float, help='makes tokens that have occurred less likely')
  code_option(parser)
  json_option(
    parser,
    'an array of {prompt, text, tokens, finished} at the end; for translation of {source, text, '
    'tokens, log_p, score, finished}',
  )


def run(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
  """Only options that were given are passed on: defaults are those of the functions."""

  def options(*names: str) -> dict[str, Any]:
    return {k: v for k, v in given(args, names).items() if v is not None}

  jf.Sampling(**options(*SAMPLING))  # an error before the model is loaded
  model = jf.load(args.run_name, code=args.code)
  if model.translates:
    _refuse(options('prompt', 'stop', 'seed', *SAMPLING), f'{model.name} is an encoder-decoder')
    _translate(model, args, options(*SEARCH, *BOTH))
  else:
    _refuse(options('source', *SEARCH), f'{model.name} is not an encoder-decoder')
    _generate(model, args, options('stop', 'seed', *SAMPLING, *BOTH))


def _refuse(options: dict[str, Any], why: str) -> None:
  for name in options:
    raise jf.InputError(f'--{name.replace("_", "-")}: has no effect: {why}')


def _generate(model: jf.Model, args: argparse.Namespace, options: dict[str, Any]) -> None:
  prompts = [sys.stdin.read() if p == '-' else p for p in args.prompt or ['']]
  if len(prompts) == 1 and not args.json:
    pieces = model.stream(prompts[0], **options)
    print(prompts[0], end='', flush=True)
    for piece in pieces:
      print(piece, end='', flush=True)
    print()
    return
  found = list(zip(prompts, model.complete(prompts, **options), strict=True))
  if args.json:
    print_json([{'prompt': p, **t._asdict()} for p, t in found])
  else:
    for prompt, t in found:
      print(f'{prompt}{t.text}\n')


def _translate(model: jf.Model, args: argparse.Namespace, options: dict[str, Any]) -> None:
  if args.source is None and sys.stdin.isatty():
    print('one text to translate per line; Ctrl-D ends', file=sys.stderr)
  sources = args.source
  if sources is None:
    sources = [line.rstrip('\n') for line in sys.stdin]
  found = model.translations(sources, **options)
  if args.json:
    pairs = zip(sources, found, strict=True)
    print_json([{'source': s, 'text': text, **t._asdict()} for s, (text, t) in pairs])
  else:
    for text, _ in found:
      print(text)
