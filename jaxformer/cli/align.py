"""Plot the cross-attention between a source and its translation.

RUN is as in `jaxformer generate`. The picture has the target from top to bottom and the source from
left to right; a row shows what the model attended to when it predicted the token beside it, the
mean over heads and layers."""

import argparse
from collections.abc import Sequence
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import emit, json_option, run_argument, show

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  run_argument(parser)
  parser.add_argument('--source', required=True, help='the text to translate')
  parser.add_argument('--target', help="its translation; default: the model's own")
  parser.add_argument('--beam', type=int, help='beam width of that translation (1)')
  parser.add_argument(
    '--layer', type=int, help='a cross-attention layer, from 0 at the bottom; default: their mean'
  )
  parser.add_argument('--out', metavar='FILE', help='write a picture (.png, .svg, .pdf)')
  json_option(parser, '{source, target, weights}: tokens, and a row of weights per target token')


def run(
  source: str,
  model: str,
  json: bool,
  out: str | None = None,
  code: Sequence[str] = (),
  **options: Any,
) -> None:
  found = jf.load(model, code=code).align(source, **options)
  if out is not None:
    found.draw(out)
  show(found, json)
  if out is not None and not json:
    emit(f'picture: {out}')
