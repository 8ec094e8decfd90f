"""Read files: text, lines, JSON lines and Parquet; the first three also compressed by gzip or
Zstandard.

Text is UTF-8, or UTF-16 or UTF-32 that begin with a byte order mark. A byte order mark at the start
of a file or of a text is left out. Memory holds a chunk of a text file, one line of the others and
about 16 MB of Parquet rows, however large the file is; of Zstandard also its window.
"""

import codecs
import contextlib
import gzip
import itertools
import json
import stat
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxformer.config import InputError

CHUNK_BYTES = PART_CHARACTERS = 1 << 20
# Four bytes of Zstandard can stand for 128 KiB, so it is decompressed in parts of 16 MB at most.
ZSTANDARD_BYTES = 1 << 9
ZSTANDARD_WINDOW = 1 << 31  # the largest of the format, that of `zstd --long=31`
PARQUET_ROWS, PARQUET_BYTES = 1024, 16 << 20
ACCEPTED = (
  'text (.txt, .md, .py, ...), .jsonl, .json (JSON lines), each also with .gz or .zst, or '
  '.parquet; UTF-8, or UTF-16 and UTF-32 with a byte order mark'
)
BYTE_ORDER_MARK = '\ufeff'
# UTF-32 first: its mark in little-endian order begins with that of UTF-16.
MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32-le', 'UTF-32'),
  (codecs.BOM_UTF32_BE, 'utf-32-be', 'UTF-32'),
  (codecs.BOM_UTF8, None, 'UTF-8'),
  (codecs.BOM_UTF16_LE, 'utf-16-le', 'UTF-16'),
  (codecs.BOM_UTF16_BE, 'utf-16-be', 'UTF-16'),
)
Found = tuple[str, dict[str, Any] | InputError]  # the place of a row, and the row or its fault


def read_text(path: Path) -> str:
  """Return the text of a file. Raises `InputError` for what is not text."""
  return ''.join(text_parts(path))


def text_parts(path: Path) -> Iterator[str]:
  """Yield the text of a file in parts of about `PART_CHARACTERS`, none of them empty. Raises
  `InputError` for what is not text."""
  waiting: list[str] = []
  with reading(path):
    for text in _decoded(_text_chunks(path), str(path), 'utf-8', 'UTF-8'):
      waiting.append(text)
      if sum(map(len, waiting)) >= PART_CHARACTERS:
        yield ''.join(waiting)
        waiting = []
  if waiting:
    yield ''.join(waiting)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
  """Yield the lines of a text file, without their ends (LF or CR LF), each with its number from
  1. Raises `InputError` for what is not text, also for lines that end in CR alone."""
  with reading(path):
    number, line = 0, ''
    for number, line in _lines(_text_chunks(path), path):
      if isinstance(line, InputError):
        raise line
      yield number, line
    if number == 1 and '\r' in line:
      raise InputError(f'{path}: its lines end in CR alone; accepted: LF, or CR LF')


def has_records(path: Path) -> bool:
  """Whether a file holds records by its name: JSON lines or Parquet."""
  return _kind(path) in ('.jsonl', '.json', '.ndjson', '.parquet')


def read_records(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[str, ...] | InputError]:
  """Yield the texts in some fields of each row of a Parquet file or of JSON lines; of a row that
  has them not, the `InputError` that names the file, the row and what is wrong.

  Args:
    fields: the name of each field by the setting that chose it, for messages.

  Raises `InputError` for a file that cannot be read.
  """
  rows = _parquet_rows if _kind(path) == '.parquet' else _json_rows
  with reading(path):
    for where, row in rows(path, fields):
      if isinstance(row, InputError):
        yield row
        continue
      try:
        texts = tuple(text_of(row, name, where, setting) for setting, name in fields.items())
      except InputError as e:
        yield e
      else:
        yield texts


def text_of(row: Mapping[str, Any], field: str, where: str, setting: str) -> str:
  """Return the text in a field of a row. Raises `InputError` that names the fields of the row where
  there is no such field or no text in it."""
  if field not in row:
    raise _missing(field, list(row), where, setting)
  value = row[field]
  if value is None:
    raise InputError(f'{where}: field {field!r} is null; {setting} must name a text field')
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
  return value.removeprefix(BYTE_ORDER_MARK)


