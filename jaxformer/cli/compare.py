"""Train the architectures of a study and write a report.

STUDY is a study by name (quickstart, standard, scaling) or a Python file that defines `study` (a
`jaxformer.study.study.Study`, or a function that returns one): architectures at equal size or, in
a scaling study, at many sizes and budgets. Runs are written to DIR/STUDY, the report to
DIR/STUDY/report as report.html, .md, .csv and .json. The same command resumes a study that was
stopped. Any field can be overridden: --study.tokens 1e6 --study.seeds 1,2,3
--study.tasks.0.sequence_length 256. `--add gated-deltanet` adds a family at the size of the study,
`--add my_layer.py:MyMixer.Config` a layer of your own in a model like Llama. Small models leave
most cores idle, so several processes train at once (--workers); other machines with the same DIR
can help with --train-only."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.output import Overrides, emit, json_option, show, show_option
from jaxformer.config import text

OVERRIDES = True


def study_arguments(parser: argparse.ArgumentParser) -> None:
  """Add the options that select a study."""
  parser.add_argument(
    'target',
    metavar='STUDY',
    help='quickstart, standard, scaling, or a Python file that defines `study`',
  )
  parser.add_argument(
    '--add',
    metavar='FAMILY|FILE:NAME',
    action='append',
    help='a family at the size of the study, or a layer or model config in a Python file; may be '
    'repeated',
  )
  json_option(parser, 'the contents of report.json')


def arguments(parser: argparse.ArgumentParser) -> None:
  study_arguments(parser)
  parser.add_argument(
    '--workers',
    type=int,
    metavar='N',
    help='processes that train at once; default: one per core, at most 4, and one on an '
    'accelerator',
  )
  parser.add_argument(
    '--train-only',
    action='store_true',
    help='train what no other process of this study is training, and write no report',
  )
  show_option(parser, 'study')


def run(
  overrides: Overrides,
  json: bool,
  print_only: bool,
  workers: int | None = None,
  train_only: bool = False,
  **of: Any,
) -> None:
  if print_only:
    emit(text(jf.get_study(overrides=overrides, **of)), end='')
  elif train_only:
    jf.train_runs(overrides=overrides, **of)
  else:
    show(jf.compare(overrides=overrides, workers=workers, **of), json)
