"""List all presets with their families and sizes."""

import argparse

import jaxformer as jf
from jaxformer.cli.output import json_option, show

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  json_option(parser, 'an array of {name, family, params, active_params}')


def run(json: bool) -> None:
  show(jf.presets(), json)