def _missing(field: str, fields: list[str], where: str, setting: str) -> InputError:
  shown = ', '.join(fields[:24]) + (', ...' if len(fields) > 24 else '') if fields else 'none'
  return InputError(f'{where}: no field {field!r} ({setting}); fields there: {shown}')


def _kind(path: Path) -> str:
  """The suffix that says what a file holds, without that of the compression."""
  suffixes = [s.lower() for s in path.suffixes]
  if suffixes[-1:] in (['.gz'], ['.zst']):
    suffixes.pop()
  return suffixes[-1] if suffixes else ''


def _json_rows(path: Path, _: Mapping[str, str]) -> Iterator[Found]:
  """Yield the objects of JSON lines, each with its place in the file; blank lines are skipped."""
  for number, text in _lines(_utf8_chunks(path), path):
    where = f'{path}:{number}'
    if isinstance(text, InputError):
      yield where, text
    elif text and not text.isspace():
      row, text = _json_row(text, where), ''
      yield where, row


def _json_row(text: str, where: str) -> dict[str, Any] | InputError:
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as e:
    return InputError(f'{where}: not valid JSON ({e}); every line must be one JSON object')
  if isinstance(row, dict):
    return row
  return InputError(f'{where}: a JSON {type(row).__name__}; every line must be one JSON object')


def _parquet_rows(path: Path, fields: Mapping[str, str]) -> Iterator[Found]:
  """Yield some fields of the rows of a Parquet file, each row with its place in the file."""
  import pyarrow as arrow
  import pyarrow.parquet as parquet

  _require_regular(path)
  try:
    with parquet.ParquetFile(path) as file:
      names, number, columns = file.schema_arrow.names, 0, sorted(set(fields.values()))
      missing = [(s, f) for s, f in fields.items() if f not in names]
      if missing:
        (setting, field), *_ = missing
        fault = _missing(field, names, str(path), setting)
        yield from ((str(path), fault) for _ in range(file.metadata.num_rows))
        return
      for group in range(file.num_row_groups):
        size = _rows_at_once(file.metadata.row_group(group), columns)
        for batch in file.iter_batches(size, [group], columns):
          rows, batch = batch.to_pylist()[::-1], None
          while rows:  # a large row is not held here while it is used
            number += 1
            yield f'{path} row {number}', rows.pop()
  except arrow.ArrowException as e:
    raise InputError(f'{path}: cannot be read as Parquet ({str(e).splitlines()[0]})') from None


