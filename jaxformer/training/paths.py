"""Paths of run folders: on this machine, or in a bucket of an object store
(`gs://bucket/runs/NAME`).

An object store replaces each object atomically; it neither appends nor renames. So the small files
of a run in a bucket are written to a local folder, as those of any run are, and files that changed
are uploaded from time to time. Arrays do not take this path: Orbax writes them to the store
directly, from every process.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path

from etils import epath

from jaxformer.config import InputError
from jaxformer.exit_codes import Failure
from jaxformer.files import sync, user_path, write_atomically, writing

AnyPath = Path | epath.Path
"""A local path, or one in an object store."""

# schemes by which Orbax and etils reach a store, and the package that each needs
STORES = {'gs': 'gcsfs'}

MARK = 'commit_success.txt'  # by which Orbax marks a checkpoint in a store as complete


def is_url(name: str | os.PathLike[str]) -> bool:
  return '://' in os.fspath(name)


def to_path(name: str | os.PathLike[str], field: str = '') -> AnyPath:
  """Return the absolute path that a name stands for. Raises `InputError`, naming `field`, for a
  store that cannot be used."""
  if isinstance(name, epath.Path):
    return name
  text = os.fspath(name)
  if not is_url(text):
    return user_path(text, field).absolute()
  scheme = check_url(text, field)
  import fsspec.config

  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    raise _bad_url(
      text, field, f"needs {STORES[scheme]}: pip install 'jaxformer[storage]'"
    ) from None
  # Make what other processes and Orbax write visible at once.
  fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)
  logger = logging.getLogger(STORES[scheme])
  if logger.level == logging.NOTSET:
    logger.setLevel(logging.CRITICAL)  # it logs the traceback of every error that it also raises
  return epath.Path(text)


def check_url(text: str, field: str = '') -> str:
  """Return the scheme of a store's URL. Raises `InputError` for a URL that cannot hold runs."""
  scheme, _, rest = text.partition('://')
  if scheme == 's3':
    raise _bad_url(
      text,
      field,
      'Orbax, which writes the checkpoints, supports only gs://; use that, or mount the bucket and '
      'name the folder',
    )
  if scheme not in STORES:
    raise _bad_url(text, field, 'no such store; must be a local folder or gs://BUCKET/FOLDER')
  if not rest.split('/')[0]:
    raise _bad_url(text, field, 'names no bucket; must be gs://BUCKET/FOLDER')
  return scheme


def _bad_url(text: str, field: str, problem: str) -> InputError:
  return InputError(field, text, problem=problem) if field else InputError(f'{text}: {problem}')


@contextlib.contextmanager
def remote_errors(path: AnyPath) -> Generator[None]:
  """Turn errors of an object store into `InputError` with the URL and the reason. Errors of local
  files pass, and so does `FileNotFoundError`."""
  try:
    yield
  except (InputError, FileNotFoundError):
    raise
  except Exception as e:  # the type of a store's errors is unknown in advance
    if isinstance(path, Path):
      raise
    raise InputError(
      f'{path}: cannot be reached ({type(e).__name__}: {" ".join(str(e).split())[:300]})'
    ) from None


def check_bucket(path: AnyPath) -> None:
  """Raises `InputError` for a URL whose bucket does not exist."""
  if isinstance(path, Path):
    return
  bucket = epath.Path('/'.join(os.fspath(path).split('/')[:3]))
  try:
    next(iter(bucket.iterdir()), None)
  except FileNotFoundError:
    raise InputError(f'{path}: there is no bucket {bucket}') from None
  except Exception as e:  # permission for a folder does not include that for its bucket
    logging.getLogger(__name__).debug('%s cannot be listed: %s', bucket, e)


def remove(path: AnyPath) -> None:
  """Remove a folder and its content, if it exists."""
  if isinstance(path, Path):
    shutil.rmtree(path, ignore_errors=True)
  elif path.exists():
    path.rmtree()


