"""Options that several commands share, and how text is read and results are printed."""

import argparse
import json
import os
import sys
from typing import Any

from jaxformer.config import InputError
from jaxformer.exit_codes import Failure
from jaxformer.json_data import json_data

Overrides = list[tuple[str, str]]
SIZES = {
  'params': 'parameter count',
  'active_params': 'count of parameters that one token uses',
  'flops_per_token': 'number of training FLOPs per token',
  'state_bytes': 'number of bytes of decoding state',
}


def read_stdin() -> str:
  """Return the text of standard input. Raises `InputError` for one that is closed or no text."""
  if sys.stdin is None:
    raise InputError('standard input: is closed; must be open, or the text given as an option')
  try:
    return sys.stdin.read()
  except UnicodeDecodeError as e:
    raise InputError(f'standard input: not valid UTF-8 at byte offset {e.start}') from None
  except OSError as e:
    raise InputError(f'standard input: cannot be read ({e.strerror})') from None


def emit(text: str, end: str = '\n') -> None:
  """Print to standard output at once. Raises `Failure` where that cannot be written."""
  try:
    print(text, end=end, flush=True)
  except BrokenPipeError:
    raise
  except OSError as e:
    # else the interpreter tries again at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise Failure(f'standard output: cannot be written ({e.strerror})') from None


def show(result: Any, as_json: bool) -> None:
  """Print what a function of `jaxformer.api` returned: one JSON value, or lines for people."""
  if as_json:
    print_json(result.json())
  else:
    emit('\n'.join(result.lines()))


def print_json(value: Any) -> None:
  """Print one JSON value; numbers that are not finite are null."""
  emit(json.dumps(json_data(value), indent=2, allow_nan=False))


def json_option(parser: argparse.ArgumentParser, words: str) -> None:
  parser.add_argument('--json', action='store_true', default=False, help=f'print {words}')


def show_option(parser: argparse.ArgumentParser, what: str) -> None:
  """Add `--show`, read as `print_only`."""
  words = f'print the {what} as JSON and stop'
  parser.add_argument('--show', dest='print_only', action='store_true', default=False, help=words)


def prices_option(parser: argparse.ArgumentParser) -> None:
  """Add `--prices`."""
  parser.add_argument(
    '--prices',
    metavar='sky|FOLDER',
    help="prices of SkyPilot's catalog as downloaded, or of a folder like it (CLOUD/vms.csv), in "
    'place of the list price; shown with their date',
  )


def code_option(parser: argparse.ArgumentParser) -> None:
  """Add `--code`, which may be repeated."""
  parser.add_argument(
    '--code',
    metavar='FILE',
    action='append',
    help='a Python file with layers or models of your own that a run needs, if it changed since or '
    'belongs to somebody else; may be repeated',
  )


def run_argument(parser: argparse.ArgumentParser) -> None:
  """Add the trained model that a command reads, and `--code`."""
  parser.add_argument(
    'model',
    metavar='RUN',
    help='a run (NAME, runs/NAME, gs://BUCKET/FOLDER, each with @STEP for an older checkpoint), or '
    'weights of another library',
  )
  code_option(parser)


def size_options(parser: argparse.ArgumentParser, more: str = '') -> None:
  """Add the options of a size, of which one may be given; `more` ends the help of each."""
  group = parser.add_mutually_exclusive_group()
  for name, words in SIZES.items():
    text = f'build the family (or layer) at this {words}, e.g. 125M{more}'
    group.add_argument(f'--{name.replace("_", "-")}', metavar='SIZE', help=text)
