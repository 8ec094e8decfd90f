"""Python files of the user: loaded as modules, identified by the hash of their content and of what
they import beside them.

Types that such a file defines are stored in run folders with a record of the file
(`code_record`). `load_recorded` loads the files that a stored config needs, under one rule: code
runs if it is the user's own file, unchanged since the record was written, or if the user names it.
"""

import contextlib
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Generator, Sequence
from typing import Any, TypeGuard, TypeVar

from jaxformer.code_record import (
  NAMED,
  RECORD,
  Record,
  changed_files,
  code_of,
  contents,
  folder_of,
  is_named,
  is_record,
  module_of,
  record_of,
  typed_records,
)
from jaxformer.config import Config, InputError, nearest, types_of
from jaxformer.files import regular_file, user_path
from jaxformer.local_files import LocalFiles, local_files
from jaxformer.user_modules import load_module, loaded_from

T = TypeVar('T')


def load_file(
  path: str | os.PathLike[str], *, named: bool = False, module: str = ''
) -> types.ModuleType:
  """Load a Python file as a module, once per content of it and of what it imports beside it.

  It imports the modules of its own folder first, as if Python ran it as a script; files of one name
  in two folders are two modules.

  Args:
    named: the user named the file as the code of a stored config, so that its types, and those of
      the files that it imports, stand for those of the record even if their content differs.
    module: its dotted name, if it is part of a package; by default the name of the file.

  Raises `InputError` for a file that does not exist or cannot be run, with the traceback of the
  user's code.
  """
  path = user_path(path, 'file')
  found = with_imports(path, module)
  with errors_of(path):
    loaded = load_module(path.resolve(), module, found)
  if named:
    for one in loaded_from(found.contents):
      vars(one)[NAMED] = True
  return loaded


def with_imports(path: pathlib.Path, module: str = '') -> LocalFiles:
  """Return a file of the user with what it imports beside it; `module` as in `load_file`. Raises
  `InputError` for one that cannot be read or is no Python file."""
  try:
    file = regular_file(path).resolve()
    if file.suffix != '.py':
      raise InputError('file', str(path), 'a Python file')
    return local_files(file, folder_of(module or module_of(file), file))
  except OSError as e:
    raise InputError('file', str(path), problem=e.strerror or 'cannot be read') from None


def files_record(path: str | os.PathLike[str]) -> Record:
  """Return the record (`code_record`) of a file of the user, with the files that it imports beside
  it. Raises `InputError` for one that cannot be read."""
  path = user_path(path, 'file')
  found = with_imports(path)
  return record_of(path.resolve(), module_of(path.resolve()), found)


@contextlib.contextmanager
def errors_of(path: pathlib.Path) -> Generator[None]:
  """Name the file in errors that are raised inside, with the traceback of the user's own code. What
  that prints goes to stderr."""
  try:
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be for one JSON value
      yield
  except InputError as e:
    raise InputError(f'{path}: {e}') from None
  except KeyboardInterrupt:
    raise
  except BaseException as e:  # `sys.exit` in the file as well
    frames = traceback.extract_tb(e.__traceback__)
    own = (i for i, f in enumerate(frames) if pathlib.Path(f.filename).resolve() == path.resolve())
    lines = traceback.StackSummary.from_list(frames[next(own, len(frames)) :]).format()
    lines += traceback.format_exception_only(e)
    raise InputError(f'{path} cannot be run:\n{"".join(lines).rstrip()}') from None


def object_in_file(target: str) -> Any:
  """Return what `FILE.py:NAME` names, as in `my_layer.py:MyMixer.Config`.

  A config type is instantiated with its defaults; a class with a nested `Config` stands for that.
  """
  value = named_in_file(target)
  with errors_of(pathlib.Path(target.rpartition(':')[0])):
    return value() if isinstance(value, type) and issubclass(value, Config) else value


