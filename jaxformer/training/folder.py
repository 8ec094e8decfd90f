"""Where a run folder is: on this machine, or in a bucket of an object store
(`gs://bucket/runs/NAME`).

A store replaces objects whole, each at once; it neither appends nor renames. So the small files of
a run in a bucket are written in a folder of this machine as those of any run are, and those that
changed are put into the bucket from time to time. Arrays do not
take this way: Orbax writes them to the store itself, from every process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path

from etils import epath

from jaxformer.config import InputError

Place = Path | epath.Path
"""A local path, or one of a store."""

# schemes by which Orbax and etils reach a store, and the package that each needs
STORES = {'gs': 'gcsfs'}


def is_url(name: str | os.PathLike[str]) -> bool:
  return '://' in os.fspath(name)


def place(name: str | os.PathLike[str], field: str = '') -> Place:
  """The path that a name stands for, absolute. Raises `InputError`, which begins with `field`, for
  a store that cannot be used."""
  if isinstance(name, epath.Path):
    return name
  text = os.fspath(name)
  if not is_url(text):
    return Path(text).expanduser().absolute()
  scheme, said = scheme_of(text, field)
  _prepare(scheme, said)
  return epath.Path(text)


def scheme_of(text: str, field: str = '') -> tuple[str, str]:
  """The scheme of a store's URL, and how errors name the URL. Raises `InputError` for one that no
  run folder can be at."""
  said = f'{field} = {text!r}' if field else text
  scheme, _, rest = text.partition('://')
  if scheme == 's3':
    raise InputError(
      f'{said}: Orbax, which writes the checkpoints, reaches gs:// alone; use that, or mount the '
      'bucket and name '
      'the folder'
    )
  if scheme not in STORES:
    raise InputError(f'{said}: no such store; a local folder or gs://BUCKET/FOLDER is expected')
  if not rest.split('/')[0]:
    raise InputError(f'{said}: names no bucket; gs://BUCKET/FOLDER is expected')
  return scheme, said


def _prepare(scheme: str, said: str) -> None:
  import fsspec.config

  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    raise InputError(f"{said}: needs {STORES[scheme]}: pip install 'jaxformer[storage]'") from None
  # What other processes and Orbax write is to be seen at once.
  fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
  logger = logging.getLogger(STORES[scheme])
  if logger.level == logging.NOTSET:
    logger.setLevel(logging.CRITICAL)  # it logs the traceback of every error that it also raises


@contextlib.contextmanager
def reaching(where: Place) -> Generator[None]:
  """Within, what a store refuses is an `InputError` that names the URL and the reason. Errors of
  local files pass, and so does `FileNotFoundError`."""
  try:
    yield
  except (InputError, FileNotFoundError):
    raise
  except Exception as e:  # which type a store raises cannot be foretold
    if isinstance(where, Path):
      raise
    raise InputError(
      f'{where}: cannot be reached ({type(e).__name__}: {" ".join(str(e).split())[:300]})'
    ) from None


def check_bucket(where: Place) -> None:
  """Raises `InputError` where a URL is of a bucket that is not there."""
  if isinstance(where, Path):
    return
  bucket = epath.Path('/'.join(os.fspath(where).split('/')[:3]))
  try:
    next(iter(bucket.iterdir()), None)
  except FileNotFoundError:
    raise InputError(f'{where}: there is no bucket {bucket}') from None
  except Exception as e:  # whoever may use a folder need not see the bucket
    logging.getLogger(__name__).debug('%s cannot be listed: %s', bucket, e)


def remove(path: Place) -> None:
  """A folder with all that is in it, if it is there."""
  if isinstance(path, Path):
    shutil.rmtree(path, ignore_errors=True)
  elif path.exists():
    path.rmtree()


def move(source: Place, target: Place) -> None:
  """A folder to a place where nothing is."""
  if isinstance(source, Path):
    shutil.move(source, target)
    return
  import fsspec

  store, _ = fsspec.url_to_fs(os.fspath(source))  # the store copies; no byte comes by here
  store.copy(os.fspath(source), os.fspath(target), recursive=True)
  store.rm(os.fspath(source), recursive=True)


@contextlib.contextmanager
def fetched(path: Place) -> Generator[Path]:
  """Within, a local folder with the files that are directly in a folder: that folder itself where
  it is local."""
  if isinstance(path, Path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='jaxformer-') as temporary:
    with reaching(path):
      _fetch(path, Path(temporary))
    yield Path(temporary)


def _fetch(path: epath.Path, into: Path) -> None:
  for file in path.iterdir() if path.exists() else ():
    if file.name and not file.is_dir():
      (into / file.name).write_bytes(file.read_bytes())


class Folder:
  """A run folder on this machine, being written."""

  def __init__(self, where: Path):
    self._home: Path | None = where

  @property
  def home(self) -> Path:
    """The local folder in which files are written."""
    if self._home is None:
      self._home = Path(tempfile.mkdtemp(prefix='jaxformer-'))
    return self._home

  def open(self) -> None:
    """Makes it. Raises `OSError`."""
    self.home.mkdir(parents=True, exist_ok=True)

  def publish(self) -> None:
    """Puts everything where the run is. Raises `InputError`."""

  def push(self, names: Iterable[str]) -> None:
    """Makes what is in these files outlast a crash of this process and its machine."""
    for name in names:
      if (self.home / name).exists():
        with (self.home / name).open('a') as f:
          os.fsync(f.fileno())

  def close(self, publish: bool) -> None:
    """After the last file; `publish` what is left. Raises `InputError`."""


class BucketFolder(Folder):
  """A run folder in a bucket. `home` is a temporary folder, which a process that is killed leaves
  behind.

  A push puts all files that changed since the last into the bucket, whatever names it is given. One
  that fails is made good by the next; the second failure in a row is raised."""

  def __init__(self, where: epath.Path):
    self._place, self._home = where, None
    self._pushed: dict[Path, tuple[int, int]] = {}
    self._failed = False

  def open(self) -> None:
    with reaching(self._place):
      _fetch(self._place, self.home)
    self._pushed = {file: _version(file) for file in self.home.iterdir()}

  def push(self, names: Iterable[str] = ()) -> None:
    try:
      self.publish()
    except InputError:
      if self._failed:
        raise
      self._failed = True
    else:
      self._failed = False

  def publish(self) -> None:
    # `config.json` last: it is what makes the folder a run.
    files = [f for f in self.home.rglob('*') if f.is_file()]
    for file in sorted(files, key=lambda f: f.name == 'config.json'):
      version = _version(file)  # of before: what is written meanwhile goes with the next push
      if self._pushed.get(file) != version:
        self._put(file)
        self._pushed[file] = version

  def _put(self, file: Path) -> None:
    data = file.read_bytes()
    try:
      with reaching(self._place):
        (self._place / file.relative_to(self.home).as_posix()).write_bytes(data)
    except FileNotFoundError:
      raise InputError(f'{self._place}: there is no such bucket') from None

  def close(self, publish: bool) -> None:
    if self._home is None:
      return
    try:
      if publish:
        self.publish()
    finally:
      shutil.rmtree(self._home, ignore_errors=True)


def _version(file: Path) -> tuple[int, int]:
  stat = file.stat()
  return stat.st_size, stat.st_mtime_ns


def folder_at(where: Place) -> Folder:
  """To write a run in."""
  return Folder(where) if isinstance(where, Path) else BucketFolder(where)