def _rows_at_once(group: Any, columns: list[str]) -> int:
  """Return how many rows of a row group have about `PARQUET_BYTES` in some columns."""
  every = (group.column(i) for i in range(group.num_columns))
  size = sum(c.total_uncompressed_size for c in every if c.path_in_schema in columns)
  return max(1, min(PARQUET_ROWS, PARQUET_BYTES * group.num_rows // max(size, 1)))


# ---- bytes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
  """Turn errors of the operating system and of decompression into an `InputError` that names the
  file."""
  try:
    yield
  except (OSError, EOFError, zlib.error) as e:
    raise InputError(f'{path}: cannot be read ({getattr(e, "strerror", None) or e})') from None


def _require_regular(path: Path) -> None:
  # To open a named pipe would wait for ever.
  if not stat.S_ISREG(path.stat().st_mode):
    raise InputError(f'{path}: cannot be read (it is no regular file)')


def _chunks(path: Path) -> Iterator[bytes]:
  """Yield the bytes of a file, decompressed."""
  _require_regular(path)
  suffix = path.suffix.lower()
  if suffix in ('.gz', '.zst') and not path.stat().st_size:
    raise _cut_off(path)
  if suffix == '.zst':
    with open(path, 'rb') as compressed:
      yield from _zstandard(path, compressed)
    return
  with gzip.open(path, 'rb') if suffix == '.gz' else open(path, 'rb') as file:
    while chunk := file.read(CHUNK_BYTES):
      yield chunk


def _zstandard(path: Path, file: BinaryIO) -> Iterator[bytes]:
  # The stream reader of the library ends silently where a frame is cut off; the frame object knows
  # whether it reached its end.
  import zstandard

  frame: Any = None
  while data := file.read(ZSTANDARD_BYTES):
    while data:
      if frame is None:
        frame = zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW).decompressobj()
      try:
        if chunk := frame.decompress(data):
          yield chunk
      except zstandard.ZstdError as e:
        raise InputError(f'{path}: cannot be read ({e})') from None
      data = frame.unused_data if frame.eof else b''
      frame = None if frame.eof else frame
  if frame is not None:
    raise _cut_off(path)


def _cut_off(path: Path) -> InputError:
  return InputError(f'{path}: cannot be read (the compressed data is cut off)')


def _utf8_chunks(path: Path) -> Iterator[bytes]:
  """Yield the bytes of a file in UTF-8, without a byte order mark. Of UTF-8 itself it is not
  checked here."""
  chunks, head = _chunks(path), b''
  while len(head) < 4 and (chunk := next(chunks, b'')):
    head += chunk
  mark, encoding, name = next((m for m in MARKS if head.startswith(m[0])), (b'', None, ''))

  def rest() -> Iterator[bytes]:
    if body := head[len(mark) :]:
      yield body
    yield from chunks

  if encoding is None:
    yield from rest()
  else:
    yield from (t.encode() for t in _decoded(rest(), str(path), encoding, name, len(mark)))


def _text_chunks(path: Path) -> Iterator[bytes]:
  offset = 0
  for chunk in _utf8_chunks(path):
    if b'\0' in chunk:
      raise InputError(
        f'{path}: not text (a zero byte at offset {offset + chunk.index(0)}); accepted: {ACCEPTED}'
      )
    offset += len(chunk)
    yield chunk


def _decoded(
  chunks: Iterator[bytes], where: str, encoding: str, name: str, offset: int = 0
) -> Iterator[str]:
  """Decode bytes, the first of them at `offset` of the file."""
  decoder = codecs.getincrementaldecoder(encoding)()
  for chunk, final in _with_end(chunks):
    held = len(decoder.getstate()[0])
    try:
      if text := decoder.decode(chunk, final):
        yield text
    except UnicodeDecodeError as e:
      raise _invalid(where, name, offset - held + e.start, e.object[e.start]) from None
    offset += len(chunk)


def _with_end(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
  yield from ((chunk, False) for chunk in chunks)
  yield b'', True


def _invalid(where: str, name: str, offset: int, byte: int) -> InputError:
  return InputError(f'{where}: not valid {name} at byte offset {offset} (byte 0x{byte:02x})')


def _lines(chunks: Iterator[bytes], path: Path) -> Iterator[tuple[int, str | InputError]]:
  """Yield the lines of UTF-8 without their ends, each with its number; of one that is not UTF-8 the
  fault."""
  # Not by `enumerate`, which holds what it gave last.
  numbers, start = itertools.count(1), 0
  for line in _split(chunks):
    number = next(numbers)
    try:
      found: list[str | InputError] = [line.decode().removesuffix('\r')]
    except UnicodeDecodeError as e:
      found = [_invalid(f'{path}:{number}', 'UTF-8', start + e.start, line[e.start])]
    start += len(line) + 1
    line = b''  # a long line is not held here while it is used
    yield number, found.pop()


def _split(chunks: Iterator[bytes]) -> Iterator[bytes]:
  # The parts of a long line are joined once, so that its time is linear in its length.
  parts: list[bytes] = []
  for chunk in chunks:
    first, *others = chunk.split(b'\n')
    parts.append(first)
    if others:
      *complete, rest = others
      ready = [*reversed(complete), b''.join(parts)]
      parts = [rest]
      while ready:
        yield ready.pop()
  if any(parts):
    ready, parts = [b''.join(parts)], []
    yield ready.pop()
