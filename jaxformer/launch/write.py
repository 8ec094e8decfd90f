"""Job files on disk: all of them or none, and never in place of what is no file of the same job."""

import pathlib
from collections.abc import Mapping

from jaxformer.config import InputError
from jaxformer.files import unwritable, write_atomically


def write_files(files: Mapping[pathlib.Path, tuple[str, str]]) -> list[pathlib.Path]:
  """Write (text, mark) by path, and return the paths. The mark ends every file of a job.

  Raises `InputError` for a file that exists without the mark, before anything is written, and for
  one that cannot be written; files that were made until then are removed."""
  new = []
  for path, (_, mark) in files.items():
    try:
      kept = path.read_bytes()
    except FileNotFoundError:
      new.append(path)
    except OSError as e:
      raise InputError(f'{path}: cannot be written ({e.strerror})') from None
    else:
      if not kept.endswith(mark.encode()):
        raise InputError(
          f'{path}: exists and is no job file of this run; move it away, or choose another '
          '--run.name or --run.dir'
        )
  made: list[pathlib.Path] = []
  try:
    for path, (text, _) in files.items():
      for folder in reversed(path.parents):
        if not folder.exists():
          folder.mkdir()
          made.append(folder)
      if path in new:
        made.append(path)
      write_atomically(path, text)
  except OSError as e:
    for path in reversed(made):
      if path.is_dir():
        path.rmdir()
      else:
        path.unlink(missing_ok=True)
    raise unwritable(path, e) from None
  return list(files)
