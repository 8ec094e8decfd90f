"""Export a trained model for other libraries.

Writes a folder of Hugging Face weights (config.json, safetensors and the tokenizer) or, under a
name that ends in .safetensors or .pth, a file of RWKV weights. The other direction needs no
conversion: `generate`, `eval` and `train --init-from` read such folders and files directly."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import run_argument

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  run_argument(parser)
  parser.add_argument('out', metavar='FOLDER|FILE', help='must be new, or an empty folder')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16', 'float16'),
    help='dtype of the weights written (float32)',
  )


def run(**options: Any) -> None:
  jf.convert(**options)
