"""The cache folder: where it is, how folders are built in it atomically, and hashes of files."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

from jaxformer.config import InputError
from jaxformer.files import unwritable, user_path, write_atomically

T = TypeVar('T')

# A running build writes all the time; one whose files have not changed for this long was killed.
ABANDONED_SECONDS = 24 * 3600.0
# Below this size hashing again costs less than looking the hash up.
MEMO_BYTES = 1 << 20
# A file that changes within the resolution of its time stamp can keep that stamp, so hashes of
# young files are not remembered.
RACY_SECONDS = 2.0


def cache_dir() -> Path:
  """Return `$JAXFORMER_CACHE`, else `$XDG_CACHE_HOME/jaxformer`, else `~/.cache/jaxformer`."""
  if own := os.environ.get('JAXFORMER_CACHE'):
    return user_path(own, 'JAXFORMER_CACHE')
  base = os.environ.get('XDG_CACHE_HOME')
  return (Path(base) if base else Path.home() / '.cache') / 'jaxformer'


def sha256(*parts: str | bytes) -> str:
  """Return the SHA-256 (hex) of several values, each preceded by its length so that different lists
  of values differ."""
  total = hashlib.sha256()
  for part in parts:
    part = part.encode('utf-8', 'surrogatepass') if isinstance(part, str) else part
    total.update(len(part).to_bytes(8, 'little') + part)
  return total.hexdigest()


def file_sha256(path: Path, memo: Path | None = None) -> str:
  """Return the SHA-256 (hex) of the bytes of a file, read as a stream.

  Hashes of large files are remembered in the folder `memo` for as long as the file keeps its size,
  inode and times of modification and of change; so one that is replaced by another of the same size
  and modification time is hashed again. Raises `InputError` where the file cannot be read."""
  try:
    stat, place = path.stat(), None
    if not S_ISREG(stat.st_mode):  # to open a named pipe would wait for ever
      raise InputError(f'{path}: cannot be read (it is no regular file)')
    if memo and stat.st_size >= MEMO_BYTES:
      times = stat.st_mtime_ns, stat.st_ctime_ns
      key = json.dumps((str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, times))
      place = memo / 'hashes' / f'{sha256(key)[:32]}.txt'
      with contextlib.suppress(OSError):
        return place.read_text()
    with open(path, 'rb') as file:
      value = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as e:
    raise InputError(f'{path}: cannot be read ({e.strerror})') from None
  if place is not None and time.time() - max(stat.st_mtime, stat.st_ctime) > RACY_SECONDS:
    with contextlib.suppress(OSError):  # the memo only saves time
      place.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(place, value)
  return value


def build_atomically(
  folder: Path, build: Callable[[Path], None], load: Callable[[Path], T | None]
) -> T:
  """Return what `load` reads from `folder`. Where that is None (missing or damaged), first let
  `build` fill a new folder, which then takes its place.

  Other processes may build the same folder at the same time: they see either nothing or the
  complete folder, and the first to finish wins. A killed process leaves a hidden folder, which
  nobody reads and a later build removes.

  Raises `InputError` where the folder cannot be written, `WriteError` where the disk is full.
  """
  if (found := load(folder)) is not None:
    return found
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    temporary = _new_folder(folder.parent)
    try:
      build(temporary)
      found = _install(temporary, folder, load)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)
  except OSError as e:
    advice = '; set JAXFORMER_CACHE to a folder that can be'
    raise unwritable(f'cache folder {folder.parent}', e, advice) from None
  if found is None:
    raise InputError(f'cache folder {folder}: cannot be read back after writing; check the disk')
  return found


def _install(temporary: Path, folder: Path, load: Callable[[Path], T | None]) -> T | None:
  for _ in range(8):
    try:
      os.rename(temporary, folder)
      break
    except OSError as e:
      if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise
    if (found := load(folder)) is not None:  # another process was first
      return found
    aside = _new_folder(folder.parent)
    with contextlib.suppress(FileNotFoundError):
      os.rename(folder, aside / 'damaged')
    shutil.rmtree(aside, ignore_errors=True)
  return load(folder)


def _new_folder(parent: Path) -> Path:
  # Not by `tempfile`, whose folders are for one user alone: a team may share a cache.
  folder = parent / f'.building-{uuid.uuid4().hex}'
  folder.mkdir()
  return folder


def _sweep(parent: Path) -> None:
  """Remove what killed builds left."""
  for left in parent.glob('.building-*'):
    with contextlib.suppress(OSError):
      newest = max(p.stat().st_mtime for p in [left, *left.rglob('*')])
      if time.time() - newest > ABANDONED_SECONDS:
        shutil.rmtree(left, ignore_errors=True)
