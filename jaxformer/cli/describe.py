"""Read a model from top to bottom: layers with formulas and papers, shapes, parameters, FLOPs,
state bytes and implementations.

The model is a preset, a run or folder of weights, that of a Python file that defines `experiment`,
or a layer as FILE.py:NAME. FLOPs are those of the forward pass, averaged over a causal sequence of
the length that it is trained with; state is that of decoding a sequence of the model's context
length, in a program that computes in bfloat16. The sums are those of `jaxformer plan`. Of a
published model it also shows the training recipe, with the source of each value."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import code_option, json_option, show

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('model', metavar='PRESET|RUN|FILE|FILE:NAME')
  parser.add_argument(
    '--target', help='also show the implementations that run on this slice, e.g. v5e-64'
  )
  code_option(parser)
  json_option(parser, 'one JSON object')


def run(json: bool, **options: Any) -> None:
  show(jf.describe(**options), json)
