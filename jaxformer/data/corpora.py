"""Corpora: finite sequences of rows of text. Those with two columns, a source and its translation,
are in `parallel_corpora.py`.

A corpus is a config that yields rows, and a hash of its content by which caches are found."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

from jaxformer import config
from jaxformer.code_record import without_paths
from jaxformer.config import Config, InputError
from jaxformer.data.cache_folder import file_sha256, sha256
from jaxformer.data.folders import (
  EVERY_LEVEL,
  Unusable,
  divided,
  files_below,
  files_of_pattern,
  holds,
)
from jaxformer.data.missing import Missing
from jaxformer.data.readers import has_records, read_records, text_parts
from jaxformer.files import user_path

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


CACHE_INSIDE = 'contains the cache folder {}; set JAXFORMER_CACHE to a folder outside'
OnBadRow = Literal['error', 'skip']


class Row(NamedTuple):
  """A row of a corpus, or a part of a long row.

  Attributes:
    texts: one per column.
    document: that the row is part of, '' where the corpus names none: a split keeps rows of one
      document together.
    ends: False where the next row continues the text of this one (of corpora of one column that
      name no documents), so that a long text need not be in memory as one.
    problem: of a row that cannot be used and that the corpus is to skip: what is wrong, with its
      place. It has no texts.
  """

  texts: tuple[str, ...]
  document: str = ''
  ends: bool = True
  problem: str = ''


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
    paths = {f: user_path(getattr(self, f), f'{self.tag}.{f}') for f in self.path_fields}
    for field, path in paths.items():
      try:
        found = path.is_file()
      except OSError as e:
        problem = f'cannot be read ({e.strerror})'
        raise InputError(f'{self.tag}.{field}', getattr(self, field), problem=problem) from None
      self.require(found, field, 'a file that exists')
    return paths

  @property
  def named(self) -> str:
    """The type and where the files are, by which a message tells the corpora of a mixture apart."""
    return ' '.join([self.tag, *(str(v) for f, v in vars(self).items() if f in self.path_fields)])

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
    hashed = (f'{name} {file_sha256(path, memo)}' for name, path in self.files().items())
    return sha256(repr(sorted(self.deciding_settings().items())), *hashed)

  def deciding_settings(self) -> dict[str, Any]:
    """Return what else the rows depend on, as JSON data: the settings other than where files are,
    and the content of the code of a corpus from outside the package."""
    settings = without_paths(config.to_json(self))
    return {k: v for k, v in settings.items() if k not in self.path_fields}

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

  def usable(
    self, found: Iterable[tuple[str, ...] | InputError], on_bad_row: OnBadRow
  ) -> Iterator[Row]:
    """Yield rows whose columns were read, the last one the document where there are more than the
    corpus has; of one that could not be read its problem, or with 'error' raise it."""
    for texts in found:
      if not isinstance(texts, InputError):
        yield Row(texts[: self.columns], document=''.join(texts[self.columns :]))
      elif on_bad_row == 'error':
        raise InputError(f'{texts} ({self.tag}.on_bad_row = skip leaves such rows out)')
      else:
        yield Row((), problem=str(texts))


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
  ending in .gz and .zst are decompressed. Links are followed; a folder that cannot be read, a link
  that leads nowhere and what is neither a file nor a folder are errors (see `folders.py`). Memory
  holds a part of a text file at a time, but the whole of a JSON line or Parquet row.

  Attributes:
    on_bad_row: whether a JSON line or Parquet row without text in `text_field` (missing, null, of
      another type, not valid) is an error, or skipped and counted.
  """

  path: str
  text_field: str = 'text'
  on_bad_row: OnBadRow = 'error'

  def rows(self) -> Iterator[Row]:
    for path in self.files().values():
      if has_records(path):
        yield from self.usable(read_records(path, {'text_field': self.text_field}), self.on_bad_row)
      else:
        yield from in_parts(text_parts(path))

  def check_cache(self, folder: Path) -> None:
    root = user_path(self.path, f'{self.tag}.path')
    try:
      if not root.is_dir() and glob.has_magic(self.path):
        root, parts = divided(str(root))
        root = root if EVERY_LEVEL in parts else Path(os.devnull)
      inside = holds(root, folder)
    except (OSError, Unusable) as e:
      raise self._wrong(getattr(e, 'strerror', None) or str(e)) from None
    if inside:
      raise self._wrong(CACHE_INSIDE.format(folder.resolve()))

  def files(self) -> dict[str, Path]:
    root = user_path(self.path, f'{self.tag}.path')
    try:
      if root.is_dir():
        return files_below(root) or self._none('the folder holds no files')
      if root.exists():
        return {root.name: root} if root.is_file() else self._none('is neither a file nor a folder')
      if not glob.has_magic(self.path):
        return self._none('no such file or folder')
      return files_of_pattern(str(root)) or self._none('no file matches the pattern')
    except Unusable as e:
      raise self._wrong(str(e)) from None
    except OSError as e:
      raise self._wrong(f'cannot be read ({e.strerror})') from None

  def _none(self, problem: str) -> NoReturn:
    raise self._wrong(problem)

  def _wrong(self, problem: str) -> InputError:
    return InputError(f'{self.tag}.path', self.path, problem=problem)


def in_parts(texts: Iterator[str]) -> Iterator[Row]:
  """Yield the parts of a text as those of one row; no parts are a row without text."""
  text = next(texts, '')
  while (following := next(texts, None)) is not None:
    yield Row((text,), ends=False)
    text = following
  yield Row((text,))


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
