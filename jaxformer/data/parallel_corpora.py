"""Corpora of two columns: a source and its translation."""

import itertools
from collections.abc import Iterator
from typing import ClassVar

from jaxformer.config import InputError
from jaxformer.data.corpora import Corpus, OnBadRow, Row
from jaxformer.data.readers import BYTE_ORDER_MARK, read_lines, read_records


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
  line. Blank lines are skipped. `document_column` says which pairs belong together.

  Attributes:
    on_bad_row: whether a line without one of the columns is an error, or skipped and counted.
  """

  columns: ClassVar[int] = 2

  path: str
  source_column: int = 1
  target_column: int = 2
  document_column: int | None = None
  on_bad_row: OnBadRow = 'error'

  def validate(self) -> None:
    self.require_positive('source_column', 'target_column', 'document_column')
    self.require(
      self.target_column != self.source_column, 'target_column', 'a column other than source_column'
    )

  def rows(self) -> Iterator[Row]:
    return self.usable(self._lines(), self.on_bad_row)

  def _lines(self) -> Iterator[tuple[str, ...] | InputError]:
    (path,) = self.files().values()
    used = [self.source_column, self.target_column]
    used += [] if self.document_column is None else [self.document_column]
    for number, line in read_lines(path):
      if not line.strip():
        continue
      columns = line.split('\t')
      if len(columns) < max(used):
        yield InputError(f'{path}:{number}: {len(columns)} columns; must have {max(used)}')
      else:
        yield tuple(columns[c - 1].removeprefix(BYTE_ORDER_MARK) for c in used)


class Records(Corpus):
  """One pair per row of a Parquet file, or per line of JSON lines (also with .gz or .zst), in named
  fields. With `document_field`, pairs of one document stay together.

  Attributes:
    on_bad_row: whether a row without text in one of the fields is an error, or skipped and counted.
  """

  columns: ClassVar[int] = 2

  path: str
  source_field: str = 'source'
  target_field: str = 'target'
  document_field: str | None = None
  on_bad_row: OnBadRow = 'error'

  def validate(self) -> None:
    self.require(
      self.source_field != self.target_field, 'target_field', 'a field other than source_field'
    )

  def rows(self) -> Iterator[Row]:
    (path,) = self.files().values()
    names = ('source_field', 'target_field', 'document_field')
    fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    return self.usable(read_records(path, fields), self.on_bad_row)
