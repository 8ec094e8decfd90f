"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

SIZES = {
  '--params': 'parameter count',
  '--active-params': 'count of parameters that one token uses',
  '--flops-per-token': 'number of training FLOPs per token',
  '--state-bytes': 'number of bytes of decoding state',
}


class Result(Protocol):
  """What the functions of `jaxformer.api` return."""

  def json(self) -> Any: ...
  def lines(self) -> list[str]: ...


def show(result: Result, as_json: bool) -> None:
  """Print a result: one JSON value, or lines for people."""
  if as_json:
    print_json(result.json())
  else:
    print('\n'.join(result.lines()))


def print_json(value: Any) -> None:
  """Print one JSON value; numbers that are not finite are null."""
  print(json.dumps(_finite(value), indent=2, allow_nan=False, default=float))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if hasattr(value, 'dtype'):  # a scalar of NumPy or JAX
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def json_option(parser: argparse.ArgumentParser, words: str) -> None:
  parser.add_argument('--json', action='store_true', help=f'print {words}')


def code_option(parser: argparse.ArgumentParser) -> None:
  """Add `--code`, read as `args.code`."""
  parser.add_argument(
    '--code',
    metavar='FILE',
    action='append',
    default=[],
    help='a Python file with layers or models of your own that a run needs, if it changed since or '
    'belongs to somebody else; may be repeated',
  )


def size_options(parser: argparse.ArgumentParser, more: str = '') -> None:
  """Add the options of a size, of which one may be given; `more` ends the help of each."""
  group = parser.add_mutually_exclusive_group()
  for option, words in SIZES.items():
    text = f'build the family (or layer) at this {words}, e.g. 125M{more}'
    group.add_argument(option, metavar='SIZE', help=text)


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
  """Return the options of these names as keyword arguments."""
  return {name: getattr(args, name) for name in names}


def size_of(args: argparse.Namespace) -> dict[str, Any]:
  """Return the options of `size_options` as keyword arguments."""
  return given(args, [option[2:].replace('-', '_') for option in SIZES])
