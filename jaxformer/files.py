"""Paths and files that users name; files that several processes share: written atomically, and
locked."""

import contextlib
import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from jaxformer.config import InputError, is_text

P = TypeVar('P')
PART_BYTES, PATH_BYTES = 255, 4095  # what Linux and macOS accept


def user_path(name: str | os.PathLike[str], field: str = '') -> Path:
  """Return the path that a user gave, with `~` expanded. Whether it exists is not checked.

  Raises `InputError`, naming `field`, for what no file can be called.
  """
  text = os.fspath(name)
  problem = ''
  if not is_text(text):
    problem = 'must be text in UTF-8 without null characters'
  elif len(text.encode()) > PATH_BYTES or any(
    len(part.encode()) > PART_BYTES for part in text.split(os.sep)
  ):
    problem = f'too long: a name may have {PART_BYTES} bytes, a path {PATH_BYTES:,}'
  else:
    try:
      return Path(text).expanduser()
    except RuntimeError:
      problem = f'there is no home folder of {Path(text).parts[0]}'
  raise InputError(field or 'path', text, problem=problem)


def regular_file(path: P) -> P:
  """Return the path. Raises `OSError` unless a regular file is there: a pipe or a device might
  never end. A path in an object store is not looked at."""
  if not isinstance(path, Path):
    return path
  mode = path.stat().st_mode
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(errno.EISDIR, 'is a folder', str(path))
  if not stat.S_ISREG(mode):
    raise OSError(errno.EINVAL, 'is not a regular file', str(path))
  return path


def write_atomically(path: Path, data: str | bytes) -> None:
  """Replace a file; readers, and a crash, see the old content or the new one."""
  temporary = path.parent / f'.{path.name}-{uuid.uuid4().hex}'
  try:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def append(path: Path, data: str | bytes) -> None:
  """Add to the end of a file all of the data at once; if that fails, the file stays as it was."""
  left = memoryview(data.encode() if isinstance(data, str) else data)
  with path.open('ab', buffering=0) as f:
    size = f.seek(0, os.SEEK_END)
    try:
      while left:
        left = left[f.write(left) :]
    except BaseException:
      with contextlib.suppress(OSError):
        f.truncate(size)
      raise


@contextlib.contextmanager
def locked(path: Path) -> Generator[bool]:
  """Yield whether this process alone holds the lock of a file until the end of the block. The lock
  of a process that dies is released."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('a') as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
    else:
      yield True
