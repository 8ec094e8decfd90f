"""Python files of the user: loaded as modules, identified by the hash of their content.

Types that such a file defines are stored in run folders with a record of the file
(`code_record`). `load_recorded` loads the files that a stored config needs, under one rule: code
runs if it is the user's own file, unchanged since the record was written, or if the user names it.
"""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Generator, Sequence
from typing import Any, TypeGuard, TypeVar

from jaxformer.code_record import HASH, NAMED, code_records
from jaxformer.config import Config, InputError, nearest
from jaxformer.files import regular_file, user_path

T = TypeVar('T')


def load_file(path: str | os.PathLike[str], *, named: bool = False) -> types.ModuleType:
  """Load a Python file as a module, once per content.

  Args:
    named: the user named the file as the code of a stored config, so that its types stand for
      those of the record even if their content differs.

  Raises `InputError` for a file that does not exist or cannot be run, with the traceback of the
  user's code.
  """
  path = user_path(path, 'file')
  try:
    content = regular_file(path).read_bytes()
  except OSError as e:
    raise InputError('file', str(path), problem=e.strerror or 'cannot be read') from None
  digest = hashlib.sha256(content).hexdigest()
  place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
  name = f'user_{path.stem}_{place}'
  module = sys.modules.get(name)
  if module is None or vars(module).get(HASH) != digest:
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
      raise InputError('file', str(path), 'a Python file')
    module = importlib.util.module_from_spec(spec)
    module.__dict__[HASH] = digest
    sys.modules[name] = module
    with errors_of(path):
      try:
        spec.loader.exec_module(module)
      except BaseException:
        sys.modules.pop(name, None)
        raise
  if named:
    module.__dict__[NAMED] = True
  return module


@contextlib.contextmanager
def errors_of(path: pathlib.Path) -> Generator[None]:
  """Name the file in errors that are raised inside, with the traceback of the user's own code."""
  try:
    yield
  except InputError as e:
    raise InputError(f'{path}: {e}') from None
  except (KeyboardInterrupt, GeneratorExit):
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
  named = {load_file(p, named=True).__dict__[HASH]: p for p in code}
  remarks = []
  for record in code_records(data):
    if not all(isinstance(v, str) for v in (record.get('module'), *record.values())):
      raise InputError('code', record, 'a record {module, file, sha256}')
    file, wanted = record.get('file'), record.get('sha256')
    if wanted in named or wanted in _loaded():
      continue
    if named:
      files = ', '.join(str(p) for p in named.values())
      remarks.append(
        f'code: {files} differs from the recorded {file or record["module"]} '
        f'(sha256 {(wanted or "none")[:12]})'
      )
    elif file is None or wanted is None:
      raise InputError(
        f'code: a type was defined in {record["module"]}, which is no file; move it to a file and '
        'name that with --code FILE'
      )
    else:
      load_file(_trusted(user_path(file, 'code'), wanted, folder))
  return remarks


def named_code() -> set[str]:
  """Return the hashes of the files that the user named."""
  return _loaded(NAMED)


def _loaded(flag: str = HASH) -> set[str]:
  # By the dictionary: modules that import lazily answer `getattr` for any name.
  found = [vars(m) for m in list(sys.modules.values()) if hasattr(m, '__dict__')]
  return {v[HASH] for v in found if v.get(flag)}


def _trusted(path: pathlib.Path, wanted: str, folder: pathlib.Path | None) -> pathlib.Path:
  """The path of a recorded file that may run without being named."""
  try:
    found = hashlib.sha256(regular_file(path).read_bytes()).hexdigest()
    owner = path.stat().st_uid
  except OSError:
    raise InputError(
      f'code: {path} is needed and not here; name the file with --code FILE'
    ) from None
  if found != wanted:
    raise InputError(
      f'code: {path} has changed since the run was made (sha256 {wanted[:12]}, now {found[:12]}); '
      f'name it with --code {path} to run it as it is now'
    )
  came_along = folder is not None and folder.resolve() in path.resolve().parents
  if came_along or owner != os.getuid():
    raise InputError(
      f'code: {path} is not your own file; read it, and name it with --code {path} to run it'
    )
  return path
