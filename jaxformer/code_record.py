"""Records of code: where a config type from outside the package is defined, as stored with it.

A record has the `module` and, where that has a file, its absolute path as `file` and the `sha256`
of its content when it was loaded. `user_code` loads the files that records name.
"""

import hashlib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

PACKAGE = __name__.partition('.')[0]

# names that `user_code` gives to modules which it loads
HASH = '__jaxformer_sha256__'
NAMED = '__jaxformer_named__'


def package_of(cls: type) -> str:
  """The package, or the file of a user, in which tags are unique."""
  return cls.__module__.partition('.')[0]


def code_of(cls: type) -> dict[str, str] | None:
  """Return the record of a type from outside the package, or None for a type of the package."""
  if package_of(cls) == PACKAGE:
    return None
  module = sys.modules.get(cls.__module__)
  file = getattr(module, '__file__', None)
  if file is None:
    return {'module': cls.__module__}
  path = pathlib.Path(file).resolve()
  digest = vars(module).get(HASH) or hashlib.sha256(path.read_bytes()).hexdigest()
  return {'module': cls.__module__, 'file': str(path), 'sha256': digest}


def is_named(cls: type) -> bool:
  """Whether the user named the file of a type as code to use."""
  module = sys.modules.get(cls.__module__)
  return module is not None and NAMED in vars(module)


def contents(record: Mapping[str, str] | None) -> str | None:
  """Return what identifies the code of a record: the hash of its file, or its module."""
  return None if record is None else record.get('sha256', record.get('module'))


def code_records(data: Any) -> list[dict[str, str]]:
  """Return the records of code in JSON data of a config, each once."""
  if isinstance(data, list):
    found = [r for v in data for r in code_records(v)]
  elif isinstance(data, Mapping):
    own = [dict(data['code'])] if 'type' in data and isinstance(data.get('code'), Mapping) else []
    found = own + [r for k, v in data.items() if k != 'code' for r in code_records(v)]
  else:
    found = []
  return [r for i, r in enumerate(found) if r not in found[:i]]


def without_paths(data: Any) -> Any:
  """Return JSON data of a config with `contents` for each record of code."""
  if isinstance(data, list):
    return [without_paths(v) for v in data]
  if not isinstance(data, dict):
    return data
  return {k: contents(v) if k == 'code' else without_paths(v) for k, v in data.items()}
