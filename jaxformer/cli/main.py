"""Read the command line. `jaxformer COMMAND --help` describes each command.

Overrides of an experiment are dotted (`--model.width 256 --optimizer.learning-rate 3e-4`) or name a
section (`--optimizer Lion`), which distinguishes them from a command's own options. Answers go to
stdout, everything else to stderr; with `--json`, stdout is exactly one JSON value.

Command modules import nothing that needs JAX: the functions of `jaxformer` load when they are
called, so help is fast."""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jaxformer as jf
from jaxformer.config import CommandLineText, InputError, decode, nearest, shown
from jaxformer.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, PREEMPTED, Failure
from jaxformer.files import is_of_path, is_of_storage, write_error
from jaxformer.installation import installation

SECTIONS = ('model', 'data', 'optimizer', 'schedule', 'training', 'mesh', 'run')
COMMANDS = (
  'list',
  'describe',
  'train',
  'eval',
  'generate',
  'align',
  'plan',
  'bench',
  'compare',
  'report',
  'check',
  'convert',
  'data',
  'launch',
)
OUT_OF_MEMORY = 'out of memory; must be a smaller batch, sequence length or model'
BOOKKEEPING = ('command', 'module', 'known')  # what the parser holds beside the options


def main(argv: Sequence[str] | None = None) -> int:
  """Run one command and return its exit code (`jaxformer.exit_codes`)."""
  open_descriptors()
  try:
    own, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    options = vars(_parser().parse_args(own))
    command, module, _ = (options.pop(name) for name in BOOKKEEPING)
    if module.OVERRIDES:
      options['overrides'] = overrides
    elif overrides:
      raise InputError(
        f'--{overrides[0][0]}: `jaxformer {command}` takes no overrides of an experiment'
      )
    check_surroundings()
    choose_platform()
    with join_processes() if getattr(module, 'JOINS', False) else contextlib.nullcontext():
      return module.run(**options) or DONE
  except InputError as e:
    _complain(f'error: {e}')
    return BAD_INPUT
  except Failure as e:
    _complain(f'error: {e}')
    return e.code
  except BrokenPipeError:  # the reader of stdout has closed it (`jaxformer list | head`)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE
  except OSError as e:
    if is_of_path(e):
      _complain(f'error: {InputError("path", str(e.filename), problem=str(e.strerror))}')
      return BAD_INPUT
    if not is_of_storage(e):
      raise
    _complain(f'error: {write_error("a file", e)}')
    return FAILED
  except MemoryError as e:  # of NumPy
    _complain(f'error: {OUT_OF_MEMORY} ({" ".join(str(e).split())})')
    return FAILED
  except RuntimeError as e:  # JAX has no types for these
    if any(words in str(e) for words in ('RESOURCE_EXHAUSTED', 'Out of memory')):
      _complain(f'error: {OUT_OF_MEMORY} ({" ".join(str(e).split())[:300]})')
      return FAILED
    if not str(e).startswith('Unable to initialize backend'):
      raise
    given = os.environ.get('JAX_PLATFORMS', '')
    _complain(f'error: {InputError("JAX_PLATFORMS", given, problem=" ".join(str(e).split()))}')
    return BAD_INPUT
  except KeyboardInterrupt:
    return INTERRUPTED
  except jf.Interrupted:  # after the other errors: reading the name imports JAX
    _complain('interrupted: the same command resumes the study')
    return PREEMPTED


def open_descriptors() -> None:
  """Open the null device in place of standard streams that are closed. Else a file that is opened
  later takes the number of one, and libraries write their messages into it; and what is printed to
  a stderr that is None goes to stdout."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
  if sys.stderr is None:
    sys.stderr = open(os.devnull, 'w')  # noqa: SIM115


def _complain(line: str) -> None:
  with contextlib.suppress(OSError):  # the exit code says it as well
    print(line, file=sys.stderr)


def check_surroundings() -> None:
  """Raise `InputError` for a working folder that is gone, and print what the encoding of standard
  output lacks as escapes."""
  try:
    os.getcwd()
  except FileNotFoundError:
    raise InputError('the working folder was deleted; change to one that exists') from None
  if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == 'strict':
    sys.stdout.reconfigure(errors='backslashreplace')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Return the command's own words, and (path, text) for each override: `--a.b text`,
  `--a.b=text`, `--a.b` alone for true.

  Raises `InputError` for a section alone, which needs a value.
  """
  own: list[str] = []
  overrides: list[tuple[str, str]] = []
  i = 0
  while i < len(argv):
    word = argv[i]
    name, equals, value = word.removeprefix('--').partition('=')
    i += 1
    if not word.startswith('--') or ('.' not in name and name not in SECTIONS):
      own.append(word)
    elif equals:
      overrides.append((name, value))
    elif i < len(argv) and not argv[i].startswith('--'):
      overrides.append((name, argv[i]))
      i += 1
    elif name in SECTIONS:
      raise InputError(f'--{name}: needs a value, or the name of a field as in --{name}.FIELD')
    else:
      overrides.append((name, 'true'))
  return own, overrides


