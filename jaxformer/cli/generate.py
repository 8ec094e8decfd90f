"""Continue a text with a trained model; with an encoder-decoder, translate.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older
checkpoint, or a folder of Hugging Face weights (safetensors) with its tokenizer.json. A language
model takes --prompt and sampling options, and prints text as it is generated. An encoder-decoder
takes --source, or each line of standard input, and beam search options; it prints one line for
each."""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import emit, json_option, print_json, read_stdin, run_argument

OVERRIDES = False
JOINS = True
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
SEARCH = ('beam', 'length_penalty', 'coverage_penalty')


def arguments(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  run_argument(parser)
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
  add(
    '--max-new-tokens',
    type=int,
    help='most tokens to generate; default: 200, for translation 2 x source length + 10',
  )
  add(
    '--stop',
    action='append',
    metavar='TEXT',
    help='end the text before TEXT, which may be a special token; repeatable',
  )
  add('--seed', type=int, help='seed of the random draws (0)')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='dtype of weights and activations; default: bfloat16 on TPU and GPU, float32 on CPU',
  )
  add('--temperature', type=float, help='divides the logits; 0 is greedy (0.8)')
  add('--top-k', type=int, help='keep the k most likely tokens; 0 for all')
  add(
    '--top-p',
    type=float,
    help='keep the most likely tokens whose probabilities add up to p; 1 for all',
  )
  add(
    '--min-p',
    type=float,
    help='keep tokens at least p times as likely as the most likely one; 0 for all',
  )
  add(
    '--repetition-penalty',
    type=float,
    help='makes tokens that have occurred less likely; 1 for no penalty (default: that of a '
    'Hugging Face folder, else 1)',
  )
  json_option(
    parser,
    'an array of {prompt, text, tokens, finished} at the end; for translation of {source, text, '
    'tokens, log_p, score, finished}',
  )


def run(model: str, json: bool, code: Sequence[str] = (), **given: Any) -> None:
  jf.Sampling(**{name: given[name] for name in SAMPLING if name in given})  # before loading
  loaded = jf.load(model, code=code)
  refused = ('prompt', 'stop', 'seed', *SAMPLING) if loaded.translates else ('source', *SEARCH)
  for name in refused:
    if name in given:
      kind = 'an encoder-decoder' if loaded.translates else 'not an encoder-decoder'
      option = f'--{name.replace("_", "-")}'
      raise jf.InputError(f'{option}: has no effect: {loaded.name} is {kind}')
  answer = _translate if loaded.translates else _generate
  answer(loaded, json, **given)


def _generate(model: jf.Model, json: bool, prompt: Sequence[str] = ('',), **options: Any) -> None:
  prompts = [read_stdin() if p == '-' else p for p in prompt]
  if len(prompts) == 1 and not json:
    pieces = model.stream(prompts[0], **options)
    emit(prompts[0], end='')
    for piece in pieces:
      emit(piece, end='')
    emit('')
    return
  found = list(zip(prompts, model.complete(prompts, **options), strict=True))
  if json:
    print_json([{'prompt': p, **t._asdict()} for p, t in found])
  else:
    for p, t in found:
      emit(f'{p}{t.text}\n')


def _translate(
  model: jf.Model, json: bool, source: Sequence[str] | None = None, **options: Any
) -> None:
  if source is None and sys.stdin is not None and sys.stdin.isatty():
    print('one text to translate per line; Ctrl-D ends', file=sys.stderr)
  if source is None:
    source = [line.removesuffix('\n') for line in io.StringIO(read_stdin())]
  found = model.translations(source, **options)
  if json:
    pairs = zip(source, found, strict=True)
    print_json([{'source': s, 'text': text, **t._asdict()} for s, (text, t) in pairs])
  else:
    for text, _ in found:
      emit(text)
