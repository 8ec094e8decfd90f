"""Scores a trained model on held-out data: text in bits per byte, tasks in right answers.

RUN is a run folder (which may be gs://BUCKET/FOLDER) or a name in runs/, with @STEP for an older
checkpoint, or a folder of Hugging Face weights with its tokenizer.json. The text is the validation
split of the run's own data, or what --data... overrides say: --data.corpus Files --data.corpus.path
other.txt. Bits per byte do not depend on the tokenizer. A model trained on a task is scored on its
test sequences, one trained on pairs of texts by the bytes of the translations."""

from __future__ import annotations

import argparse
from typing import Any

from jaxformer.cli.common import Overrides, answer, join_processes, load_trained, note, of_data
from jaxformer.config import InputError
from jaxformer.overrides import override

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run_name', metavar='RUN')
  parser.add_argument('--batch-size', type=int, default=16, help='sequences at a time (16)')
  parser.add_argument(
    '--batches', type=int, help='so many batches, spread over the split; all by default'
  )
  parser.add_argument(
    '--translations',
    type=int,
    default=200,
    help='of pairs: so many held-out texts are translated and scored, '
    'spread over all (200); 0 for none',
  )
  parser.add_argument(
    '--by-position', action='store_true', help='also the loss at each position of a document'
  )
  parser.add_argument('--json', action='store_true')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.data import Text, open_data
  from jaxformer.evaluation import evaluate, loss_by_position
  from jaxformer.training.experiment import Experiment, check_fit

  for option in ('batch_size', 'batches'):
    if (given := getattr(args, option)) is not None and given < 1:
      raise InputError(f'--{option.replace("_", "-")} {given}: must be positive')
  if args.translations < 0:
    raise InputError(f'--translations {args.translations}: must be at least 0')
  join_processes()
  trained = load_trained(args.run_name)
  for path, _ in overrides:
    if not of_data(path) or path.startswith(
      ('data.tokenizer', 'data.source_tokenizer', 'data.source-tokenizer')
    ):
      raise InputError(
        f'--{path}: `jaxformer eval` takes overrides of data alone, and the tokenizer is the '
        "model's own"
      )
  length = min(trained.definition.config.context_length, 1024)
  experiment = trained.experiment or Experiment(
    model=trained.definition.config, data=Text(sequence_length=length)
  )
  data = override(experiment, overrides).data
  if trained.tokenizer is None and data.has_text:
    raise InputError(
      f'{args.run_name}: was trained on {experiment.data.tag}, without a tokenizer; it cannot be '
      'scored on text'
    )
  check_fit(trained.definition.config, data)
  if args.by_position and data.task.predicts == 'class':
    raise InputError(f'--by-position: {data.tag} asks for one class a sequence')
  dataset = open_data(data, log=note, tokenizer=trained.tokenizer)
  check_fit(trained.definition.config, data, dataset.vocab_size, dataset.source_vocab_size)

  def batches():
    return dataset.validation_batches(args.batch_size, args.batches)

  bytes_V = None if dataset.tokenizer is None else dataset.tokenizer.token_bytes
  r = evaluate(trained.definition, trained.params, batches(), token_bytes_V=bytes_V)
  value: dict[str, Any] = {
    'run': trained.name,
    'step': trained.step,
    'source': data.title,
    'loss': r.loss,
    'targets': r.count,
  }
  if baselines := dataset.baselines():
    value |= {
      'bits_per_byte': r.bits_per_byte,
      'perplexity': r.perplexity,
      'bytes': r.bytes,
    } | baselines
  elif r.bytes is not None:
    value |= {
      'bits_per_byte': r.bits_per_byte,
      'perplexity': r.perplexity,
      'bytes': r.bytes,
      'accuracy': r.accuracy,
    }
  else:
    value['accuracy'] = r.accuracy
  translated = None
  if dataset.source_vocab_size is not None and args.translations:
    translated = translations(trained, dataset, args)
    value['translation'] = translated.json()
  if args.by_position:
    value['loss_by_position'] = loss_by_position(
      trained.definition, trained.params, batches()
    ).loss_T.tolist()

  def lines() -> list[str]:
    head = f'{trained.name} at step {trained.step}, {data.validation_name}: {r.count:,} targets'
    if r.bytes is None:
      out = [head, f'  {r.accuracy:.2%} right, {r.loss:.4f} nats a target']
    elif dataset.source_vocab_size is not None:
      out = [
        f'{head}, {r.bytes:,} bytes of translations',
        f'  {r.bits_per_byte:.4f} bits per byte, {r.loss:.4f} nats a token, perplexity '
        f'{r.perplexity:.2f}, '
        f'{r.accuracy:.2%} of tokens right',
      ]
      out += [f'  {line}' for line in translated.lines()] if translated is not None else []
    else:
      out = [
        f'{head}, {r.bytes:,} bytes',
        f'  {value["bits_per_byte"]:.4f} bits per byte (bigram model of bytes '
        f'{value["bigram_bits_per_byte"]:.4f}, unigram '
        f'{value["unigram_bits_per_byte"]:.4f})',
        f'  {r.loss:.4f} nats a token, perplexity {r.perplexity:.2f}',
      ]
    if args.by_position:
      at = [
        i
        for i in (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095)
        if i < len(value['loss_by_position'])
      ]
      out += [
        '  nats at position ' + ', '.join(f'{i}: {value["loss_by_position"][i]:.3f}' for i in at)
      ]
    return out

  answer(value, args.json, lines)


def translations(trained: Any, dataset: Any, args: argparse.Namespace) -> Any:
  """Scores of the likeliest translation, token by token, of held-out texts."""
  from jaxformer.evaluation import evaluate_translation
  from jaxformer.inference.translate import translate

  def search(sources: Any) -> list[list[int]]:
    found = translate(
      trained.definition,
      trained.params,
      sources,
      end=dataset.tokenizer.end_of_document,
      vocab_size=dataset.vocab_size,
      batch_size=args.batch_size,
    )
    return [t.tokens for t in found]

  return evaluate_translation(search, dataset.held_out_pairs(args.translations), dataset.tokenizer)
