"""Find the files of a folder or of a pattern, so that nothing is left out without a word.

Names that begin with a dot are hidden and left out, unless a pattern names the dot. Links are
followed: a link to a file counts as a copy of it, and a folder is read once, however many links
lead to it, so that loops end. What cannot be read, links that lead nowhere, and what is neither a
file nor a folder (a named pipe, a socket, a device) are errors."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

EVERY_LEVEL = '**'
Folder = tuple[int, int]  # device and inode


class Unusable(Exception):
  """A file or folder that cannot be used; the text says which and why."""


def files_below(root: Path) -> dict[str, Path]:
  """Return all files below a folder, sorted, by their names relative to it. Raises `Unusable`."""
  found = [f for folder in folders_below(root) for f in _files(folder)]
  return {p.relative_to(root).as_posix(): p for p in sorted(found)}


def files_of_pattern(pattern: str) -> dict[str, Path]:
  """Return the files that a pattern of paths matches, sorted, by their names relative to the folder
  that all are in. `**` stands for any number of folders. Raises `Unusable`."""
  root, parts = divided(pattern)
  found = sorted(set(_matches(root, parts)), key=str) if root.is_dir() else []
  common = Path(os.path.commonpath([p.parent for p in found])) if found else root
  return {p.relative_to(common).as_posix(): p for p in found}


def divided(pattern: str) -> tuple[Path, tuple[str, ...]]:
  """Return the folder that a pattern begins with, and its parts from the first that is no plain
  name."""
  parts = Path(pattern).parts
  fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  return Path(*parts[:fixed]), parts[fixed:]


def _matches(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
  first, *others = parts
  rest = tuple(others)
  if first == EVERY_LEVEL:
    for below in folders_below(folder):
      yield from _matches(below, rest or ('*',))
    return
  accepts = re.compile(fnmatch.translate(first)).match
  for entry in _entries(folder):
    if accepts(entry.name) and _is_hidden(first) >= _is_hidden(entry.name):
      if rest and _is_folder(entry):
        yield from _matches(folder / entry.name, rest)
      if not rest and _is_file(entry):
        yield folder / entry.name


def folders_below(root: Path) -> Iterator[Path]:
  """Yield a folder and those below it that are not hidden, each once. Links are followed last, so
  that a folder has its own name where it has one. Raises `Unusable`."""
  seen: set[Folder] = set()
  later = [root]
  while later:
    waiting, later = later, []
    while waiting:
      folder = waiting.pop()
      if (identity := _identity(folder)) in seen:
        continue
      seen.add(identity)
      yield folder
      below = [e for e in _entries(folder) if not _is_hidden(e.name) and _is_folder(e)]
      later += [folder / e.name for e in below if e.is_symlink()]
      waiting += [folder / e.name for e in below if not e.is_symlink()][::-1]


def holds(root: Path, folder: Path) -> bool:
  """Return whether a folder is or would be below a root, and not hidden. Raises `Unusable`."""
  folder = folder.resolve()
  if not root.is_dir():
    return False
  above = (f.resolve() for f in folders_below(root))
  below = (folder.relative_to(f) for f in above if folder.is_relative_to(f))
  return any(not any(map(_is_hidden, rest.parts)) for rest in below)


def _identity(folder: Path) -> Folder:
  stat = folder.stat()
  return stat.st_dev, stat.st_ino


def _files(folder: Path) -> Iterator[Path]:
  for entry in _entries(folder):
    if not _is_hidden(entry.name) and _is_file(entry):
      yield folder / entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda e: e.name)
  except OSError as e:
    raise Unusable(f'{folder} cannot be read ({e.strerror})') from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
  """Raises `Unusable` for a link that leads nowhere, which might be a folder elsewhere."""
  try:
    folder = entry.is_dir()
  except OSError as e:
    raise Unusable(f'{entry.path} cannot be read ({e.strerror})') from None
  if not folder and entry.is_symlink() and not os.path.exists(entry.path):
    raise Unusable(f'{entry.path} is a link to {os.readlink(entry.path)}, which does not exist')
  return folder


def _is_file(entry: os.DirEntry[str]) -> bool:
  """Return whether this is a file, or False for a folder. Raises `Unusable` for what is neither."""
  if _is_folder(entry):
    return False
  if not entry.is_file():
    raise Unusable(f'{entry.path} is neither a file nor a folder')
  return True


def _is_hidden(name: str) -> bool:
  return name.startswith('.')
