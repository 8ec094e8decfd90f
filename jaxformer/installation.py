"""Where the running package comes from: a checkout, a repository, a wheel, or a package index.

https://packaging.python.org/en/latest/specifications/direct-url/
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import tomllib
import urllib.parse
import urllib.request
from typing import Any

NAME = 'jaxformer'
NOT_INSTALLED = 'not installed'
FOLDER = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Installation:
  """The running package.

  Attributes:
    version: of the checkout, else of the installed distribution.
    checkout: the folder with its `pyproject.toml` that it runs from; None if it was installed.
    origin: what it was installed from, as pip takes it: git+URL@COMMIT, the URL or the file of a
      wheel, a folder; None for a package index, and for a checkout.
  """

  version: str
  checkout: pathlib.Path | None = None
  origin: str | None = None


@functools.cache
def installation() -> Installation:
  """Return where the running package comes from."""
  root = FOLDER.parent
  version = version_in(root)
  if version is not None:
    return Installation(version, root)
  try:
    found = importlib.metadata.distribution(NAME)
  except importlib.metadata.PackageNotFoundError:
    return Installation(NOT_INSTALLED)
  record = found.read_text('direct_url.json')
  return Installation(found.version, origin=None if record is None else origin_of(record))


def version_in(folder: pathlib.Path) -> str | None:
  """Return the version that the `pyproject.toml` of a checkout gives; None for a folder that is
  none of this package."""
  try:
    project = tomllib.loads((folder / 'pyproject.toml').read_text()).get('project', {})
  except (OSError, ValueError):
    return None
  return project.get('version') if project.get('name') == NAME else None


def source_sha256(package: pathlib.Path = FOLDER) -> str:
  """Return a hash of the source of the running package, or of the one in another folder."""
  source = hashlib.sha256()
  for file in sorted(package.rglob('*.py')):
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    source.update(f'{file.relative_to(package).as_posix()} {content}\n'.encode())
  return source.hexdigest()


def git(folder: pathlib.Path | str, *words: str) -> str | None:
  """Return what a git command prints about a folder; None if it fails, or there is no git."""
  command = ['git', '-C', str(folder), *words]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def commit_of(folder: pathlib.Path | str) -> str | None:
  """Return the commit of a folder that is the top of a git repository. None for another folder: the
  repository that it lies in may be that of a project in whose environment it is installed."""
  top = git(folder, 'rev-parse', '--show-prefix') == ''
  return git(folder, 'rev-parse', 'HEAD') if top else None


def origin_of(record: str) -> str:
  """Return what pip was given, by the record that it keeps of it (`direct_url.json`)."""
  data: dict[str, Any] = json.loads(record)
  url = data['url']
  if 'vcs_info' in data:
    return f'git+{url}@{data["vcs_info"]["commit_id"]}'
  if url.startswith('file://'):
    return urllib.request.url2pathname(urllib.parse.urlparse(url).path)
  return url
