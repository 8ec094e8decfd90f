"""Files of text as documents: plain text, JSON lines, Parquet; gzip and Zstandard around the first
two."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxformer.config import InputError

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 1024
ACCEPTED = (
  'text (.txt, .md, .py, ...), .jsonl, .json (JSON lines), each also with .gz or .zst, or .parquet'
)


class Document(NamedTuple):
  """One text and where it came from."""

  name: str
  text: str


def read_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
  """The documents of one file, named after `name`. A text file is one document, a JSON line or a
  Parquet row is one each.

  Memory holds one document (of Parquet: one batch of rows) at a time. Raises `InputError` that
  names the file and the place in it."""
  with reading(path):
    yield from _read(path, name, text_field)


def _read(path: Path, name: str, text_field: str) -> Iterator[Document]:
  suffixes = [s.lower() for s in path.suffixes]
  if suffixes[-1:] == ['.parquet']:
    yield from _parquet(path, name, text_field)
    return
  kind = (
    suffixes[-2]
    if len(suffixes) > 1 and suffixes[-1] in ('.gz', '.zst')
    else (suffixes or [''])[-1]
  )
  if kind in ('.jsonl', '.json', '.ndjson'):
    yield from _json_lines(path, name, text_field)
  else:
    yield Document(name, _decode(b''.join(_text_chunks(path)), str(path)))


def _chunks(path: Path) -> Iterator[bytes]:
  """The bytes of a file, decompressed."""
  suffix = path.suffix.lower()
  if suffix == '.zst':
    yield from _zstandard(path)
    return
  with gzip.open(path, 'rb') if suffix == '.gz' else open(path, 'rb') as file:
    while chunk := file.read(CHUNK_BYTES):
      yield chunk


def _zstandard(path: Path) -> Iterator[bytes]:
  # The library's stream reader ends silently where a frame is cut off; the frame object knows
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
  first = True
  for chunk in _chunks(path):
    if first and b'\0' in chunk[:8192]:
      raise InputError(
        f'{path}: not text (a zero byte at offset {chunk.index(0)}); accepted: {ACCEPTED}'
      )
    first = False
    yield chunk


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise InputError(
      f'{where}: not valid UTF-8 at byte offset {e.start} (byte 0x{data[e.start]:02x})'
    ) from None


def _lines(path: Path) -> Iterator[bytes]:
  rest = b''
  for chunk in _chunks(path):
    *lines, rest = (rest + chunk).split(b'\n')
    yield from lines
  if rest:
    yield rest


def _json_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
  for number, row in json_rows(path):
    yield Document(f'{name}:{number}', text_of(row, text_field, f'{path}:{number}'))


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """The objects of a file of JSON lines, each with the number of its line from 1; blank lines are
  passed over."""
  for number, text in text_lines(path):
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
    yield number, row


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
  """The lines of a file, decompressed, each with its number from 1 and without its end; a byte
  order mark is left out."""
  start = 0
  for number, line in enumerate(_lines(path), 1):
    try:
      yield number, line.decode('utf-8-sig' if number == 1 else 'utf-8').removesuffix('\r')
    except UnicodeDecodeError as e:
      where = f'{path}:{number}'
      raise InputError(
        f'{where}: not valid UTF-8 at byte offset {start + e.start} (byte 0x{line[e.start]:02x})'
      ) from None
    start += len(line) + 1


def text_of(row: dict[str, Any], text_field: str, where: str, setting: str = 'text_field') -> str:
  """The text in a row. Raises `InputError` that names the row's fields where `text_field` is none
  of them or holds no text, and the `setting` that chose it."""
  if text_field not in row:
    raise _missing(text_field, list(row), where, setting)
  value = row[text_field]
  if not isinstance(value, str):
    raise InputError(
      f'{where}: field {text_field!r} holds a {type(value).__name__}; {setting} must name a field '
      'that holds text'
    )
  if not value.isascii():
    try:
      value.encode()
    except UnicodeEncodeError as e:
      raise InputError(
        f'{where}: field {text_field!r} holds half a surrogate pair at character {e.start}'
      ) from None
  return value


def _missing(text_field: str, fields: list[str], where: str, setting: str) -> InputError:
  shown = ', '.join(fields[:24]) + (', ...' if len(fields) > 24 else '') if fields else 'none'
  return InputError(f'{where}: no field {text_field!r} ({setting}); fields there: {shown}')


def _parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
  for number, row in parquet_rows(path, {'text_field': text_field}):
    yield Document(f'{name}:{number}', text_of(row, text_field, f'{path} row {number}'))


def parquet_rows(path: Path, fields: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
  """Some fields (by the settings that chose them) of the rows of a Parquet file, each row with its
  number from 1."""
  import pyarrow as arrow
  import pyarrow.parquet as parquet

  try:
    with parquet.ParquetFile(path) as file:
      schema = file.schema_arrow
      for setting, field in fields.items():
        if field not in schema.names:
          raise _missing(field, schema.names, str(path), setting)
      number = 0
      for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=sorted(set(fields.values()))):
        for row in batch.to_pylist():
          number += 1
          yield number, row
  except arrow.ArrowException as e:
    raise InputError(f'{path}: cannot be read as Parquet ({str(e).splitlines()[0]})') from None


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
  """Within, failures of the operating system or of decompression become an `InputError` that names
  the file."""
  try:
    yield
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f'{path}: cannot be read ({getattr(e, "strerror", None) or e})') from None
