"""Where pairs of texts come from: two aligned files, tab-separated columns, JSON lines, Parquet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxformer import config
from jaxformer.config import Config, InputError
from jaxformer.data.readers import json_rows, parquet_rows, reading, text_lines, text_of
from jaxformer.data.storage import file_sha256, sha256


class Pair(NamedTuple):
  """A text, its translation, and the document that both are part of: '' where the corpus does not
  say."""

  source: str
  target: str
  document: str = ''


class PairCorpus(Config, abstract=True):
  """A parallel corpus: a finite sequence of pairs, the same on every pass."""

  files: ClassVar[tuple[str, ...]] = ('path',)  # the fields that name files

  def pairs(self) -> Iterator[Pair]:
    """Every pair, in order, read as they are asked for. Raises `InputError` for what cannot be
    read."""
    raise NotImplementedError

  def fingerprint(self, memo: Path | None = None) -> str:
    """A hash (hex) that changes when a pair does. `memo` is a folder that remembers the hashes of
    large files."""
    settings = {k: v for k, v in config.to_json(self).items() if k not in self.files}
    return sha256(
      repr(sorted(settings.items())), *(file_sha256(path, memo) for path in self._paths())
    )

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    """What a run records about the corpus, as JSON data."""
    files = [
      {'path': str(p.absolute()), 'sha256': file_sha256(p, memo), 'bytes': p.stat().st_size}
      for p in self._paths()
    ]
    return config.to_json(self) | {'sha256': self.fingerprint(memo), 'files': files}

  def _paths(self) -> list[Path]:
    paths = [Path(getattr(self, field)).expanduser() for field in self.files]
    for field, path in zip(self.files, paths, strict=True):
      self.require(path.is_file(), field, 'a file that exists')
    return paths


class TwoFiles(PairCorpus):
  """Two text files whose lines correspond: line n of one translates line n of the other. Files
  ending in .gz and .zst are decompressed. A line may be empty, which leaves its pair out; the
  number of lines must be the same."""

  files: ClassVar[tuple[str, ...]] = ('source_path', 'target_path')

  source_path: str
  target_path: str

  def pairs(self) -> Iterator[Pair]:
    source, target = self._paths()
    for count, (mine, other) in enumerate(itertools.zip_longest(_lines(source), _lines(target))):
      if mine is None or other is None:
        short, long = (source, target) if mine is None else (target, source)
        raise InputError(
          f'{self.tag}: {short} ends after {count:,} lines and {long} has '
          f'{sum(1 for _ in _lines(long)):,}: not aligned; '
          'line n of one file must be the translation of line n of the other'
        )
      yield Pair(mine, other)


def _lines(path: Path) -> Iterator[str]:
  with reading(path):
    for _, line in text_lines(path):
      yield line


class Tsv(PairCorpus):
  """A pair a line, in columns between tabs, counted from 1; there are no quotes and there is no
  line of headings. Lines that are blank are passed over; a line without one of the columns is an
  error. `document_column` says which pairs belong together."""

  path: str
  source_column: int = 1
  target_column: int = 2
  document_column: int | None = None

  def validate(self) -> None:
    self.require(self.source_column >= 1, 'source_column', 'at least 1')
    self.require(
      self.target_column >= 1 and self.target_column != self.source_column,
      'target_column',
      'at least 1 and not source_column',
    )
    self.require(
      self.document_column is None or self.document_column >= 1,
      'document_column',
      'at least 1, or none',
    )

  def pairs(self) -> Iterator[Pair]:
    (path,) = self._paths()
    document = self.document_column
    needed = max(self.source_column, self.target_column, document or 1)
    with reading(path):
      for number, line in text_lines(path):
        if not line.strip():
          continue
        columns = line.split('\t')
        if len(columns) < needed:
          raise InputError(
            f'{path}:{number}: {len(columns)} columns between tabs; column {needed} is asked for'
          )
        yield Pair(
          columns[self.source_column - 1],
          columns[self.target_column - 1],
          columns[document - 1] if document else '',
        )


class _Rows(PairCorpus, abstract=True):
  """A pair a row, its parts in fields with names."""

  path: str
  source_field: str = 'source'
  target_field: str = 'target'
  document_field: str | None = None

  def validate(self) -> None:
    self.require(
      self.source_field != self.target_field, 'target_field', 'another than source_field'
    )

  @property
  def _fields(self) -> dict[str, str]:
    names = {
      'source_field': self.source_field,
      'target_field': self.target_field,
      'document_field': self.document_field,
    }
    return {setting: name for setting, name in names.items() if name is not None}

  def _pair(self, row: dict[str, Any], where: str) -> Pair:
    return Pair(*(text_of(row, name, where, setting) for setting, name in self._fields.items()))


class JsonLines(_Rows):
  """A pair in every line, a JSON object with fields for the two texts and, with `document_field`,
  for what they are part of. Files ending in .gz and .zst are decompressed."""

  def pairs(self) -> Iterator[Pair]:
    (path,) = self._paths()
    with reading(path):
      for number, row in json_rows(path):
        yield self._pair(row, f'{path}:{number}')


class Parquet(_Rows):
  """A pair in every row of a Parquet file, in columns named as the fields of `JsonLines`."""

  def pairs(self) -> Iterator[Pair]:
    (path,) = self._paths()
    with reading(path):
      for number, row in parquet_rows(path, self._fields):
        yield self._pair(row, f'{path} row {number}')