def named_in_file(target: str) -> Any:
  """Return what `FILE.py:NAME` names, a config type as it is; see `object_in_file`."""
  file, colon, inside = target.rpartition(':')
  if not colon or not inside:
    raise InputError('target', target, 'FILE.py:NAME, as in my_layer.py:MyMixer.Config')
  path = user_path(file, 'file')
  value: Any = load_file(path)
  with errors_of(path):
    for part in inside.split('.'):
      if not hasattr(value, part):
        own = [n for n, v in vars(value).items() if getattr(v, '__module__', '') == value.__name__]
        raise InputError(f'{target}: has no {part!r}{nearest(part, own)}')
      value = getattr(value, part)
    if isinstance(value, type) and not issubclass(value, Config):
      value = getattr(value, 'Config', value)
  return value


def is_a(value: object, *kinds: type[T]) -> TypeGuard[T]:
  """Return whether an object that a user defined or passed is of one of some types. Only for such
  objects: elsewhere configs are asked by their methods."""
  return isinstance(value, kinds)


def load_recorded(
  data: Any, code: Sequence[str | os.PathLike[str]] = (), folder: pathlib.Path | None = None
) -> list[str]:
  """Load the files that a stored config needs.

  Args:
    data: JSON data of the config.
    code: files that the user named (`--code`).
    folder: the run folder that the config came with; code inside it only runs if it is named.

  Returns:
    Remarks for the user, one line each: files that differ from the record and were named.

  Raises `InputError` for code that may not run, with what to name.
  """
  for path in code:
    load_file(path, named=True)
  remarks: list[str] = []
  for tag, record in typed_records(data):
    if not is_record(record):
      raise InputError('code', record, 'a record {module, file, sha256, files}')
    if contents(record) in _loaded():
      continue
    if (now := _named_record(tag)) is not None:
      was = record.get('file') or record['module']
      remarks += [
        f'code: differs from the recorded {was}: {c.line}' for c in changed_files(record, now)
      ]
    elif record.get('file') is None or record.get('sha256') is None:
      raise InputError(
        f'code: a type was defined in {record["module"]}, which is no file; move it to a file and '
        'name that with --code FILE'
      )
    else:
      load_file(_trusted(record, folder), module=record['module'])
  return list(dict.fromkeys(remarks))


def _named_record(tag: str) -> Record | None:
  """Return the record of the file that defines a type and that the user named, if there is one."""
  same = [c for c in types_of(Config) if c.tag == tag and is_named(c)]
  return code_of(same[-1]) if same else None


def named_code() -> set[str]:
  """Return the hashes of the files that the user named, and of those that they import."""
  records = [vars(m)[RECORD][1] for m in _user_modules() if NAMED in vars(m)]
  return {h for r in records for h in (r['sha256'], *r.get('files', {}).values())}


def _loaded() -> set[str | None]:
  return {contents(vars(m)[RECORD][1]) for m in _user_modules()}


def _user_modules() -> list[types.ModuleType]:
  # By the dictionary: modules that import lazily answer `getattr` for any name.
  modules = list(sys.modules.values())
  return [m for m in modules if hasattr(m, '__dict__') and RECORD in vars(m)]


def _trusted(record: Record, folder: pathlib.Path | None) -> pathlib.Path:
  """The path of a recorded file that may run without being named, and all that it imports."""
  path = user_path(record['file'], 'code')
  try:
    regular_file(path)
    found = local_files(path, folder_of(record['module'], path))
    now = record_of(path, record['module'], found)
    owners = {file: file.stat().st_uid for file in found.contents}
  except OSError:
    raise InputError(
      f'code: {path} is needed and not here; name the file with --code FILE'
    ) from None
  if changes := changed_files(record, now):
    lines = '; '.join(c.line for c in changes)
    raise InputError(
      f'code: has changed since the run was made: {lines}; name it with --code {path} to run it as '
      'it is now'
    )
  for file, owner in owners.items():
    came_along = folder is not None and folder.resolve() in file.resolve().parents
    if came_along or owner != os.getuid():
      raise InputError(
        f'code: {file} is not your own file; read it, and name it with --code {path} to run it'
      )
  return path
