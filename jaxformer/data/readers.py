"""Read files: text, lines, JSON lines and Parquet; the first three also compressed by gzip or
Zstandard."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxformer.config import InputError

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 1024
ACCEPTED = (
  'text (.txt, .md, .py, ...), .jsonl, .json (JSON lines), each also with .gz or .zst, or .parquet'
)


def read_text(path: Path) -> str:
  """Return the text of a file. Raises `InputError` for what is not UTF-8 text."""
  with reading(path):
    return _decode(b''.join(_text_chunks(path)), str(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Yield the lines of a file, without their ends, each with its number from 1; a byte order mark
  is left out."""
  start = 0
  with reading(path):
    for number, line in enumerate(_lines(path), 1):
      encoding = 'utf-8-sig' if number == 1 else 'utf-8'
      yield number, _decode(line, f'{path}:{number}', start, encoding).removesuffix('\r')
      start += len(line) + 1


def has_records(path: Path) -> bool:
  """Whether a file holds records by its name: JSON lines or Parquet."""
  return _kind(path) in ('.jsonl', '.json', '.ndjson', '.parquet')


def read_records(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
  """Yield the texts in some fields of each row of a Parquet file or of JSON lines.

  Args:
    fields: the name of each field by the setting that chose it, for messages.

  Memory holds one line, or one batch of Parquet rows, at a time. Raises `InputError` that names the
  file and the row.
  """
  rows = _parquet_rows if _kind(path) == '.parquet' else _json_rows
  with reading(path):
    for where, row in rows(path, fields):
      yield tuple(text_of(row, name, where, setting) for setting, name in fields.items())


def text_of(row: Mapping[str, Any], field: str, where: str, setting: str) -> str:
  """Return the text in a field of a row. Raises `InputError` that names the fields of the row where
  there is no such field or no text in it."""
  if field not in row:
    raise _missing(field, list(row), where, setting)
  value = row[field]
  if not isinstance(value, str):
    raise InputError(
      f'{where}: field {field!r} holds a {type(value).__name__}; {setting} must name a text field'
    )
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as e:
      raise InputError(
        f'{where}: field {field!r} holds half a surrogate pair at character {e.start}'
      ) from None
  return value


def _missing(field: str, fields: list[str], where: str, setting: str) -> InputError:
  shown = ', '.join(fields[:24]) + (', ...' if len(fields) > 24 else '') if fields else 'none'
  return InputError(f'{where}: no field {field!r} ({setting}); fields there: {shown}')


def _kind(path: Path) -> str:
  """The suffix that says what a file holds, without that of the compression."""
  suffixes = [s.lower() for s in path.suffixes]
  if suffixes[-1:] in (['.gz'], ['.zst']):
    suffixes.pop()
  return suffixes[-1] if suffixes else ''


def _json_rows(path: Path, _: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield the objects of JSON lines, each with its place in the file; blank lines are skipped."""
  for number, text in read_lines(path):
    where = f'{path}:{number}'
    if not text.strip():
      continue
    try:
      row = json.loads(text)
    except (ValueError, RecursionError) as e:
      raise InputError(
        f'{where}: not valid JSON ({e}); every line must be one JSON object'
      ) from None
    if not isinstance(row, dict):
      raise InputError(f'{where}: a JSON {type(row).__name__}; every line must be one JSON object')
    yield where, row


def _parquet_rows(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yield some fields of the rows of a Parquet file, each row with its place in the file."""
  import pyarrow as arrow
  import pyarrow.parquet as parquet

  try:
    with parquet.ParquetFile(path) as file:
      schema, number = file.schema_arrow, 0
      for setting, field in fields.items():
        if field not in schema.names:
          raise _missing(field, schema.names, str(path), setting)
      for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=sorted(set(fields.values()))):
        for row in batch.to_pylist():
          number += 1
          yield f'{path} row {number}', row
  except arrow.ArrowException as e:
    raise InputError(f'{path}: cannot be read as Parquet ({str(e).splitlines()[0]})') from None


# ---- bytes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
  """Turn errors of the operating system and of decompression into an `InputError` that names the
  file."""
  try:
    yield
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f'{path}: cannot be read ({getattr(e, "strerror", None) or e})') from None


def _chunks(path: Path) -> Iterator[bytes]:
  """Yield the bytes of a file, decompressed."""
  suffix = path.suffix.lower()
  if suffix == '.zst':
    yield from _zstandard(path)
    return
  with gzip.open(path, 'rb') if suffix == '.gz' else open(path, 'rb') as file:
    while chunk := file.read(CHUNK_BYTES):
      yield chunk


def _zstandard(path: Path) -> Iterator[bytes]:
  # The stream reader of the library ends silently where a frame is cut off; the frame object knows
  # whether it reached its end.
  import zstandard

  frame: Any = None
  with open(path, 'rb') as file:
    while data := file.read(CHUNK_BYTES):
      while data:
        frame = zstandard.ZstdDecompressor().decompressobj() if frame is None else frame
        try:
          yield frame.decompress(data)
        except zstandard.ZstdError as e:
          raise InputError(f'{path}: cannot be read ({e})') from None
        data = frame.unused_data if frame.eof else b''
        frame = None if frame.eof else frame
  if frame is not None:
    raise InputError(f'{path}: cannot be read (the compressed data is cut off)')


def _text_chunks(path: Path) -> Iterator[bytes]:
  for i, chunk in enumerate(_chunks(path)):
    if i == 0 and b'\0' in chunk[:8192]:
      raise InputError(
        f'{path}: not text (a zero byte at offset {chunk.index(0)}); accepted: {ACCEPTED}'
      )
    yield chunk


def _lines(path: Path) -> Iterator[bytes]:
  rest = b''
  for chunk in _chunks(path):
    *lines, rest = (rest + chunk).split(b'\n')
    yield from lines
  if rest:
    yield rest


def _decode(data: bytes, where: str, start: int = 0, encoding: str = 'utf-8') -> str:
  try:
    return data.decode(encoding)
  except UnicodeDecodeError as e:
    raise InputError(
      f'{where}: not valid UTF-8 at byte offset {start + e.start} (byte 0x{data[e.start]:02x})'
    ) from None
