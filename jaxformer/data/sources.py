"""Where text comes from. A source is a config that yields documents, says what it held, and hashes
its content."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data.readers import Document, read_documents, text_of
from jaxformer.data.storage import file_sha256, sha256

# Tests, other people's packages, a copy of `PydocTopics`, and build settings that name the machine
# they were made on.
NOT_LIBRARY = {
  'test',
  'tests',
  'idle_test',
  'site-packages',
  'dist-packages',
  '__pycache__',
  'pydoc_data',
}
MACHINE_PREFIX = '_sysconfigdata'


class Source(Config, abstract=True):
  """A corpus: a finite sequence of documents, the same on every pass."""

  def documents(self) -> Iterator[Document]:
    """Every document, in order, read as they are asked for. Raises `InputError` for what cannot be
    read."""
    raise NotImplementedError

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    """What a run records about the corpus, as JSON data: at least `type` and `sha256`, the
    fingerprint."""
    raise NotImplementedError

  def fingerprint(self, memo: Path | None = None) -> str:
    """A hash (hex) that changes when a document does. `memo` is a folder that remembers the hashes
    of large files."""
    raise NotImplementedError

  def check_cache(self, folder: Path) -> None:
    """Raises `InputError` where a cache in this folder would become part of the corpus."""


class StandardLibrary(Source):
  """The Python standard library's own source files, without its tests: always there, about 11 MB,
  one document a file.

  With `max_bytes`, files are taken in the order of a hash of their paths until so many bytes are
  reached, and the last is cut at the end of a line."""

  max_bytes: int | None = None

  def validate(self) -> None:
    self.require(self.max_bytes is None or self.max_bytes > 0, 'max_bytes', 'positive or none')

  def documents(self) -> Iterator[Document]:
    for name, path, limit in self._files():
      try:
        with tokenize.open(path) as file:
          text = file.read()
      except (OSError, SyntaxError, UnicodeDecodeError) as e:
        raise InputError(f'{path}: cannot be read ({e})') from None
      yield Document(name, text if limit is None else _head(text, limit))

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    files: list[dict[str, Any]] = [
      {
        'name': name,
        'bytes': path.stat().st_size if limit is None else limit,
        'sha256': file_sha256(path),
      }
      for name, path, limit in self._files()
    ]
    return {
      'type': self.tag,
      'python': sys.version.split()[0],
      'max_bytes': self.max_bytes,
      'bytes': sum(f['bytes'] for f in files),
      'sha256': self.fingerprint(memo),
      'files': files,
    }

  def fingerprint(self, memo: Path | None = None) -> str:
    return sha256(
      self.tag, *(f'{name} {limit} {file_sha256(path)}' for name, path, limit in self._files())
    )

  def _files(self) -> list[tuple[str, Path, int | None]]:
    """Name, path and, of a file that is cut short, the bytes to keep; by path."""
    root = Path(sysconfig.get_paths()['stdlib'])
    names = []
    for folder, folders, files in os.walk(root):
      folders[:] = sorted(set(folders) - NOT_LIBRARY)
      own = [f for f in files if f.endswith('.py') and not f.startswith(MACHINE_PREFIX)]
      names += [Path(folder, f).relative_to(root).as_posix() for f in own]
    if not names:
      raise InputError(
        f'{self.tag}: this Python has no source files under {root}; use Files with a path of your '
        'own'
      )
    if self.max_bytes is None:
      return [(name, root / name, None) for name in sorted(names)]
    taken, left = [], self.max_bytes
    for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
      if left <= 0:
        break
      size = (root / name).stat().st_size
      taken.append((name, root / name, left if size > left else None))
      left -= size
    return sorted(taken, key=lambda t: t[0])


def _head(text: str, limit: int) -> str:
  """The longest beginning of at most `limit` bytes that ends with a line, or simply the beginning
  where no line is that short."""
  head = text.encode()[:limit].decode(errors='ignore')
  return head[: head.rfind('\n') + 1] or head


class PydocTopics(Source):
  """The prose of the Python language reference that `help()` shows: always there, about half a
  megabyte, one document a topic."""

  def documents(self) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
      yield Document(name, topics[name])

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    return {
      'type': self.tag,
      'python': sys.version.split()[0],
      'documents': sum(1 for _ in self.documents()),
      'bytes': sum(len(d.text.encode()) for d in self.documents()),
      'sha256': self.fingerprint(memo),
    }

  def fingerprint(self, memo: Path | None = None) -> str:
    return sha256(self.tag, *itertools.chain.from_iterable(self.documents()))


class Files(Source):
  """Your own files: a file, a folder with all below it (hidden files apart), or a pattern such as
  `notes/**/*.md`.

  Text files are one document each; a JSON line or Parquet row is one document, its text in
  `text_field`. Files ending in .gz and .zst are decompressed. A text file is held in memory whole
  while it is read."""

  path: str
  text_field: str = 'text'

  def documents(self) -> Iterator[Document]:
    for name, path in self._files():
      yield from read_documents(path, name, self.text_field)

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for name, path in self._files():
      stat = path.stat()
      files.append(
        {
          'name': name,
          'bytes': stat.st_size,
          'mtime': stat.st_mtime,
          'sha256': file_sha256(path, memo),
        }
      )
    return {
      'type': self.tag,
      'path': str(Path(self.path).expanduser().absolute()),
      'text_field': self.text_field,
      'bytes': sum(f['bytes'] for f in files),
      'sha256': self.fingerprint(memo),
      'files': files,
    }

  def fingerprint(self, memo: Path | None = None) -> str:
    return sha256(
      self.tag,
      self.text_field,
      *(f'{name} {file_sha256(path, memo)}' for name, path in self._files()),
    )

  def check_cache(self, folder: Path) -> None:
    root, folder = Path(self.path).expanduser().resolve(), folder.resolve()
    if root.is_dir() and folder.is_relative_to(root) and not _hidden(folder.relative_to(root)):
      raise InputError(
        f'{self.tag}.path = {self.path!r}: the cache folder {folder} lies in it; set '
        'JAXFORMER_CACHE to one outside'
      )

  def _files(self) -> list[tuple[str, Path]]:
    root = Path(self.path).expanduser()
    try:
      if root.is_dir():
        found = [
          p for p in sorted(root.rglob('*')) if p.is_file() and not _hidden(p.relative_to(root))
        ]
        if not found:
          raise InputError(f'{self.tag}.path = {self.path!r}: the folder holds no files')
        return [(p.relative_to(root).as_posix(), p) for p in found]
      if root.exists():
        return [(root.name, root)]
    except OSError as e:
      raise InputError(f'{self.tag}.path = {self.path!r}: cannot be read ({e.strerror})') from None
    if glob.has_magic(self.path):
      matches = [p for p in map(Path, sorted(glob.glob(str(root), recursive=True))) if p.is_file()]
      if matches:
        common = Path(os.path.commonpath([p.parent for p in matches]))
        return [(p.relative_to(common).as_posix(), p) for p in matches]
      raise InputError(f'{self.tag}.path = {self.path!r}: no file matches the pattern')
    raise InputError(f'{self.tag}.path = {self.path!r}: no such file or folder')


def _hidden(path: Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


class HuggingFace(Source):
  """A dataset of the Hugging Face Hub, or local `files` in a format of theirs (`name` 'json',
  'parquet', ...), read as a stream.

  Needs the extra `hf`. The cache knows a dataset of the Hub by its name and `revision` alone: give
  a commit there to be sure of its content. The first use reads it twice or three times, since the
  split and a learned vocabulary need to see it before."""

  name: str
  config: str | None = None
  split: str = 'train'
  revision: str | None = None
  files: tuple[str, ...] = ()
  text_field: str = 'text'
  max_documents: int | None = None

  def validate(self) -> None:
    self.require(
      self.max_documents is None or self.max_documents > 0, 'max_documents', 'positive or none'
    )

  def documents(self) -> Iterator[Document]:
    rows = enumerate(itertools.islice(self._open(), self.max_documents), 1)
    while True:
      try:
        number, row = next(rows)
      except StopIteration:
        return
      except Exception as e:
        raise self._failed(e) from e
      yield Document(
        f'{self.name}:{number}', text_of(row, self.text_field, f'{self.name} row {number}')
      )

  def _open(self) -> Any:
    try:
      import datasets  # ty: ignore[import-not-found]
    except ImportError:
      raise InputError(
        f"{self.tag}: needs the package 'datasets'; install the extra: pip install 'jaxformer[hf]'"
      ) from None
    try:
      return datasets.load_dataset(
        self.name,
        self.config,
        split=self.split,
        revision=self.revision,
        data_files=list(self.files) or None,
        streaming=True,
      )
    # the library raises many types for a name, a split or a connection that is wrong
    except Exception as e:
      raise self._failed(e) from e

  def _failed(self, error: Exception) -> InputError:
    reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
    return InputError(
      f'{self.tag}.name = {self.name!r} (config {self.config}, split {self.split}): {reason}'
    )

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    return config.to_json(self) | {'sha256': self.fingerprint(memo)}

  def fingerprint(self, memo: Path | None = None) -> str:
    local = [Path(f) for f in (self.name, *self.files)]
    files = [q for p in local for q in (sorted(p.rglob('*')) if p.is_dir() else [p]) if q.is_file()]
    return sha256(json.dumps(config.to_json(self)), *(f'{p} {file_sha256(p, memo)}' for p in files))


class Part(Config):
  """A source within a mixture and its share of the training sequences, relative to the other
  parts."""

  source: Source
  weight: float = 1.0

  def validate(self) -> None:
    self.require(0 < self.weight < float('inf'), 'weight', 'a positive number')
    self.require(
      not isinstance(self.source, Mixture),
      'source',
      'a plain source: list the parts of the inner mixture instead',
    )


class Mixture(Source):
  """Several sources at once: training sequences are taken from each in proportion to its weight,
  validation text from each in full. The shares are exact to 1 in 4096."""

  parts: tuple[Part, ...]

  def validate(self) -> None:
    self.require(0 < len(self.parts) <= 1024, 'parts', '1 to 1024 parts')

  def documents(self) -> Iterator[Document]:
    for part in self.parts:
      yield from part.source.documents()

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    return {
      'type': self.tag,
      'sha256': self.fingerprint(memo),
      'parts': [{'weight': p.weight, 'source': p.source.manifest(memo)} for p in self.parts],
    }

  def fingerprint(self, memo: Path | None = None) -> str:
    return sha256(self.tag, *(f'{p.weight} {p.source.fingerprint(memo)}' for p in self.parts))
