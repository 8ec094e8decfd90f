"""Python files that a file imports from its own folder or below, found by reading the code."""

import ast
import functools
import hashlib
import importlib.util
import pathlib
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PACKAGE = __name__.partition('.')[0]


class LocalFiles(NamedTuple):
  """A file and the files that it imports, recursively, from its folder or below.

  Attributes:
    contents: bytes of each by its path; the file itself is the first.
    outside: names of modules that they import and that are neither local nor part of Python.
    broken: files that are no Python, each with the reason.
  """

  contents: dict[pathlib.Path, bytes]
  outside: set[str]
  broken: dict[pathlib.Path, str]

  def sha256(self) -> dict[pathlib.Path, str]:
    """Return the hash of each file."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in self.contents.items()}


def local_files(file: pathlib.Path, folder: pathlib.Path | None = None) -> LocalFiles:
  """Return a Python file with the local modules and packages that it imports, recursively: those
  that Python finds in `folder` if it runs the file from there, by default the file's own folder.
  Imports inside functions and literal arguments of `import_module` count.

  Raises `OSError` for a file that cannot be read.
  """
  folder = folder or file.parent
  own = file.relative_to(folder).parts[0] if _holds_libraries(folder) else ''
  found = LocalFiles({}, set(), {})
  parents = list(file.relative_to(folder).parents)[:-1]
  todo = [p for p in (folder / part / '__init__.py' for part in parents) if p.is_file()] + [file]
  while todo:
    path = todo.pop()
    if path in found.contents:
      continue
    found.contents[path] = content = _regular(path).read_bytes()
    try:
      modules = _imported(content, path.relative_to(folder).parent.parts)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
      found.broken[path] = str(e)
      continue
    for module in modules:
      top = module.partition('.')[0]
      if is_local(top, folder) and own in ('', top):
        todo += [p for p in files_of(module, folder) if p not in found.contents]
      elif top not in sys.stdlib_module_names:
        found.outside.add(top)
  return found


def is_local(top: str, folder: pathlib.Path) -> bool:
  """Return whether a file in a folder that imports the module or package `top` gets the one in that
  folder, as in Python where the folder comes first; this package is always the installed one."""
  if top == PACKAGE or top in sys.builtin_module_names:
    return False
  place = folder / top
  if (place / '__init__.py').is_file() or place.with_name(f'{top}.py').is_file():
    return True
  return place.is_dir() and not _installed(top)  # a package without __init__.py comes last


def files_of(module: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield the files of a folder that importing a module runs, its packages first."""
  place = folder
  for part in module.split('.'):
    place = place / part
    for file in (place / '__init__.py', place.with_name(f'{part}.py')):
      if file.is_file():
        yield file
        break


def _installed(top: str) -> bool:
  """Whether a module is found without the folder that imports it."""
  if top in sys.stdlib_module_names:
    return True
  try:
    spec = importlib.util.find_spec(top)
  except (ImportError, ValueError):
    return False
  return spec is not None and spec.origin is not None


@functools.cache
def _holds_libraries(folder: pathlib.Path) -> bool:
  """Whether a folder is one in which packages are installed: their neighbours are not theirs."""
  names = ('purelib', 'platlib', 'stdlib', 'platstdlib')
  known = {pathlib.Path(sysconfig.get_path(name)).resolve() for name in names}
  return folder.resolve() in known or folder.name in ('site-packages', 'dist-packages')


def _regular(path: pathlib.Path) -> pathlib.Path:
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(f'{path}: not a regular file')
  return path


@functools.lru_cache(maxsize=1024)
def _imported(content: bytes, package: tuple[str, ...]) -> tuple[str, ...]:
  """Return the dotted names of modules that code may import."""
  return tuple(dict.fromkeys(_imports(ast.parse(content), package)))


def _imports(tree: ast.AST, package: Sequence[str]) -> Iterator[str]:
  """Yield the dotted names of modules that code may import; `package` is where the code lies."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = list(package[: max(0, len(package) + 1 - node.level)]) if node.level else []
      base += node.module.split('.') if node.module else []
      if base:
        yield '.'.join(base)
      # `from package import name`: a module, or what the package defines
      yield from ('.'.join([*base, alias.name]) for alias in node.names if alias.name != '*')
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      called = node.func.attr if isinstance(node.func, ast.Attribute) else ''
      called = node.func.id if isinstance(node.func, ast.Name) else called
      name = node.args[0].value
      if called in ('import_module', '__import__') and isinstance(name, str):
        yield name.lstrip('.')
