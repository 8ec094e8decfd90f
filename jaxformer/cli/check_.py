"""Check your own layer against the contract of layers, and print one verdict per line.

FILE:NAME names a layer's config in a Python file, as in my_layer.py:MyMixer.Config; the examples of
its class are checked too. The exit code is 1 if a check fails. To check sharding on a machine with
one device, simulate several:
XLA_FLAGS=--xla_force_host_platform_device_count=8."""

from __future__ import annotations

import argparse

from jaxformer.cli.common import Overrides
from jaxformer.config import InputError
from jaxformer.user_code import object_in_file

OVERRIDES = False


def arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('target', metavar='FILE:NAME', help="a layer's config in a Python file")
  parser.add_argument(
    '--json', action='store_true', help='an array of {layer, check, verdict, wrong}'
  )


def run(args: argparse.Namespace, overrides: Overrides) -> int:
  import json

  from jaxformer import config
  from jaxformer.layers.layer import LayerConfig
  from jaxformer.testing import check_layer, checked_examples

  layer = object_in_file(args.target)
  if not isinstance(layer, LayerConfig):
    raise InputError(f'{args.target}: is not the config of a layer (a subclass of LayerConfig)')
  found = []
  for example in checked_examples(layer):
    given = (
      ', '.join(config.differences(config.to_json(type(layer)()), config.to_json(example)))
      if example != layer
      else ''
    )
    if not args.json:
      print(f'{example.tag}' + (f' with {given}' if given else ''))
    for verdict in check_layer(example):
      found.append((example, verdict))
      if not args.json:
        print(f'  {verdict.line}', flush=True)
  if args.json:
    print(json.dumps([{'layer': config.to_json(e)} | v.to_json() for e, v in found], indent=2))
  failed = sum(not v.passed for _, v in found)
  if not args.json:
    print(f'{failed} of {len(found)} checks fail' if failed else 'all checks pass')
  return 1 if failed else 0
