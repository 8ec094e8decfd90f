"""Files of the user that a job brings: those that its command names, and what they import that lies
beside them. The job holds them as text, and the machine checks their hashes before it trains."""

import base64
import dataclasses
import gzip
import hashlib
import importlib.metadata
import io
import os
import pathlib
import re
import shlex
import tarfile
from collections.abc import Iterable

from jaxformer.code_record import folder_of, module_of
from jaxformer.config import InputError
from jaxformer.files import user_path
from jaxformer.installation import NAME
from jaxformer.user_code import with_imports

_IN_FILE = re.compile(r'(.+\.py)(:[\w.]+)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class UserFiles:
  """Files of the user, in the places that they have to each other.

  Attributes:
    contents: (path, bytes) of each, with paths relative to a common folder.
    places: (text that names a file, that text on the machine relative to the common folder).
    imports: names of modules that they import and that are neither beside them nor of Python.
  """

  contents: tuple[tuple[str, bytes], ...] = ()
  places: tuple[tuple[str, str], ...] = ()
  imports: tuple[str, ...] = ()

  def sha256(self) -> dict[str, str]:
    """Return the hash of each file by its path."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in self.contents}

  def digest(self) -> str:
    """Return what identifies the files, short enough for a name."""
    return hashlib.sha256(repr(sorted(self.sha256().items())).encode()).hexdigest()[:12]

  def there(self, text: str, folder: str) -> str:
    """Return what stands for a text of the command on the machine, whose files are in `folder`."""
    place = dict(self.places).get(text)
    return text if place is None else f'{folder}/{place}'

  def commands(self, folder: str) -> list[str]:
    """Return the commands that write the files into a folder, and those that fail with one line
    where a file is not what was planned. Each is one line."""
    if not self.contents:
      return []
    place = shlex.quote(folder)
    packed = base64.b64encode(_archive(self.contents)).decode()
    hashes = shlex.join(f'{digest}  {path}' for path, digest in self.sha256().items())
    return [
      f'mkdir -p {place}',
      f'echo {packed} | base64 -d | tar -xzf - -C {place}',
      f"{{ differ=$(set -o pipefail; printf '%s\\n' {hashes} | (cd {place} && sha256sum --check "
      "--quiet 2>/dev/null) | tr '\\n' ' ') || { "
      'echo "error: files differ from those that were planned: $differ" >&2; false; }; }',
    ]


NO_FILES = UserFiles()


def _archive(contents: Iterable[tuple[str, bytes]]) -> bytes:
  """Return a tar.gz that depends on nothing but the files."""
  packed = io.BytesIO()
  with (
    gzip.GzipFile(fileobj=packed, mode='wb', mtime=0) as zipped,
    tarfile.open(fileobj=zipped, mode='w') as tar,
  ):
    for path, content in contents:
      info = tarfile.TarInfo(path)
      info.size, info.mode = len(content), 0o644
      tar.addfile(info, io.BytesIO(content))
  return packed.getvalue()


# ---- which files -------------------------------------------------------------------------------


def user_files(experiment: str, texts: Iterable[str], code: Iterable[str] = ()) -> UserFiles:
  """Return the files that a command names, with what they import beside them.

  Args:
    experiment: a target of `train`: a file, FILE.py:NAME, or the name of a preset or family.
    texts: values of overrides, of which FILE.py:NAME names a file that exists.
    code: files of `--code`.

  Raises `InputError` for files that cannot be read or shipped.
  """
  named: dict[str, tuple[pathlib.Path, str]] = {}
  for text in (experiment, *texts):
    match = _IN_FILE.fullmatch(text)
    if match is not None and (text == experiment or user_path(match[1], 'file').is_file()):
      named[text] = (_absolute(match[1]), match[2])
  for text in (experiment, *code):
    if text not in named and (text in code or text.endswith('.py') or os.sep in text):
      named[text] = (_absolute(text), '')
  if not named:
    return NO_FILES
  read: dict[pathlib.Path, bytes] = {}
  outside: set[str] = set()
  for path, _ in named.values():
    found = with_imports(path)
    for file, reason in found.broken.items():
      raise InputError('file', str(file), problem=f'is no Python ({reason})')
    read |= found.contents
    outside |= found.outside
  folders = [folder_of(module_of(path), path) for path, _ in named.values()]
  root = pathlib.Path(os.path.commonpath(folders))
  contents = sorted((path.relative_to(root).as_posix(), content) for path, content in read.items())
  for path, _ in contents:
    if re.search(r'[\x00-\x1f\x7f\\]|[\ud800-\udfff]', path):
      raise InputError('experiment', path, 'a file name without control characters or backslashes')
  places = tuple(
    (text, path.relative_to(root).as_posix() + name) for text, (path, name) in named.items()
  )
  return UserFiles(tuple(contents), places, tuple(sorted(outside)))


def _absolute(path: str) -> pathlib.Path:
  return pathlib.Path(os.path.realpath(user_path(path, 'file')))


# ---- what they need ----------------------------------------------------------------------------


def requirements(imports: Iterable[str]) -> tuple[str, ...]:
  """Return what pip installs for modules that files import: NAME==VERSION as installed here,
  without what jaxformer itself requires.

  Raises `InputError` for a module that is installed from no package index."""
  wanted = sorted(set(imports) - {NAME})
  if not wanted:
    return ()
  names, brought = importlib.metadata.packages_distributions(), _brought()
  found = []
  for module in wanted:
    dists = {_normal(d): d for d in names.get(module, ())}
    if dists.keys() & brought:
      continue
    if not dists:
      where = 'a file beside the one that imports it, or an installed package'
      raise InputError('import', module, where)
    _, name = min(dists.items())
    dist = importlib.metadata.distribution(name)
    if dist.read_text('direct_url.json') is not None:
      raise InputError(
        'import', module, problem=f'{name} is installed from a folder or URL; machines install '
        'packages from the index by their version: put the module beside the file'
      )  # fmt: skip
    found.append(f'{name}=={dist.version}')
  return tuple(sorted(found))


def _brought() -> set[str]:
  """Return the names of the distributions that jaxformer installs."""
  found, todo = set(), [NAME]
  while todo:
    name = _normal(todo.pop())
    if name in found:
      continue
    found.add(name)
    try:
      needs = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
      continue
    todo += [re.split(r'[^\w.-]', need, maxsplit=1)[0] for need in needs if 'extra ==' not in need]
  return found


def _normal(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()
