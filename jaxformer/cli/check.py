"""Check a layer of your own against the contract of layers.

FILE:NAME names a layer config in a Python file, as in my_layer.py:MyMixer.Config; the examples of
its class are checked too. The exit code is 1 if a check fails. To check sharding on a machine with
one device, simulate several: XLA_FLAGS=--xla_force_host_platform_device_count=8."""

import argparse

import jaxformer as jf
from jaxformer.cli.output import json_option, show

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('layer', metavar='FILE:NAME', help='a layer config in a Python file')
  json_option(parser, 'an array of {layer, check, verdict, wrong}')


def run(layer: str, json: bool) -> int:
  found = jf.check(layer)
  show(found, json)
  return 0 if found.passed else 1
