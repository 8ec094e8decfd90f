"""Files that several processes share: written atomically, and locked."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Generator
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
  """Replace a file; readers, and a crash, see the old content or the new one."""
  temporary = path.parent / f'.{path.name}-{uuid.uuid4().hex}'
  try:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
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
