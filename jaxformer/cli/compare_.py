"""Trains the architectures of a study, at equal size or, in a scaling study, at many sizes and budgets, and writes a report of what
came of it.

STUDY is a study by name (quickstart, standard, scaling) or a Python file that defines `study` (a `jaxformer.compare.study.Study`, a
`jaxformer.compare.scaling_study.ScalingStudy`, or a function that returns one). Runs are in DIR/STUDY, the report in
DIR/STUDY/report as report.html, .md, .csv and .json. A study that was stopped goes on with the same command. Any field can be
given: --study.tokens 1e6 --study.seeds 1,2,3 --study.tasks.0.sequence_length 256. `--add my_layer.py:MyMixer.Config` puts a layer
of yours, at the study's size in a frame like Llama's, beside the others.
"""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, answer, note, object_of, study_of
from jaxformer.config import InputError

OVERRIDES = True
INTERRUPTED = 75


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('target', metavar='STUDY', help='quickstart, standard, scaling, or a Python file that defines `study`')
  parser.add_argument('--add', metavar='FILE:NAME', action='append', default=[],
                      help='a layer config or a model config in a Python file; may be given several times')
  parser.add_argument('--show', action='store_true', help='print the whole study as JSON and stop')
  parser.add_argument('--json', action='store_true', help='print what report.json holds')


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer import config
  from jaxformer.compare.runner import Interrupted
  study = config.override(with_added(study_of(args.target), args.add), overrides, 'study')
  if args.show:
    print(config.text(study), end='')
    return 0
  from jaxformer.compare.report import report_study
  from jaxformer.compare.scaling_report import report_scaling
  from jaxformer.compare.scaling_study import ScalingStudy
  try:
    report = report_scaling(study, note) if isinstance(study, ScalingStudy) else report_study(study, note)
  except Interrupted:
    note('interrupted: what was running is saved; the same command goes on from there')
    return INTERRUPTED
  folder = study.folder / 'report'
  answer(report.to_json(), args.json, lambda: [*report.answer, f'report: {folder / "report.html"}'])
  return 0


def with_added(study, names):
  """The study with the layers and models that `--add` names."""
  from jaxformer.compare.study import AsIs, Mixer
  from jaxformer.layers.layer import LayerConfig
  from jaxformer.models.language_model import ModelConfig
  added = []
  for name in names:
    thing = object_of(name)
    if isinstance(thing, LayerConfig):
      added.append(Mixer(layer=thing))
    elif isinstance(thing, ModelConfig):
      added.append(AsIs(model_config=thing))
    else:
      raise InputError(f'--add {name}: is neither the config of a layer nor that of a model')
  return study.replace(entries=(*study.entries, *added)) if added else study
