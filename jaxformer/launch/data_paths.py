"""Paths that a job reads on its machines: of corpora, tokenizers and weights."""

import glob
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxformer.config import InputError, to_json
from jaxformer.data import DatasetConfig
from jaxformer.launch.engine import Engine
from jaxformer.launch.job import Job
from jaxformer.launch.source import ignored

Found = tuple[str, str]

# names of fields that hold paths, or their endings
_PATHS = ('path', 'file', 'folder', 'dir')
_READABLE = (
  'data of Hugging Face by name or URL (--data.corpus HuggingFace), or a path in the folder that '
  '--source copies to the machines (relative, and not ignored by git), which have no other files '
  'of this machine'
)


def check_data_paths(engine: Engine, job: Job, data: DatasetConfig) -> None:
  """Raise `InputError`, with the field, for a path of the data, or of weights to begin from, that
  the machines of a job will not have."""
  for field, text in paths_of(to_json(data), 'data'):
    if not _readable(engine, job, text):
      shared = 'a path that exists here, on the disk that the machines share'
      raise InputError(field, text, shared if engine.shares_disk else _READABLE)
  for name, text in job.options:
    if name == 'init-from' and not text.startswith('gs://'):
      path = text.rpartition('@')[0] if '@' in text else text
      here = any(os.path.exists(p) for p in (_home(path), os.path.join(_home('runs'), path)))
      if not (engine.shares_disk and here):
        form = 'gs://BUCKET/FOLDER of a run'
        shared = f'{form}, or a folder here, on the disk that the machines share'
        raise InputError('--init-from', text, shared if engine.shares_disk else form)


def paths_of(data: Any, field: str = '', name: str = '', own: bool = False) -> Iterator[Found]:
  """Yield (dotted path of the field, text) for the local paths in JSON data of a config: what is in
  a field that is named as one, or names what exists here.

  Args:
    own: whether a type of the user's is around, which may read URLs.
  """
  if isinstance(data, Mapping):
    own = own or 'code' in data
    for key, value in data.items():
      if key not in ('type', 'code'):
        yield from paths_of(value, f'{field}.{key}', key, own)
  elif isinstance(data, list):
    for i, value in enumerate(data):
      yield from paths_of(value, f'{field}.{i}', name, own)
  elif isinstance(data, str):
    if name in _PATHS or name.endswith(tuple(f'_{p}' for p in _PATHS)):
      if not (own and '://' in data):
        yield field, data
    # the name of a Hugging Face dataset is that of a local folder if there is one
    elif (name == 'name' or '/' in data or data[:1] in ('.', '~')) and _matches(data):
      yield field, data


def _home(path: str) -> str:
  return os.path.expanduser(path)


def _matches(path: str) -> bool:
  """Whether a path, or a pattern, names something here."""
  path = _home(path)
  if '\0' in path or '://' in path:
    return False
  return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def _readable(engine: Engine, job: Job, path: str) -> bool:
  """Whether the machines of a job will have a path, or files of a pattern."""
  if engine.shares_disk or not _matches(path):
    return engine.shares_disk and _matches(path)
  folder = job.source.folder
  if folder is None or os.path.isabs(_home(path)):
    return False
  same = pathlib.Path(folder, path)
  return same.exists() and same.samefile(path) and not ignored(folder, path)
