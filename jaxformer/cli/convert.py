"""Export a trained model for other libraries.

Writes a folder of Hugging Face weights (config.json, safetensors and the tokenizer) or, under a
name that ends in .safetensors or .pth, a file of RWKV weights. The other direction needs no
conversion: `generate`, `eval` and `train --init-from` read such folders and files directly."""

from __future__ import annotations

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import code_option

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'model',
    metavar='RUN',
    help='a run (NAME, runs/NAME, either with @STEP), a folder of Hugging Face weights, or a file '
    'of RWKV weights (.safetensors or .pth)',
  )
  parser.add_argument('out', metavar='FOLDER|FILE', help='must be new, or an empty folder')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16', 'float16'),
    default='float32',
    help='dtype of the weights written (float32)',
  )
  code_option(parser)


def run(**options: Any) -> None:
  jf.convert(**options)
