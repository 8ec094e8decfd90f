"""Write the report of a study from its finished runs, without training.

STUDY is what `jaxformer compare` accepts, with the same fields. Architectures with unfinished runs
are omitted and named. Costs that were not measured yet are measured."""

import argparse
from typing import Any

import jaxformer as jf
from jaxformer.cli.compare import study_arguments
from jaxformer.cli.output import code_option, show

OVERRIDES = True


def arguments(parser: argparse.ArgumentParser) -> None:
  study_arguments(parser)
  code_option(parser)


def run(json: bool, **options: Any) -> None:
  show(jf.report(**options), json)
