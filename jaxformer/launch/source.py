"""Which source the machines install: the one that is named, or the one that runs here, held against
the version that plans."""

import pathlib
import re

from jaxformer.config import InputError
from jaxformer.files import user_path
from jaxformer.installation import NAME, Installation, commit_of, git, source_sha256, version_in
from jaxformer.launch.job import FORMS, CodeSource

_COMMIT = re.compile(r'git\+(https|ssh|git)://[^\s@]+(@[^\s@]+)?@[0-9A-Za-z][\w.+-]*', re.ASCII)
_VERSION = re.compile(r'[0-9][0-9A-Za-z.+!-]*', re.ASCII)


def source_of(text: str) -> CodeSource:
  """The source that `--source` names. Raises `InputError` for a repository without a commit, and
  for missing files."""
  if re.search(r'[\x01-\x1f\x7f]|[\ud800-\udfff]', text):
    raise InputError('--source', text, 'text without control characters')
  path = user_path(text, '--source')
  if text == 'installed':
    return CodeSource('installed')
  if text.startswith(f'{NAME}=='):
    if not _VERSION.fullmatch(text.partition('==')[2]):
      raise InputError('--source', text, FORMS['index'])
    return CodeSource('index', text)
  if text.startswith('git+'):
    if not _COMMIT.fullmatch(text):
      raise InputError('--source', text, 'git+URL@COMMIT, so that every restart runs the same code')
    return CodeSource('git', text)
  if text.endswith('.whl'):
    wheel = CodeSource('wheel', text)
    if wheel.upload and not path.is_file():
      raise InputError('--source', text, problem='no such file')
    return wheel
  if version_in(path) is None:
    raise InputError('--source', text, ' or '.join(FORMS.values()))
  return CodeSource('folder', text)


def default_source(here: Installation, kinds: tuple[str, ...]) -> CodeSource:
  """The source that runs here, if it is of one of some kinds, without `--source`.

  Raises `InputError` where machines cannot get what runs here."""
  if 'installed' in kinds:
    return CodeSource('installed')
  forms = ' or '.join(FORMS[kind] for kind in kinds)
  if here.checkout is not None:
    if 'folder' in kinds:
      return CodeSource('folder', str(here.checkout))
    commit = _published_commit(here.checkout)
    if commit is None:
      raise InputError(
        '--source',
        None,
        f'{forms}: jaxformer runs from {here.checkout}, and the machines can get it only from a '
        'commit that is pushed to an https remote, without local changes',
      )
    return CodeSource('git', commit)
  if here.origin is None:
    if not _VERSION.fullmatch(here.version):
      raise InputError('--source', None, f'{forms}: jaxformer is {here.version} here')
    return CodeSource('index', f'{NAME}=={here.version}')
  try:
    found = source_of(here.origin)
  except InputError as e:
    raise InputError(
      '--source', None, f'{forms}: jaxformer was installed from {here.origin} ({e})'
    ) from None
  if found.kind == 'folder' and not _same_code(pathlib.Path(here.origin)):
    raise InputError(
      '--source',
      None,
      f'{forms}: {here.origin}, from which jaxformer was installed, has changed since',
    )
  return found


def check_version(source: CodeSource, version: str) -> None:
  """Raise `InputError` for a source that is known to be of another version than the one that
  plans. Of a commit the machine compares it."""
  match source.kind:
    case 'index':
      found: str | None = source.place.partition('==')[2]
    case 'wheel':
      parts = pathlib.PurePath(source.place).name.removesuffix('.whl').split('-')
      found = parts[1] if len(parts) >= 5 and parts[0] == NAME else None
    case 'folder':
      found = version_in(pathlib.Path(source.place))
    case _:
      found = version
  if source.kind == 'wheel' and found is None:
    raise InputError(
      '--source', source.place, f'a wheel of {NAME}, such as {NAME}-{version}-...whl'
    )
  if found != version:
    problem = f'is version {found}, and {version} plans; install the same version here'
    raise InputError('--source', source.place, problem=problem)


def described(source: CodeSource) -> str:
  """What the machines install, for people: of a folder with its commit, and whether files differ
  from it."""
  if source.kind == 'installed':
    return 'the environment that is active here'
  if source.folder is None:
    return source.place
  commit = commit_of(source.place)
  if commit is None:
    return f'{source.place} (no git commit)'
  changed = git(source.place, 'status', '--porcelain')
  state = f'with {len(changed.splitlines())} changed files' if changed else 'without changes'
  return f'{source.place} (commit {commit[:12]}, {state})'


def ignored(folder: str, path: str) -> bool:
  """Whether git ignores a path of a folder, so that engines that follow it leave it out."""
  return git(folder, 'check-ignore', '--', path) is not None


def _published_commit(folder: pathlib.Path) -> str | None:
  """git+URL@COMMIT of a clean checkout whose commit is in a branch of an https remote."""
  commit, changed = commit_of(folder), git(folder, 'status', '--porcelain')
  if commit is None or changed != '':
    return None
  for branch in (git(folder, 'branch', '--remotes', '--contains', commit) or '').split():
    url = git(folder, 'remote', 'get-url', branch.partition('/')[0]) or ''
    if url.startswith('https://') and '@' not in url:
      return f'git+{url}@{commit}'
  return None


def _same_code(folder: pathlib.Path) -> bool:
  """Whether the package in a folder is the one that runs here."""
  return source_sha256(folder / NAME) == source_sha256()
