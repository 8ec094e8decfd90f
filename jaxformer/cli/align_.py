"""Shows which words of a source an encoder-decoder looked at for each word of its translation, or
of one that is given.

RUN is as in `jaxformer generate`. The picture has the target from top to bottom and the source from
left to right; a row is what the model attended to when it predicted the token that stands beside
it, the mean over heads and layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from jaxformer.cli.common import (
  Overrides,
  answer,
  load_writer,
  source_ids,
  source_tokenizer,
  translates,
)
from jaxformer.config import InputError

OVERRIDES = False
END = '<end>'


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run_name', metavar='RUN')
  parser.add_argument('--source', required=True, help='the text to translate')
  parser.add_argument('--target', help="its translation; by default the model's own")
  parser.add_argument(
    '--beam', type=int, default=1, help='hypotheses that are kept in making one (1)'
  )
  parser.add_argument(
    '--layer',
    type=int,
    help='one layer of those that attend to the source, from 0 at the bottom; by default '
    'the mean over all',
  )
  parser.add_argument(
    '--out', metavar='FILE', help='the picture; its ending says the format (.png, .svg, .pdf)'
  )
  parser.add_argument(
    '--json',
    action='store_true',
    help='{source, target, weights}: tokens as text, and a row of weights for each of the target',
  )


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  from jaxformer.inference import Beam, align, draw, translate

  trained = load_writer(args.run_name, '`jaxformer align`')
  if not translates(trained):
    raise InputError(
      f'{args.run_name}: is no encoder-decoder; there is no source that it could attend to'
    )
  tokenizer, end = trained.tokenizer, trained.tokenizer.end_of_document
  source = source_ids(trained, args.source)
  if args.target is None:
    target = translate(
      trained.definition,
      trained.params,
      [source],
      end=end,
      beam=Beam(width=args.beam),
      vocab_size=tokenizer.vocab_size,
    )[0].tokens
  else:
    target = tokenizer.encode(args.target).tolist()
  found = align(trained.definition, trained.params, source, target, end=end)
  layers = len(found.layers_LTS)
  if args.layer is not None and not 0 <= args.layer < layers:
    raise InputError(
      f'--layer {args.layer}: must be at least 0 and below the {layers} layers that attend to the '
      'source'
    )
  weights_TS = found.mean_TS if args.layer is None else found.layers_LTS[args.layer]
  rows, columns = _names(tokenizer, [*target, end]), _names(source_tokenizer(trained), source)
  if args.out is not None:
    draw(args.out, weights_TS, columns, rows)

  def lines() -> list[str]:
    looked = [
      f'{row}\t{columns[int(w.argmax())]}\t{w.max():.2f}'
      for row, w in zip(rows, weights_TS, strict=True)
    ]
    return [*looked, *([] if args.out is None else [f'picture: {args.out}'])]

  answer({'source': columns, 'target': rows, 'weights': weights_TS.tolist()}, args.json, lines)


def _names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """Each token as text; the end has none of its own."""
  return [END if i == tokenizer.end_of_document else tokenizer.decode([i]) for i in ids]
