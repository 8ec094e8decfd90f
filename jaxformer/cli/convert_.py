"""Writes a trained model as Hugging Face weights: config.json, safetensors, and the tokenizer.

The other direction needs no conversion: `generate`, `eval` and `train --init-from` read a folder of Hugging Face weights as it is.
"""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, load_writer, note

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('run_name', metavar='RUN', help='a run (NAME, runs/NAME, either with @STEP), or a folder of Hugging Face '
                      'weights')
  parser.add_argument('out', metavar='FOLDER', help='where to write; must be new or empty')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  import pathlib

  from jaxformer.interop import save_hf
  trained = load_writer(args.run_name, '`jaxformer convert`')
  save_hf(args.out, trained.definition.config, trained.params, dtype=args.dtype)
  (pathlib.Path(args.out) / 'tokenizer.json').write_text(trained.tokenizer.hugging_face())
  note(f'wrote {trained.name} to {args.out}: {trained.definition.size:,} parameters, {args.dtype}')
