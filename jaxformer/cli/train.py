"""Train a preset or an experiment file.

Everything about the run is written to runs/NAME, or to a bucket with --run.dir gs://BUCKET/FOLDER.
The same command resumes a run that stopped. Any field of the experiment can be overridden:
--model.width 256 --training.steps 1000 --optimizer Lion --optimizer.learning-rate 1e-4
--mesh.fsdp 4 --data.corpus Files --data.corpus.path my.txt --data.split ByPosition
--run.name mine. A field name not found at its level is applied to all nested configs that have it:
--model.heads 8 sets the heads of every attention layer. --show prints all fields.

A published model has the recipe of its paper (`jaxformer describe NAME` has the sources), and needs
a tokenizer and a corpus: --data.tokenizer TokenizerFile --data.tokenizer.path FILE.json
--data.corpus Files --data.corpus.path my-texts/. A FAMILY-tiny preset trains on the Python standard
library for about a minute.

The target may also be a family at a size (`train mamba --params 1M`), or a layer of your own in a
model like Llama (`train my_layer.py:MyMixer.Config`, of a million parameters unless a size is
given); see `jaxformer plan --help`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import code_option, emit, json_option, show, show_option, size_options
from jaxformer.config import text
from jaxformer.exit_codes import DONE

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
  parser.add_argument(
    '--resume-from',
    metavar='STEP',
    type=int,
    help='go back to the checkpoint of a step; later checkpoints and metrics are moved to undone/ '
    'in the run folder',
  )
  code_option(parser)
  show_option(parser, 'experiment')
  json_option(parser, 'the result as one JSON object')


def run(
  json: bool,
  print_only: bool,
  init_from: str | None = None,
  resume_from: int | None = None,
  code: Sequence[str] = (),
  **options: Any,
) -> int:
  experiment = jf.experiment(**options)
  if print_only:
    for line in jf.recipe_notes(options['target']):
      print(line, file=sys.stderr)
    emit(text(experiment), end='')
    return DONE
  result = jf.train(experiment, init_from=init_from, resume_from=resume_from, code=code)
  if json or result.exit_code == DONE:
    show(result, json)
  return result.exit_code
