"""Writes a trained model in another library's form: a folder of Hugging Face weights (config.json,
safetensors, and the tokenizer), or, under a name that ends in .safetensors or .pth, a file of RWKV
weights.

The other direction needs no conversion: `generate`, `eval` and `train --init-from` read such
  folders and files as they are.
"""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, load_trained, load_writer, note

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'run_name',
    metavar='RUN',
    help='a run (NAME, runs/NAME, either with @STEP), a folder of Hugging Face '
    'weights, or a file of RWKV weights (.safetensors or .pth)',
  )
  parser.add_argument(
    'out', metavar='FOLDER|FILE', help='where to write; must be new, or an empty folder'
  )
  parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')


def run(args: argparse.Namespace, overrides: Overrides) -> None:
  import pathlib

  from jaxformer.interop import is_rwkv, save_hf, save_rwkv

  if is_rwkv(args.out):
    trained = load_trained(args.run_name, tokenizer=False)
    save_rwkv(args.out, trained.definition.config, trained.params, dtype=args.dtype)
  else:
    trained = load_writer(args.run_name, '`jaxformer convert`')
    save_hf(args.out, trained.definition.config, trained.params, dtype=args.dtype)
    (pathlib.Path(args.out) / 'tokenizer.json').write_text(trained.tokenizer.hugging_face())
  note(f'wrote {trained.name} to {args.out}: {trained.definition.size:,} parameters, {args.dtype}')
