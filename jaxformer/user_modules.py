"""Modules of users' Python files, under names that say from which folder they are.

A file of the user imports the modules and packages of its own folder first, as if Python ran it as
a script, at whatever time and from whatever working folder. Neither `sys.path` nor plain names in
`sys.modules` are used for that: `blocks.py` in two folders is two modules.
"""

import builtins
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from jaxformer.code_record import RECORD, contents, folder_of, module_of, record_of
from jaxformer.local_files import LocalFiles, is_local, local_files


class _Place(NamedTuple):
  """Where a top-level module or package is: its folder, and its file or folder there without
  suffix."""

  folder: pathlib.Path
  top: str


_PLACES: dict[str, _Place] = {}  # by names in `sys.modules`


def load_module(file: pathlib.Path, module: str, found: LocalFiles) -> types.ModuleType:
  """Return a file as a module, loaded once per content of it and of what it imports.

  Args:
    file: its path, absolute and without links.
    module: its dotted name as other files of its folder import it; '' for the name of the file.
    found: what `local_files` returns for it.
  """
  module = module or module_of(file)
  folder = folder_of(module, file)
  _forget_changed(found)
  top = file.relative_to(folder).parts[0].removesuffix('.py')
  return importlib.import_module(_unique(folder, top, module.partition('.')[2]))


def loaded_from(files: Collection[pathlib.Path]) -> list[types.ModuleType]:
  """Return the modules that were loaded from some files."""
  return [m for m in _ours().values() if pathlib.Path(vars(m)['__file__']) in files]


def _ours() -> dict[str, types.ModuleType]:
  modules = list(sys.modules.items())
  return {n: m for n, m in modules if n.partition('.')[0] in _PLACES and RECORD in vars(m)}


def _forget_changed(found: LocalFiles) -> None:
  """Remove modules whose file, or one that it imports, has changed since they were loaded."""
  for name, module in _ours().items():
    file, (_, record) = pathlib.Path(vars(module)['__file__']), vars(module)[RECORD]
    if file in found.contents and contents(record_of(file, record['module'])) != contents(record):
      sys.modules.pop(name, None)
      parent, _, last = name.rpartition('.')
      if parent in sys.modules:
        vars(sys.modules[parent]).pop(last, None)


@functools.cache
def _unique(folder: pathlib.Path, top: str, rest: str) -> str:
  """Return the name in `sys.modules` of a module of a folder, and note where it is."""
  place = hashlib.sha256(str(folder / top).encode()).hexdigest()[:8]
  name = f'user_{top.replace(".", "_")}_{place}'
  _PLACES[name] = _Place(folder, top)
  return f'{name}.{rest}' if rest else name


def _import_from(folder: pathlib.Path) -> Callable[..., Any]:
  """Return the `__import__` of files that import from a folder."""

  def import_here(
    name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
  ) -> Any:
    top, _, rest = name.partition('.')
    if level or not is_local(top, folder):
      return builtins.__import__(name, globals, locals, fromlist, level)
    unique = _unique(folder, top, rest)
    try:
      return builtins.__import__(unique, globals, locals, fromlist)
    except ModuleNotFoundError as e:
      start = unique.partition('.')[0]
      if not (e.name or '').startswith(start):
        raise
      missing = top + (e.name or '').removeprefix(start)
      raise ModuleNotFoundError(f'No module named {missing!r}', name=missing) from None

  return import_here


class _Finder(importlib.abc.MetaPathFinder):
  """Finds modules under the names of `_unique`."""

  def find_spec(
    self, fullname: str, path: Sequence[str] | None = None, target: object = None
  ) -> importlib.machinery.ModuleSpec | None:
    name, _, rest = fullname.partition('.')
    if name not in _PLACES:
      return None
    folder, top = _PLACES[name]
    place = folder.joinpath(top, *rest.split('.')) if rest else folder / top
    package = place / '__init__.py'
    for file in (package, place.with_name(f'{place.name}.py')):
      if file.is_file():
        below = [str(place)] if file == package else None
        return importlib.util.spec_from_file_location(
          fullname, file, loader=_Loader(fullname, file), submodule_search_locations=below
        )
    if not place.is_dir():
      return None
    spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
  """Runs exactly the content that the record of the module has the hash of; reads and writes no
  bytecode, which would be found by time and size."""

  def __init__(self, name: str, file: pathlib.Path):
    super().__init__(name, str(file))
    self._content = b''

  def get_code(self, fullname: str) -> types.CodeType:
    return compile(self._content, self.path, 'exec', dont_inherit=True)

  def exec_module(self, module: types.ModuleType) -> None:
    file, (folder, _) = pathlib.Path(self.path), _PLACES[module.__name__.partition('.')[0]]
    rest = module.__name__.partition('.')[2]
    top = module_of(folder / file.relative_to(folder).parts[0])
    dotted = f'{top}.{rest}' if rest else top
    found = local_files(file, folder)
    self._content = found.contents[file]
    vars(module)[RECORD] = module.__spec__, record_of(file, dotted, found)
    vars(module)['__builtins__'] = vars(builtins) | {'__import__': _import_from(folder)}
    super().exec_module(module)


sys.meta_path.insert(0, _Finder())  # before that of folders, which would find submodules
