"""Write the report of a study from its finished runs, without training.

STUDY and its fields are those of `jaxformer compare`. Architectures with unfinished runs are left
out, and named. Missing costs of the others are measured."""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides, note
from jaxformer.cli.compare_ import study_arguments, study_of_arguments, tell
from jaxformer.exit_codes import PREEMPTED

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  study_arguments(parser)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  from jaxformer.study.report import report_study
  from jaxformer.study.runner import finished_part
  from jaxformer.study.sharing import Interrupted

  whole = study_of_arguments(args, overrides)
  part = finished_part(whole)
  if missing := [e.title for e in whole.entries if e not in part.entries]:
    note(f'unfinished, and left out: {", ".join(missing)}')
  try:
    tell(report_study(part, note), args.json)
  except Interrupted:
    return PREEMPTED
  return 0
