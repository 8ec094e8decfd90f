"""Paths and files that users name; files that are written atomically, appended to, and locked."""

import contextlib
import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from jaxformer.config import InputError, is_text
from jaxformer.exit_codes import Failure

P = TypeVar('P')
PART_BYTES, PATH_BYTES = 255, 4095  # what Linux and macOS accept
# a full disk or quota, a file that is too large, a device that fails, a mount that is gone
STORAGE_ERRORS = frozenset(
  {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENXIO}
)
_OS_ERROR = re.compile(r"(?:os_error_code='|\bos error |\bErrno )(\d+)", re.IGNORECASE)
# a path without permission, or with something else on it than is needed
PATH_ERRORS = frozenset(
  {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ELOOP, errno.ENAMETOOLONG),
  }
)


def user_path(name: str | os.PathLike[str], field: str = '') -> Path:
  """Return the path that a user gave, with `~` expanded. Whether it exists is not checked.

  Raises `InputError`, naming `field`, for what no file can be called.
  """
  text = os.fspath(name)
  problem = ''
  if not text:
    problem = 'must not be empty'
  elif not is_text(text):
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


def check_folder(path: Path, field: str, value: object) -> None:
  """Raise `InputError` for `field` where a folder can be neither used nor made at a path."""
  found = next(p for p in (path, *path.parents) if os.path.lexists(p) or p == p.parent)
  if not os.path.isdir(found):
    raise InputError(field, value, problem=f'{found} is not a folder')
  if not os.access(found, os.W_OK | os.X_OK):
    raise InputError(field, value, problem=f'the folder {found} cannot be written')


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


class WriteError(Failure):
  """A file could not be written, for a reason that is not what the user gave."""


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
  """Return the error for a file, or a folder with the file that `error` names."""
  where = error.filename or path
  return WriteError(f'{os.fspath(where)}: cannot be written ({error.strerror or error})')


def is_of_storage(error: OSError) -> bool:
  """Return whether an error has its cause in the storage, and not in the path that was given."""
  return error.errno in STORAGE_ERRORS


def os_error(error: Exception) -> OSError | None:
  """Return the error of the operating system that an error is, or reports in words, as those of
  TensorStore and safetensors do; None for another."""
  if isinstance(error, OSError):
    return error
  found = _OS_ERROR.search(str(error))
  return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def unwritable(path: str | os.PathLike[str], error: OSError, advice: str = '') -> Exception:
  """Return the error for a path that a user gave, or could: `WriteError` if the cause is in the
  storage, else `InputError`."""
  problem = f'{os.fspath(path)}: cannot be written ({error.strerror or error}){advice}'
  return WriteError(problem) if is_of_storage(error) else InputError(problem)


def is_of_path(error: OSError) -> bool:
  """Return whether an error has its cause in the path that it names."""
  return error.errno in PATH_ERRORS and error.filename is not None


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None]:
  """Raise `WriteError` in place of an `OSError` of the block, which writes a file, or files of a
  folder."""
  try:
    yield
  except OSError as e:
    raise write_error(path, e) from None


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
  """Let errors name the path: those of a file that is open name none, others a temporary file."""
  try:
    yield
  except OSError as e:
    raise OSError(e.errno, e.strerror, str(path)) from None


def write_atomically(path: Path, data: str | bytes) -> None:
  """Replace a file; readers, and a crash, see the old content or the new one. An `OSError` names
  the path."""
  temporary = path.parent / f'.{path.name}-{uuid.uuid4().hex}'
  with _named(path):
    try:
      with temporary.open('xb', buffering=0) as f:
        _write(f.fileno(), data)
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
      raise


def append(path: Path, data: str | bytes) -> None:
  """Add to the end of a file all of the data at once; if that fails, the file stays as it was. An
  `OSError` names the path."""
  with _named(path), path.open('ab', buffering=0) as f:
    size = f.seek(0, os.SEEK_END)
    try:
      _write(f.fileno(), data)
    except BaseException:
      with contextlib.suppress(OSError):
        f.truncate(size)
      raise


def end_line(path: Path) -> None:
  """End the last line of a file that exists, so that one which a crash cut short takes nothing of
  what is appended."""
  if path.exists():
    with path.open('rb') as f:
      size = f.seek(0, os.SEEK_END)
      f.seek(max(0, size - 1))
      whole = f.read() in (b'', b'\n')
    if not whole:
      append(path, '\n')


def sync(path: Path) -> None:
  """Make the content of a file outlast a crash of the machine. An `OSError` names the path."""
  with _named(path), path.open('ab') as f:
    os.fsync(f.fileno())


def _write(descriptor: int, data: str | bytes) -> None:
  left = memoryview(data.encode() if isinstance(data, str) else data)
  while left:
    left = left[os.write(descriptor, left) :]


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
