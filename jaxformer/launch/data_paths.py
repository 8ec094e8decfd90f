"""Paths that a job reads on its machines: of corpora, tokenizers and weights."""

import pathlib

from jaxformer.config import InputError, to_json
from jaxformer.data import DatasetConfig
from jaxformer.data.local_paths import is_relative, matches, paths_of
from jaxformer.files import user_path
from jaxformer.launch.engine import Engine
from jaxformer.launch.job import Job
from jaxformer.launch.source import ignored

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
      place = user_path(path, '--init-from') if path else None
      here = place is not None and (place.exists() or pathlib.Path('runs', place).exists())
      if not (engine.shares_disk and here):
        form = 'gs://BUCKET/FOLDER of a run'
        shared = f'{form}, or a folder here, on the disk that the machines share'
        raise InputError('--init-from', text, shared if engine.shares_disk else form)


def _readable(engine: Engine, job: Job, path: str) -> bool:
  """Whether the machines of a job will have a path, or files of a pattern."""
  if engine.shares_disk or not matches(path):
    return engine.shares_disk and matches(path)
  folder = job.source.folder
  if folder is None or not is_relative(path):
    return False
  same = pathlib.Path(folder, path)
  return same.exists() and same.samefile(path) and not ignored(folder, path)
