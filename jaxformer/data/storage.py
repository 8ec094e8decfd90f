"""The cache folder: where it is, how a folder gets into it whole or not at all, and the hashes of
files."""

from __future__ import annotations

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
from typing import TypeVar

from jaxformer.config import InputError

T = TypeVar('T')

# A build writes all the time; one whose files have not changed for so long was killed.
ABANDONED_SECONDS = 24 * 3600.0
# Below this size hashing again costs less than looking the hash up.
MEMO_BYTES = 1 << 20
# A file changed within the resolution of its time stamp can keep that stamp, so that young hashes
# are not remembered.
RACY_SECONDS = 2.0


def cache_dir() -> Path:
  """`$JAXFORMER_CACHE`, else `$XDG_CACHE_HOME/jaxformer`, else `~/.cache/jaxformer`."""
  if own := os.environ.get('JAXFORMER_CACHE'):
    return Path(own).expanduser()
  base = os.environ.get('XDG_CACHE_HOME')
  return (Path(base) if base else Path.home() / '.cache') / 'jaxformer'


def sha256(*parts: str | bytes) -> str:
  """The SHA-256 (hex) of several values, each preceded by its length so that no two lists of values
  run into one."""
  total = hashlib.sha256()
  for part in parts:
    part = part.encode('utf-8', 'surrogatepass') if isinstance(part, str) else part
    total.update(len(part).to_bytes(8, 'little') + part)
  return total.hexdigest()


def file_sha256(path: Path, memo: Path | None = None) -> str:
  """The SHA-256 (hex) of a file's bytes, read as a stream. Hashes are remembered for as long as the
  file's size and
  modification time stay the same: within the process, and those of large files in a `memo` folder.
    `InputError` where it cannot
  be read."""
  try:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    place = (
      memo / 'hashes' / f'{sha256(json.dumps(key))[:32]}.txt'
      if memo and stat.st_size >= MEMO_BYTES
      else None
    )
    if key not in _hashes and place is not None:
      with contextlib.suppress(OSError):
        _hashes[key] = place.read_text()
    if key in _hashes:
      return _hashes[key]
    with open(path, 'rb') as file:
      value = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as e:
    raise InputError(f'{path}: cannot be read ({e.strerror})') from None
  if time.time() - stat.st_mtime > RACY_SECONDS:
    _hashes[key] = value
    if place is not None:
      with contextlib.suppress(OSError):  # the memo only saves time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, value.encode())
  return value


_hashes: dict[tuple[str, int, int], str] = {}


def write_atomically(path: Path, data: bytes) -> None:
  """Writes a file that readers see whole or not at all."""
  temporary = path.parent / f'.{path.name}-{uuid.uuid4().hex}'
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def published(folder: Path, build: Callable[[Path], None], load: Callable[[Path], T | None]) -> T:
  """What `load` makes of `folder`; where it gives None (missing or damaged), `build` fills a new
  folder that takes its place.

  Other processes may build the same folder meanwhile: each sees it whole or not at all, and the
  first to finish wins. A process killed on the way leaves a hidden folder that no one reads and
  that a later build removes.

  Raises `InputError` where the folder cannot be written.
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
    raise InputError(
      f'cache folder {folder.parent}: cannot be written ({e.strerror or e}); set JAXFORMER_CACHE '
      'to a folder that can be'
    ) from None
  if found is None:
    raise InputError(
      f'cache folder {folder}: what was just written there cannot be read back; check the disk'
    )
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
  """Removes what killed builds left."""
  for left in parent.glob('.building-*'):
    with contextlib.suppress(OSError):
      newest = max(p.stat().st_mtime for p in [left, *left.rglob('*')])
      if time.time() - newest > ABANDONED_SECONDS:
        shutil.rmtree(left, ignore_errors=True)
