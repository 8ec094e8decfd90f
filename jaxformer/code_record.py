"""Records of code: where a config type from outside the package is defined, as stored with it.

A record has the `module` and, where that has a file, its absolute path as `file`, the `sha256` of
its content when it was loaded, and as `files` the hashes of the local files that it imports
(`local_files`), by their paths relative to the folder from which it imports them. `user_code` loads
the files that records name.
"""

import hashlib
import json
import pathlib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxformer.local_files import PACKAGE, LocalFiles, local_files

Record = dict[str, Any]

# names that `user_code` gives to modules which it loads
RECORD = '__jaxformer_code__'
NAMED = '__jaxformer_named__'


def package_of(cls: type) -> str:
  """The package, or the file of a user, in which tags are unique."""
  return cls.__module__.partition('.')[0]


def code_of(cls: type) -> Record | None:
  """Return the record of a type from outside the package, or None for a type of the package."""
  if package_of(cls) == PACKAGE:
    return None
  module = sys.modules.get(cls.__module__)
  file = getattr(module, '__file__', None)
  if module is None or file is None or not pathlib.Path(file).is_file():
    return {'module': cls.__module__}
  return dict(_record_of(module, pathlib.Path(file).resolve()))


def _record_of(module: types.ModuleType, file: pathlib.Path) -> Record:
  """Return the record of a module, as of when it was loaded or first asked for."""
  spec = vars(module).get('__spec__')
  loaded_as, known = vars(module).get(RECORD, (None, None))
  if known is None or loaded_as is not spec:  # `importlib.reload` makes a new spec
    name = getattr(spec, 'name', '')
    parts = tuple(name.split('.'))
    fits = _place(file).parts[-len(parts) :] == parts
    known = record_of(file, name if fits else module_of(file))
    vars(module)[RECORD] = spec, known
  return known


def record_of(file: pathlib.Path, module: str, found: LocalFiles | None = None) -> Record:
  """Return the record of a file with its content of now.

  Args:
    file: its path, absolute.
    module: its dotted name as other files import it, which says from which folder it imports.
    found: what `local_files` returns for it, if that is known.

  Raises `OSError` for a file that cannot be read.
  """
  folder = folder_of(module, file)
  hashes = (found or local_files(file, folder)).sha256()
  own = hashes.pop(file)
  files = {path.relative_to(folder).as_posix(): h for path, h in sorted(hashes.items())}
  record = {'module': module, 'file': str(file), 'sha256': own}
  return record | ({'files': files} if files else {})


def folder_of(module: str, file: pathlib.Path) -> pathlib.Path:
  """Return the folder from which the file of a module, given by its dotted name, imports."""
  above = _place(file).parents
  return above[min(module.count('.'), len(above) - 1)]


def module_of(file: pathlib.Path) -> str:
  """Return the name by which files of its folder import a file, or a package by its file."""
  return _place(file).name.replace('.', '_')


def _place(file: pathlib.Path) -> pathlib.Path:
  if file.name == '__init__.py':
    return file.parent
  return file.with_suffix('') if file.suffix == '.py' else file


def is_named(cls: type) -> bool:
  """Whether the user named the file of a type as code to use."""
  module = sys.modules.get(cls.__module__)
  return module is not None and NAMED in vars(module)


def is_record(code: Any) -> bool:
  """Whether JSON data have the form of a record."""
  if not isinstance(code, Mapping) or not isinstance(code.get('module'), str):
    return False
  files = code.get('files', {})
  plain = all(isinstance(v, str) for k, v in code.items() if k != 'files')
  return plain and isinstance(files, Mapping) and all(isinstance(v, str) for v in files.values())


def contents(record: Mapping[str, Any] | None) -> str | None:
  """Return what identifies the code of a record: the hash of its file, with those of the files that
  it imports if there are any; or its module."""
  if record is None or not record.get('files'):
    return None if record is None else record.get('sha256', record.get('module'))
  text = json.dumps([record.get('sha256'), sorted(record['files'].items())])
  return hashlib.sha256(text.encode()).hexdigest()


class Change(NamedTuple):
  """A file of the user that differs from a record: its path, and its hashes in the record and now;
  None where it has no part in the code."""

  file: str
  old: str | None
  new: str | None

  @property
  def line(self) -> str:
    return f'{self.file}: sha256 {_short(self.old)} -> {_short(self.new)}'


def _short(digest: str | None) -> str:
  return 'none' if digest is None else digest[:12]


def changed_files(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[Change]:
  """Return the files in which two records differ."""
  was, now = (dict((r or {}).get('files', {})) for r in (old, new))
  place = new or old or {}
  file, module = place.get('file'), place.get('module', '')
  own = Change(file or f'module {module}', *((r or {}).get('sha256') for r in (old, new)))
  folder = folder_of(module, pathlib.Path(file)) if file else pathlib.Path()
  others = (Change(str(folder / k), was.get(k), now.get(k)) for k in sorted({*was, *now}))
  return [c for c in (own, *others) if c.old != c.new]


def code_records(data: Any) -> list[Record]:
  """Return the records of code in JSON data of a config, each once."""
  return _once(record for _, record in typed_records(data))


def typed_records(data: Any) -> list[tuple[str, Record]]:
  """Return (type, record) for each type with a record in JSON data of a config."""
  if isinstance(data, list):
    return [r for v in data for r in typed_records(v)]
  if not isinstance(data, Mapping):
    return []
  code = data.get('code')
  own = [(str(data['type']), dict(code))] if 'type' in data and isinstance(code, Mapping) else []
  return own + [r for k, v in data.items() if k != 'code' for r in typed_records(v)]


def _once(records: Iterable[Record]) -> list[Record]:
  found: list[Record] = []
  for r in records:
    if r not in found:
      found.append(r)
  return found


def without_paths(data: Any) -> Any:
  """Return JSON data of a config with `contents` for each record of code."""
  if isinstance(data, list):
    return [without_paths(v) for v in data]
  if not isinstance(data, dict):
    return data
  return {k: contents(v) if k == 'code' else without_paths(v) for k, v in data.items()}