def choose_platform() -> None:
  """Keep JAX from searching for a TPU on a machine without one: with libtpu installed that takes
  long and prints pages."""
  has_tpu = any(pathlib.Path('/dev').glob('accel*')) or pathlib.Path('/dev/vfio').exists()
  has_gpu = pathlib.Path('/dev/nvidiactl').exists() or pathlib.Path('/dev/kfd').exists()
  if 'JAX_PLATFORMS' not in os.environ and not has_tpu and not has_gpu:
    os.environ['JAX_PLATFORMS'] = 'cpu'


def join_processes() -> contextlib.AbstractContextManager[None]:
  """Join the processes that run this command together (`jaxformer.training.processes`). From then
  on only the first prints results and progress; each prints its own errors. Errors inside the block
  that is returned end all of them."""
  from jaxformer.training.processes import announced, join

  if not join():
    return contextlib.nullcontext()
  import logging

  import jax

  first = jax.process_index() == 0
  if not first:
    logging.getLogger('jaxformer').setLevel(logging.WARNING)
  # Until the program ends. The library that joins CPUs writes about its connections on the
  # descriptor of standard output.
  sys.stdout = open(os.dup(1) if first else os.devnull, 'w')  # noqa: SIM115
  os.dup2(2, 1)
  return announced()


class _Once(argparse._StoreAction):
  """An option whose value would be lost if another one were given."""

  text: Any = None

  def __call__(self, parser, namespace, values, option_string=None):
    if option_string is not None:
      if self.text not in (None, values):
        given = f'also given as {option_string} {shown(self.text)}; give it once'
        raise InputError(option_string, values, problem=given)
      self.text = values
    super().__call__(parser, namespace, values, option_string)


class _Parser(argparse.ArgumentParser):
  """argparse with `InputError`s that name the nearest words, and numbers as in overrides."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.register('action', None, _Once)
    self._negative_number_matcher = re.compile(r'-(\d|\.\d|inf|nan)')  # its own lacks exponents

  def error(self, message: str) -> NoReturn:
    raise InputError(f'{message}; see `{self.prog} --help`')

  def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
    if action.type in (int, float):
      return decode(CommandLineText(arg_string), action.type, action.option_strings[-1])
    return super()._get_value(action, arg_string)

  def _check_value(self, action: argparse.Action, value: object) -> None:
    if action.choices is not None and value not in action.choices:
      name = '/'.join(action.option_strings) or action.metavar
      raise InputError(
        f'{name} {value!r}: no such choice{nearest(str(value), map(str, action.choices))}'
      )

  def parse_args(self, args=None, namespace=None):  # type: ignore[override]
    parsed, extra = self.parse_known_args(args, namespace)
    if extra:
      raise InputError(
        f'unknown argument {extra[0]!r} for `jaxformer '
        f'{parsed.command}`{nearest(extra[0], parsed.known)}'
      )
    return parsed


def _parser() -> _Parser:
  parser = _Parser(
    prog='jaxformer',
    description='Train, plan and compare sequence models on TPU and GPU meshes.',
    allow_abbrev=False,
  )
  parser.add_argument('--version', action='version', version=f'jaxformer {installation().version}')
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for name in COMMANDS:
    module = importlib.import_module(f'jaxformer.cli.{name}')
    doc = module.__doc__ or ''
    sub = commands.add_parser(
      name,
      help=doc.partition('\n\n')[0].replace('\n', ' ').rstrip('.'),
      description=doc,
      allow_abbrev=False,
      argument_default=argparse.SUPPRESS,  # defaults are those of the functions of `jaxformer`
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.arguments(sub)
    known = [o for action in sub._actions for o in action.option_strings]
    known += [f'--{s}' for s in SECTIONS] if module.OVERRIDES else []
    sub.set_defaults(module=module, known=known)
  return parser
