"""Measure training and decoding speed on this machine, with random weights and tokens.

Training runs the step of the experiment (batch size, sequence length, optimizer, mesh, dtype);
decoding is measured at each --context-length. Figures are medians; on a shared machine compare only
figures of one invocation."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import json_option, show

OVERRIDES = True
JOINS = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('target', metavar='PRESET|FILE')
  parser.add_argument('--steps', type=int, help='training steps measured (10); 0 omits training')
  parser.add_argument(
    '--context-length',
    dest='context_lengths',
    type=int,
    action='append',
    help='tokens in the prompt before decoding is measured; may be repeated',
  )
  parser.add_argument(
    '--new-tokens', type=int, help='tokens decoded at each context length (128); 0 omits decoding'
  )
  json_option(parser, 'the figures as one JSON object')


def run(json: bool, **options: Any) -> None:
  show(jf.bench(**options), json)
