"""Train the architectures of a study, at equal size or over a grid of sizes, and write a report.

STUDY is a study by name (quickstart, standard, scaling) or a Python file that defines `study` (a
`jaxformer.study.study.Study`, or a function that returns one). Runs are in DIR/STUDY, the report in
DIR/STUDY/report as report.html, .md, .csv and .json. The same command resumes an interrupted study.
Any field can be set: --study.tokens 1e6 --study.seeds 1,2,3 --study.tasks.0.sequence_length 256.
`--add my_layer.py:MyMixer.Config` adds your own layer, in place of Llama's attention and scaled to
the study's size. Small models leave most cores idle, so several processes train at once
(`--workers`); other machines that share DIR can join with `--train-only`."""

from __future__ import annotations

import argparse
import sys

from jaxformer.cli.common import Overrides, answer, note, study_of
from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED
from jaxformer.user_code import object_in_file

OVERRIDES = True


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
    help='train what no other process of this study is training, without a report',
  )
  parser.add_argument('--show', action='store_true', help='print the whole study as JSON and stop')


def study_arguments(parser: argparse.ArgumentParser) -> None:
  """What names a study."""
  parser.add_argument(
    'target',
    metavar='STUDY',
    help='quickstart, standard, scaling, or a Python file that defines `study`',
  )
  parser.add_argument(
    '--add',
    metavar='FILE:NAME',
    action='append',
    default=[],
    help='a layer config or a model config in a Python file; may be given several times',
  )
  parser.add_argument('--json', action='store_true', help='print what report.json holds')


def study_of_arguments(args: argparse.Namespace, overrides: Overrides):
  """The study that a command line names."""
  from jaxformer.overrides import override

  return override(with_added(study_of(args.target), args.add), overrides, 'study')


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer import config
  from jaxformer.study.sharing import Interrupted

  study = study_of_arguments(args, overrides)
  if args.show:
    print(config.text(study), end='')
    return 0
  from jaxformer.study.report import report_study, train_study
  from jaxformer.training.interrupt import Interrupt

  try:
    if args.train_only:
      with Interrupt() as interrupt:
        train_study(study, note, interrupt)
    else:
      tell(report_study(study, note, helpers(args, overrides, study)), args.json)
  except Interrupted:
    note('interrupted: runs are saved; the same command resumes them')
    return PREEMPTED
  return 0


def tell(report, as_json: bool) -> None:
  """The answer of a report, and where it is."""
  folder = report.study.folder / 'report'
  answer(report.to_json(), as_json, lambda: [*report.answer, f'report: {folder / "report.html"}'])


def helpers(args: argparse.Namespace, overrides: Overrides, study) -> list[list[str]]:
  """The commands that train the same study beside this one."""
  from jaxformer.study.sharing import worthwhile

  if args.workers is not None and args.workers < 1:
    raise InputError(f'--workers {args.workers}: must be at least 1')
  added = [word for name in args.add for word in ('--add', name)]
  given = [f'--{name}={value}' for name, value in overrides]
  command = [
    sys.executable,
    '-m',
    'jaxformer',
    'compare',
    args.target,
    *added,
    *given,
    '--train-only',
  ]
  return [command] * ((args.workers or worthwhile(len(study.entries))) - 1)


def with_added(study, names):
  """The study with the layers and models that `--add` names."""
  from jaxformer.layers.layer import LayerConfig
  from jaxformer.models.model import ModelConfig
  from jaxformer.study.study import FixedModel, TokenMixer

  added = []
  for name in names:
    thing = object_in_file(name)
    if isinstance(thing, LayerConfig):
      added.append(TokenMixer(layer=thing))
    elif isinstance(thing, ModelConfig):
      added.append(FixedModel(model_config=thing))
    else:
      raise InputError(f'--add {name}: is neither the config of a layer nor that of a model')
  return study.replace(entries=(*study.entries, *added)) if added else study