def discard(checkpoint: AnyPath) -> None:
  """Remove a checkpoint, so that whoever looks meanwhile finds all of it, or none."""
  if isinstance(checkpoint, Path):
    # a name by which Orbax recognizes what was left incomplete, and cleans it up
    aside = checkpoint.with_name(f'{checkpoint.name}.orbax-checkpoint-tmp-removed')
    checkpoint.rename(aside)
    remove(aside)
    return
  (checkpoint / MARK).unlink(missing_ok=True)
  remove(checkpoint)


def move(source: AnyPath, target: AnyPath) -> None:
  """Move a folder to a path that does not exist."""
  if isinstance(source, Path):
    shutil.move(source, target)
    return
  import fsspec

  store, _ = fsspec.url_to_fs(os.fspath(source))  # copies within the store
  store.copy(os.fspath(source), os.fspath(target), recursive=True)
  store.rm(os.fspath(source), recursive=True)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Generator[Path]:
  """Yield a local folder with the files directly inside a folder: the folder itself if it is
  local."""
  if isinstance(path, Path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='jaxformer-') as temporary:
    _download(path, Path(temporary))
    yield Path(temporary)


def _download(path: epath.Path, into: Path) -> None:
  with remote_errors(path):
    found = [f for f in (path.iterdir() if path.exists() else ()) if f.name and not f.is_dir()]
  for file in found:
    with remote_errors(path):
      content = file.read_bytes()
    write_atomically(into / file.name, content)


class RunFiles:
  """The small files of a run, while it is being written.

  Attributes:
    home: the local folder in which they are written: the run folder, or for one in a bucket a
      temporary folder, which a killed process leaves behind.
  """

  def __init__(self, path: AnyPath):
    self._remote = None if isinstance(path, Path) else path
    self._home = path if isinstance(path, Path) else None
    self._uploaded: dict[Path, tuple[int, int]] = {}
    self._failed = False

  @property
  def home(self) -> Path:
    if self._home is None:
      self._home = Path(tempfile.mkdtemp(prefix='jaxformer-'))
    return self._home

  def open(self) -> None:
    """Create the folder, or download it. Raises `OSError`, or `InputError` for a store."""
    self.home.mkdir(parents=True, exist_ok=True)
    if self._remote is not None:
      _download(self._remote, self.home)
      self._uploaded = {file: _version(file) for file in self.home.iterdir()}

  def sync(self, names: Iterable[str]) -> None:
    """Make the content of these files durable, in a bucket that of all files. An upload that fails
    is retried at the next; the second failure in a row raises `Failure`."""
    if self._remote is None:
      for file in (self.home / name for name in names):
        if file.exists():
          with writing(file):
            sync(file)
      return
    try:
      self.upload()
    except InputError as e:
      if self._failed:
        raise Failure(str(e)) from None
      self._failed = True
    else:
      self._failed = False

  def upload(self) -> None:
    """Upload files that have changed. Raises `InputError`."""
    if self._remote is None:
      return
    # `config.json` last, since it makes the folder a run.
    files = [f for f in self.home.rglob('*') if f.is_file()]
    for file in sorted(files, key=lambda f: f.name == 'config.json'):
      version = _version(file)  # taken before: later changes are uploaded next time
      if self._uploaded.get(file) == version:
        continue
      try:
        with remote_errors(self._remote):
          (self._remote / file.relative_to(self.home).as_posix()).write_bytes(file.read_bytes())
      except FileNotFoundError:
        raise InputError(f'{self._remote}: there is no such bucket') from None
      self._uploaded[file] = version

  def close(self, upload: bool) -> None:
    """Remove the temporary folder, after an `upload`. Raises `Failure`."""
    if self._remote is None or self._home is None:
      return
    try:
      if upload:
        self.upload()
    except InputError as e:
      raise Failure(str(e)) from None
    finally:
      shutil.rmtree(self._home, ignore_errors=True)


def _version(file: Path) -> tuple[int, int]:
  stat = file.stat()
  return stat.st_size, stat.st_mtime_ns
