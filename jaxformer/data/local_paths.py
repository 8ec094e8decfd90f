"""Local paths in the settings of data."""

import glob
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxformer.json_data import set_at

Found = tuple[str, str]

# names of fields that hold paths, or their endings
_PATHS = ('path', 'file', 'folder', 'dir')


def paths_of(
  data: Any, field: str = '', name: str = '', own: bool = False, folder: str = ''
) -> Iterator[Found]:
  """Yield (dotted path of the field, text) for the local paths in JSON data of a config: what is in
  a field that is named as one, or names what exists here.

  Args:
    own: whether a type of the user's is around, which may read URLs.
    folder: what relative paths are relative to; by default the working folder.
  """
  if isinstance(data, Mapping):
    own = own or 'code' in data
    for key, value in data.items():
      if key not in ('type', 'code'):
        yield from paths_of(value, f'{field}.{key}' if field else key, key, own, folder)
  elif isinstance(data, list):
    for i, value in enumerate(data):
      yield from paths_of(value, f'{field}.{i}', name, own, folder)
  elif isinstance(data, str):
    if name in _PATHS or name.endswith(tuple(f'_{p}' for p in _PATHS)):
      if not (own and '://' in data):
        yield field, data
    # the name of a Hugging Face dataset is that of a local folder if there is one
    elif (name == 'name' or '/' in data or data[:1] in ('.', '~')) and matches(data, folder):
      yield field, data


def matches(path: str, folder: str = '') -> bool:
  """Return whether a path, or a pattern, names something that exists."""
  path = os.path.join(folder, os.path.expanduser(path))
  if '\0' in path or '://' in path:
    return False
  return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def is_relative(path: str) -> bool:
  """Return whether a path, which may begin with `~`, is relative to a folder."""
  return not os.path.isabs(os.path.expanduser(path))


def located(data: Any, folder: str | None) -> Any:
  """Return JSON data of a config in which relative paths that name something in a folder are
  absolute; the data as they are without a folder."""
  if folder is None:
    return data
  found = json.loads(json.dumps(data))
  for field, text in paths_of(data, folder=folder):
    if is_relative(text) and matches(text, folder):
      set_at(found, field, str(pathlib.Path(folder, text)))
  return found
