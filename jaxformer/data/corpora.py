"""Corpora: finite sequences of rows with one text column, or two (a source and its translation).

A corpus is a config that yields rows, and a hash of its content by which caches are found."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data.cache_folder import file_sha256, sha256
from jaxformer.data.missing import Missing
from jaxformer.data.readers import has_records, read_lines, read_records, read_text, text_of

# Tests, packages of others, a copy of `PydocTopics`, and build settings that name the machine they
# were made on.
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


class Row(NamedTuple):
  """Texts, one per column, and the document that the row is part of, '' where the corpus names
  none: a split keeps rows of one document together."""

  texts: tuple[str, ...]
  document: str = ''


class Corpus(Config, abstract=True):
  """A finite sequence of rows, the same on every pass."""

  columns: ClassVar[int] = 1
  path_fields: ClassVar[tuple[str, ...]] = ('path',)  # fields that say where files are

  def rows(self) -> Iterator[Row]:
    """Yield every row, in order, reading as it goes. Raises `InputError` for what cannot be
    read."""
    raise NotImplementedError

  def files(self) -> dict[str, Path]:
    """Return the files whose content the rows depend on, by the names that they have in it."""
    paths = {field: Path(getattr(self, field)).expanduser() for field in self.path_fields}
    for field, path in paths.items():
      self.require(path.is_file(), field, 'a file that exists')
    return paths

  def missing(self) -> Missing | None:
    """Return what the corpus stands for where it cannot be read; None for one that can."""
    return None

  def parts(self) -> tuple[Corpus, ...]:
    """Return the corpora of a mixture; another corpus is its own single part."""
    return (self,)

  def part_weights(self) -> tuple[float, ...]:
    """Return the share of each part of the training sequences, relative to the others."""
    return (1.0,) * len(self.parts())

  def fingerprint(self, memo: Path | None = None) -> str:
    """Return a hash (hex) that changes when a row does.

    Args:
      memo: folder in which hashes of large files are remembered.
    """
    settings = {k: v for k, v in config.to_json(self).items() if k not in self.path_fields}
    hashed = (f'{name} {file_sha256(path, memo)}' for name, path in self.files().items())
    return sha256(repr(sorted(settings.items())), *hashed)

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    """Return what a run records about the corpus, as JSON data: its settings, `sha256` (the
    fingerprint) and its files."""
    files = [
      {
        'name': name,
        'path': str(path.absolute()),
        'bytes': path.stat().st_size,
        'sha256': file_sha256(path, memo),
      }
      for name, path in self.files().items()
    ]
    total = sum(int(f['bytes']) for f in files)
    return config.to_json(self) | {'bytes': total, 'sha256': self.fingerprint(memo), 'files': files}

  def check_cache(self, folder: Path) -> None:
    """Raise `InputError` where a cache in this folder would become part of the corpus."""


# ---- corpora of one column ---------------------------------------------------------------------


class StandardLibrary(Corpus):
  """Source files of the Python standard library, without its tests: always available, about 11 MB,
  one row per file.

  With `max_bytes`, files are taken in the order of a hash of their paths until that many bytes are
  reached, and the last is cut at the end of a line."""

  max_bytes: int | None = None

  def validate(self) -> None:
    self.require_positive('max_bytes')

  def rows(self) -> Iterator[Row]:
    files = self.files()
    sizes = {name: path.stat().st_size for name, path in files.items()}
    excess = 0 if self.max_bytes is None else sum(sizes.values()) - self.max_bytes
    last = max(files, key=_name_hash)
    for name, path in files.items():
      try:
        with tokenize.open(path) as file:
          text = file.read()
      except (OSError, SyntaxError, UnicodeDecodeError) as e:
        raise InputError(f'{path}: cannot be read ({e})') from None
      cut = name == last and excess > 0
      yield Row((_head(text, sizes[name] - excess) if cut else text,))

  def files(self) -> dict[str, Path]:
    root = Path(sysconfig.get_paths()['stdlib'])
    names = []
    for folder, folders, files in os.walk(root):
      folders[:] = sorted(set(folders) - NOT_LIBRARY)
      own = [f for f in files if f.endswith('.py') and not f.startswith(MACHINE_PREFIX)]
      names += [Path(folder, f).relative_to(root).as_posix() for f in own]
    if not names:
      raise InputError(f'{self.tag}: this Python has no source files under {root}; use Files')
    left = math.inf if self.max_bytes is None else self.max_bytes
    taken = {}
    for name in sorted(names, key=_name_hash):
      if left <= 0:
        break
      taken[name] = root / name
      left -= taken[name].stat().st_size
    return dict(sorted(taken.items()))

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    found = super().manifest(memo)
    used = min(found['bytes'], self.max_bytes or found['bytes'])
    return found | {'bytes': used, 'python': sys.version.split()[0]}


def _name_hash(name: str) -> bytes:
  return hashlib.sha256(name.encode()).digest()


def _head(text: str, limit: int) -> str:
  """Return the longest beginning of at most `limit` bytes that ends with a line, or just the
  beginning where no line is that short."""
  head = text.encode()[:limit].decode(errors='ignore')
  return head[: head.rfind('\n') + 1] or head


class PydocTopics(Corpus):
  """The prose of the Python language reference that `help()` shows: always available, about half a
  megabyte, one row per topic."""

  def rows(self) -> Iterator[Row]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
      yield Row((topics[name],))

  def files(self) -> dict[str, Path]:
    from pydoc_data import topics

    return {'topics': Path(topics.__file__)}


class Files(Corpus):
  """A file, a folder with everything below it except hidden files, or a pattern such as
  `notes/**/*.md`.

  A text file is one row; a JSON line or a Parquet row is one row, its text in `text_field`. Files
  ending in .gz and .zst are decompressed. A text file is held in memory while it is read."""

  path: str
  text_field: str = 'text'

  def rows(self) -> Iterator[Row]:
    for path in self.files().values():
      if has_records(path):
        yield from map(Row, read_records(path, {'text_field': self.text_field}))
      else:
        yield Row((read_text(path),))

  def check_cache(self, folder: Path) -> None:
    root, folder = Path(self.path).expanduser().resolve(), folder.resolve()
    if root.is_dir() and folder.is_relative_to(root) and not _hidden(folder.relative_to(root)):
      raise self._wrong(
        f'contains the cache folder {folder}; set JAXFORMER_CACHE to a folder outside'
      )

  def files(self) -> dict[str, Path]:
    root = Path(self.path).expanduser()
    try:
      if root.is_dir():
        below = [p for p in sorted(root.rglob('*')) if p.is_file()]
        found = [p for p in below if not _hidden(p.relative_to(root))]
        if not found:
          raise self._wrong('the folder holds no files')
        return {p.relative_to(root).as_posix(): p for p in found}
      if root.exists():
        return {root.name: root}
    except OSError as e:
      raise self._wrong(f'cannot be read ({e.strerror})') from None
    if not glob.has_magic(self.path):
      raise self._wrong('no such file or folder')
    matches = [p for p in map(Path, sorted(glob.glob(str(root), recursive=True))) if p.is_file()]
    if not matches:
      raise self._wrong('no file matches the pattern')
    common = Path(os.path.commonpath([p.parent for p in matches]))
    return {p.relative_to(common).as_posix(): p for p in matches}

  def _wrong(self, problem: str) -> InputError:
    return InputError(f'{self.tag}.path', self.path, problem=problem)


def _hidden(path: Path) -> bool:
  return any(part.startswith('.') for part in path.parts)


class HuggingFace(Corpus):
  """A dataset of the Hugging Face Hub, or local `files` in one of its formats (`name` 'json',
  'parquet', ...), read as a stream.

  Needs the extra `hf`. The cache identifies a dataset of the Hub by its name and `revision` alone:
  give a commit to be sure of its content. The first use reads it twice, or three times where a
  tokenizer is trained on it."""

  path_fields: ClassVar[tuple[str, ...]] = ()

  name: str
  config: str | None = None
  split: str = 'train'
  revision: str | None = None
  data_files: tuple[str, ...] = ()
  text_field: str = 'text'
  max_documents: int | None = None

  def validate(self) -> None:
    self.require_positive('max_documents')

  def rows(self) -> Iterator[Row]:
    try:
      for number, row in enumerate(itertools.islice(self._open(), self.max_documents), 1):
        yield Row((text_of(row, self.text_field, f'{self.name} row {number}', 'text_field'),))
    except InputError:
      raise
    # The library raises many types for a wrong name or split and for a lost connection.
    except Exception as e:
      reason = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'
      raise InputError(
        f'{self.tag}.name = {self.name!r} (config {self.config}, split {self.split}): {reason}'
      ) from e

  def files(self) -> dict[str, Path]:
    local = [Path(f) for f in (self.name, *self.data_files)]
    files = [q for p in local for q in (sorted(p.rglob('*')) if p.is_dir() else [p]) if q.is_file()]
    return {str(path): path for path in files}

  def _open(self) -> Any:
    try:
      import datasets  # ty: ignore[import-not-found]
    except ImportError:
      raise InputError(
        f"{self.tag}: needs the package 'datasets'; install the extra: pip install 'jaxformer[hf]'"
      ) from None
    return datasets.load_dataset(
      self.name,
      self.config,
      split=self.split,
      revision=self.revision,
      data_files=list(self.data_files) or None,
      streaming=True,
    )


class Mixture(Corpus):
  """Several corpora: training sequences are taken from each in proportion to its weight, validation
  text from each in full. The shares are exact to 1 in 4096.

  Attributes:
    weights: of the corpora, relative to each other; None for equal ones.
  """

  corpora: tuple[Corpus, ...]
  weights: tuple[float, ...] | None = None

  def validate(self) -> None:
    self.require(0 < len(self.corpora) <= 1024, 'corpora', '1 to 1024 corpora')
    for corpus in self.corpora:
      self.require(corpus.parts() == (corpus,), 'corpora', 'corpora other than mixtures')
      self.require(corpus.columns == 1, 'corpora', 'corpora of one text per row')
    weights = self.part_weights()
    positive = all(0 < w < float('inf') for w in weights)
    self.require(
      positive and len(weights) == len(self.corpora), 'weights', 'a positive number per corpus'
    )

  def missing(self) -> Missing | None:
    return next(filter(None, (c.missing() for c in self.corpora)), None)

  def parts(self) -> tuple[Corpus, ...]:
    return self.corpora

  def part_weights(self) -> tuple[float, ...]:
    return super().part_weights() if self.weights is None else self.weights

  def rows(self) -> Iterator[Row]:
    for corpus in self.corpora:
      yield from corpus.rows()

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    parts = [
      {'weight': weight, 'corpus': corpus.manifest(memo)}
      for weight, corpus in zip(self.part_weights(), self.corpora, strict=True)
    ]
    return {'type': self.tag, 'sha256': self.fingerprint(memo), 'parts': parts}

  def fingerprint(self, memo: Path | None = None) -> str:
    parts = zip(self.part_weights(), self.corpora, strict=True)
    return sha256(self.tag, *(f'{weight} {corpus.fingerprint(memo)}' for weight, corpus in parts))


# ---- corpora of two columns --------------------------------------------------------------------


class TwoFiles(Corpus):
  """Two text files whose lines correspond: line n of one translates line n of the other. Files
  ending in .gz and .zst are decompressed. A line may be empty, which leaves its pair out; the
  number of lines must be the same."""

  columns: ClassVar[int] = 2
  path_fields: ClassVar[tuple[str, ...]] = ('source_path', 'target_path')

  source_path: str
  target_path: str

  def rows(self) -> Iterator[Row]:
    source, target = self.files().values()
    lines = itertools.zip_longest(read_lines(source), read_lines(target))
    for count, (first, second) in enumerate(lines):
      if first is None or second is None:
        short, long = (source, target) if first is None else (target, source)
        raise InputError(
          f'{self.tag}: {short} ends after {count:,} lines and {long} has '
          f'{sum(1 for _ in read_lines(long)):,}: not aligned; '
          'line n of one file must be the translation of line n of the other'
        )
      yield Row((first[1], second[1]))


class Tsv(Corpus):
  """One pair per line, in columns separated by tabs and counted from 1, without quotes or a header
  line. Blank lines are skipped; a line without one of the columns is an error. `document_column`
  says which pairs belong together."""

  columns: ClassVar[int] = 2

  path: str
  source_column: int = 1
  target_column: int = 2
  document_column: int | None = None

  def validate(self) -> None:
    self.require_positive('source_column', 'target_column', 'document_column')
    self.require(
      self.target_column != self.source_column, 'target_column', 'a column other than source_column'
    )

  def rows(self) -> Iterator[Row]:
    (path,) = self.files().values()
    source, target, document = self.source_column, self.target_column, self.document_column
    needed = max(source, target, document or 1)
    for number, line in read_lines(path):
      if not line.strip():
        continue
      columns = line.split('\t')
      if len(columns) < needed:
        raise InputError(f'{path}:{number}: {len(columns)} columns; must have {needed}')
      texts = columns[source - 1], columns[target - 1]
      yield Row(texts, columns[document - 1] if document else '')


class Records(Corpus):
  """One pair per row of a Parquet file, or per line of JSON lines (also with .gz or .zst), in named
  fields. With `document_field`, pairs of one document stay together."""

  columns: ClassVar[int] = 2

  path: str
  source_field: str = 'source'
  target_field: str = 'target'
  document_field: str | None = None

  def validate(self) -> None:
    self.require(
      self.source_field != self.target_field, 'target_field', 'a field other than source_field'
    )

  def rows(self) -> Iterator[Row]:
    (path,) = self.files().values()
    names = ('source_field', 'target_field', 'document_field')
    fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    for source, target, *document in read_records(path, fields):
      yield Row((source, target), *document)
