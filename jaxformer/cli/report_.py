"""Writes the report of a study from the runs that are done, and trains nothing.

STUDY is what `jaxformer compare` takes, with the same fields. Architectures with runs still to come
are left out, and named. What the others cost is measured where it was not yet."""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, note
from jaxformer.cli.compare_ import study_arguments, study_of_arguments, tell
from jaxformer.config import InputError
from jaxformer.exit_codes import PREEMPTED

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  study_arguments(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer.study.report import report_study
  from jaxformer.study.runner import finished_part
  from jaxformer.study.scaling_study import ScalingStudy
  from jaxformer.study.sharing import Interrupted

  whole = study_of_arguments(args, overrides)
  if isinstance(whole, ScalingStudy):
    raise InputError(
      f'{args.target}: a law needs all its trainings; `jaxformer compare {args.target}` does those '
      'that remain'
    )
  part = finished_part(whole)
  if missing := [e.title for e in whole.entries if e not in part.entries]:
    note(f'not done yet, and left out: {", ".join(missing)}')
  try:
    tell(report_study(part, note), args.json)
  except Interrupted:
    return PREEMPTED
  return 0
