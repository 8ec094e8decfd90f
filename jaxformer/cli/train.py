"""Train a preset or an experiment file.

Everything about the run is written to runs/NAME, or to a bucket with --run.dir gs://BUCKET/FOLDER.
The same command resumes a run that stopped. Any field of the experiment can be overridden:
--model.width 256 --training.steps 1000 --optimizer Lion --optimizer.learning-rate 1e-4
--mesh.fsdp 4 --data.corpus Files --data.corpus.path my.txt --data.split ByPosition
--run.name mine. A field name not found at its level is applied to all nested configs that have it:
--model.heads 8 sets the heads of every attention layer. --show prints all fields.

The target may also be a family at a size (`train mamba --params 1M`), or a layer of your own in a
model like Llama (`train my_layer.py:MyMixer.Config`, of a million parameters unless a size is
given); see `jaxformer plan --help`."""

from __future__ import annotations

import argparse

import jaxformer as jf
from jaxformer.cli.output import code_option, json_option, show, size_of, size_options
from jaxformer.config import text

OVERRIDES = True
JOINS = True


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    'target',
    metavar='PRESET|FILE|FAMILY|FILE:NAME',
    help='a name of `jaxformer list`, a Python file that defines `experiment`, a family with a '
    'size, or a layer config in a Python file',
  )
  size_options(parser)
  parser.add_argument(
    '--init-from',
    metavar='RUN',
    help='start a new run from the weights of another: a run folder, RUN@STEP, a folder of Hugging '
    'Face weights, or a file of RWKV weights',
  )
  code_option(parser)
  parser.add_argument('--show', action='store_true', help='print the experiment as JSON and stop')
  json_option(parser, 'the result as one JSON object')


def run(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
  experiment = jf.experiment(args.target, overrides=overrides, **size_of(args))
  if args.show:
    print(text(experiment), end='')
    return 0
  result = jf.train(experiment, init_from=args.init_from, code=args.code)
  if result.exit_code == 0:
    show(result, args.json)
  return result.exit_code
