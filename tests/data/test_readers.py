"""What is in files: encodings, line ends, compression, rows that cannot be used, sizes."""

import codecs
import gzip
import json
import os
import tracemalloc

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from jaxformer.config import InputError
from jaxformer.data import ByPosition, Files, Pairs, Records, Text, Tsv, TwoFiles, open_data
from jaxformer.data import readers as data_readers

pytestmark = pytest.mark.quick
ENCODINGS = {
  'utf-8': codecs.BOM_UTF8,
  'utf-16-le': codecs.BOM_UTF16_LE,
  'utf-16-be': codecs.BOM_UTF16_BE,
  'utf-32-le': codecs.BOM_UTF32_LE,
  'utf-32-be': codecs.BOM_UTF32_BE,
}


def texts(path, **fields) -> list[str]:
  """The rows, with the parts of long ones joined."""
  found, begins = [], True
  for row in Files(path=str(path), **fields).rows():
    if row.problem:
      continue
    found += [row.texts[0]] if begins else [found.pop() + row.texts[0]]
    begins = row.ends
  return found


# ---- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_byte_order_marks_choose_the_encoding_and_are_left_out(tmp_path, encoding, suffix):
  def write(name, text):
    data = ENCODINGS[encoding] + text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if suffix else data)
    return tmp_path / name

  assert texts(write('a.txt' + suffix, 'öne\r\ntwo 😀')) == ['öne\r\ntwo 😀']
  rows = '{"text": "öne"}\n{"text": "😀"}\n'
  assert texts(write('a.jsonl' + suffix, rows)) == ['öne', '😀']
  tsv = Tsv(path=str(write('a.tsv' + suffix, 'öne\tzwei\r\ndrei\tvier\n')))
  assert [r.texts for r in tsv.rows()] == [('öne', 'zwei'), ('drei', 'vier')]


def test_a_mark_at_the_start_of_a_text_within_rows_is_left_out(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "\ufeffone \ufeff"}\n{"text": "\\ufefftwo"}\n')
  parquet.write_table(arrow.table({'text': ['\ufeffone']}), tmp_path / 'b.parquet')
  (tmp_path / 'c.tsv').write_text('\ufeffone\t\ufefftwo\n')
  assert texts(tmp_path / 'a.jsonl') == ['one \ufeff', 'two']
  assert texts(tmp_path / 'b.parquet') == ['one']
  assert [r.texts for r in Tsv(path=str(tmp_path / 'c.tsv')).rows()] == [('one', 'two')]


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'abc\xff', r'not valid UTF-8 at byte offset 3 \(byte 0xff\)'),
    (b'x' * (1 << 20) + b'\xe9', r'not valid UTF-8 at byte offset 1048576'),
    (b'x' * ((1 << 20) - 1) + b'\xc3', r'not valid UTF-8 at byte offset 1048575'),
    (codecs.BOM_UTF16_LE + 'ab'.encode('utf-16-le') + b'\x00\xdc', r'not valid UTF-16 .* offset 6'),
    (codecs.BOM_UTF16_LE + b'a', r'not valid UTF-16 .* offset 2'),
    (
      'ab'.encode('utf-16-le'),
      r'not text \(a zero byte at offset 1\); accepted: .*byte order mark',
    ),
    (b'x' * 3_000_000 + b'\0', r'not text \(a zero byte at offset 3000000\)'),
  ],
)
def test_what_is_no_text_is_named_with_its_place(tmp_path, data, message):
  (tmp_path / 'a.txt').write_bytes(data)
  with pytest.raises(InputError, match=message):
    texts(tmp_path / 'a.txt')


def test_characters_across_chunks_and_empty_files(tmp_path, monkeypatch):
  monkeypatch.setattr(data_readers, 'CHUNK_BYTES', 3)
  (tmp_path / 'a.txt').write_text('aé日😀' * 9)
  (tmp_path / 'b.txt').write_bytes(codecs.BOM_UTF16_LE + ('aé日😀' * 9).encode('utf-16-le'))
  (tmp_path / 'c.txt').write_text('')
  (tmp_path / 'd.txt').write_bytes(codecs.BOM_UTF8)
  (tmp_path / 'e.jsonl').write_text('')
  assert texts(tmp_path) == ['aé日😀' * 9, 'aé日😀' * 9, '', '']


# ---- lines -------------------------------------------------------------------------------------


def test_lines_end_in_lf_or_crlf(tmp_path):
  (tmp_path / 'a').write_bytes(b'one\r\ntwo\n\nthree')
  (tmp_path / 'b').write_bytes(b'1\n2\r\n3\n4\n')
  pairs = TwoFiles(source_path=str(tmp_path / 'a'), target_path=str(tmp_path / 'b'))
  assert [r.texts for r in pairs.rows()] == [('one', '1'), ('two', '2'), ('', '3'), ('three', '4')]


def test_lines_that_end_in_cr_alone_are_an_error_where_lines_matter(tmp_path):
  (tmp_path / 'a').write_bytes(b'one\ttwo\rthree\tfour\r')
  assert texts(tmp_path / 'a') == ['one\ttwo\rthree\tfour\r']  # a text is exact
  with pytest.raises(InputError, match=r'a: its lines end in CR alone; accepted: LF, or CR LF'):
    list(Tsv(path=str(tmp_path / 'a')).rows())
  with pytest.raises(InputError, match='CR alone'):
    list(TwoFiles(source_path=str(tmp_path / 'a'), target_path=str(tmp_path / 'a')).rows())


def test_a_long_line_is_joined_once(monkeypatch):
  """Its time is linear in its length: no part of it is copied again for the next."""
  chunks = [b'x' * 1000] * 500 + [b'y\nz', b'z\n']
  lines = list(data_readers._split(iter(chunks)))
  assert lines == [b'x' * 500_000 + b'y', b'zz']
  tracemalloc.start()
  list(data_readers._split(iter(chunks)))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1_200_000


# ---- compression -------------------------------------------------------------------------------

LONG = 'word ' * 500_000


def streamed(data: bytes, window: int) -> bytes:
  """Compress without the size of the content, as from a pipe, with a window of 2^window bytes."""
  parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window)
  compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
  return compressor.compress(data) + compressor.flush()


SKIPPABLE = b'\x50\x2a\x4d\x18\x04\x00\x00\x00skip'
COMPRESSED = {
  'long window.zst': lambda data: streamed(data, 31),
  'frames.zst': lambda data: streamed(data[:99], 20) + SKIPPABLE + streamed(data[99:], 10),
  'members.gz': lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
}


@pytest.mark.parametrize('name', COMPRESSED)
def test_compressed_files(tmp_path, name):
  (tmp_path / f'a.txt.{name[-3:].strip(".")}').write_bytes(COMPRESSED[name](LONG.encode()))
  assert texts(tmp_path) == [LONG]


def test_a_small_file_of_much_text_comes_in_parts(tmp_path):
  """A kilobyte can stand for megabytes."""
  (tmp_path / 'a.txt.zst').write_bytes(streamed(b'x' * 64_000_000, 20))
  parts = [len(row.texts[0]) for row in Files(path=str(tmp_path)).rows()]
  assert sum(parts) == 64_000_000
  assert max(parts) <= 16 << 20


@pytest.mark.parametrize('suffix', ['txt', 'jsonl'])
@pytest.mark.parametrize('compression', ['gz', 'zst'])
@pytest.mark.parametrize('left', [0, 3, 0.5, -1])
def test_cut_off_files_are_one_line(tmp_path, suffix, compression, left):
  data = os.urandom(3000).hex().encode()
  data = gzip.compress(data) if compression == 'gz' else zstandard.ZstdCompressor().compress(data)
  path = tmp_path / f'a.{suffix}.{compression}'
  path.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
  with pytest.raises(InputError, match=rf'a\.{suffix}\.{compression}: cannot be read \(') as error:
    texts(path)
  assert '\n' not in str(error.value)


# ---- rows that cannot be used --------------------------------------------------------------------

GOOD = [{'text': f'document {i} ' * 9, 'to': f'{i}'} for i in range(60)]
BAD_LINES = [
  '{"text": null, "to": "x"}',
  '{"to": "x"}',
  '{"text": 3, "to": "x"}',
  '{"text": "\\ud800", "to": "x"}',
  '["text"]',
  '{"text": ',
  '[' * 100_000,
  b'{"text": "\xff"}',
]


@pytest.fixture
def rows(tmp_path):
  """A file of JSON lines with bad rows among good ones."""
  lines = [json.dumps(r).encode() for r in GOOD]
  for i, line in enumerate(BAD_LINES):
    lines.insert(7 * i + 3, line if isinstance(line, bytes) else line.encode())
  (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(lines))
  return str(tmp_path / 'a.jsonl')


def test_bad_rows_are_an_error_that_names_the_first_and_the_setting(rows):
  message = r"a\.jsonl:4: field 'text' is null.*\(Files\.on_bad_row = skip leaves such rows out\)"
  with pytest.raises(InputError, match=message):
    open_data(Text(corpus=Files(path=rows), sequence_length=16))


def test_skipped_rows_are_counted_and_named(rows):
  assert texts(rows, on_bad_row='skip') == [r['text'] for r in GOOD]
  lines = []
  data = Text(corpus=Files(path=rows, on_bad_row='skip'), sequence_length=16)
  for built in (True, False):
    lines.clear()
    found = open_data(data, log=lines.append)
    assert found.manifest['skipped'] == len(BAD_LINES)
    assert any('(8 bad rows skipped)' in line for line in [found.size, *found.info()])
    assert bool(lines) == built
    if built:
      assert any('8 rows skipped, the first: ' in s and 'a.jsonl:4: field' in s for s in lines)


def test_bad_rows_of_pairs(rows):
  lengths = {'source_lengths': (512,), 'target_lengths': (512,)}
  pairs = Records(path=rows, source_field='text', target_field='to')
  with pytest.raises(InputError, match=r'a\.jsonl:4.*Records\.on_bad_row = skip'):
    open_data(Pairs(corpus=pairs, **lengths))
  found = open_data(Pairs(corpus=pairs.replace(on_bad_row='skip'), **lengths))
  assert found.manifest['skipped'] == len(BAD_LINES)
  assert '(8 bad rows skipped)' in found.size


def test_bad_lines_of_columns(tmp_path):
  (tmp_path / 'a.tsv').write_text('a\tb\nc\n\nd\te\tf\n')
  tsv = Tsv(path=str(tmp_path / 'a.tsv'))
  with pytest.raises(InputError, match=r'a\.tsv:2: 1 columns; must have 2.*Tsv\.on_bad_row = skip'):
    list(tsv.rows())
  found = list(tsv.replace(on_bad_row='skip').rows())
  assert [r.texts for r in found if not r.problem] == [('a', 'b'), ('d', 'e')]
  assert [r.problem for r in found if r.problem] == [f'{tmp_path}/a.tsv:2: 1 columns; must have 2']


def test_null_rows_and_missing_columns_of_parquet(tmp_path):
  parquet.write_table(arrow.table({'text': ['a', None, 'b']}), tmp_path / 'a.parquet')
  parquet.write_table(arrow.table({'body': ['c', 'd']}), tmp_path / 'b.parquet')
  with pytest.raises(InputError, match=r"a\.parquet row 2: field 'text' is null"):
    texts(tmp_path)
  with pytest.raises(InputError, match=r"b\.parquet: no field 'text'.*fields there: body"):
    texts(tmp_path / 'b.parquet')
  found = list(Files(path=str(tmp_path), on_bad_row='skip').rows())
  assert [r.texts for r in found if not r.problem] == [('a',), ('b',)]
  assert sum(bool(r.problem) for r in found) == 3


def test_a_corpus_of_bad_rows_alone_says_so(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"body": "a"}\n' * 3)
  data = Text(corpus=Files(path=f'{tmp_path}/a.jsonl', on_bad_row='skip'), sequence_length=16)
  with pytest.raises(
    InputError, match=r'holds no text; 3 rows were skipped, the first: .*no field'
  ):
    open_data(data)


# ---- long texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize('split', [None, ByPosition()])
def test_a_text_in_parts_is_the_same_data(tmp_path, monkeypatch, cache, split):
  """The parts in which a long text is read change neither its side nor its tokens."""
  for i in range(12):
    (tmp_path / f'{i}.txt').write_text(f'{i} some words, é日\n' * 400)
  fields = {} if split is None else {'split': split}
  data = Text(corpus=Files(path=str(tmp_path / '*.txt')), sequence_length=16, **fields)
  whole = open_data(data).identity
  monkeypatch.setattr(data_readers, 'CHUNK_BYTES', 500)
  monkeypatch.setattr(data_readers, 'PART_CHARACTERS', 1000)
  monkeypatch.setattr('jaxformer.data.pieces.SIZE', 700)
  assert sum(1 for _ in data.corpus.rows()) > 50
  assert open_data(data, cache_dir=cache / 'other').identity == whole


def test_large_rows_of_parquet_are_read_a_few_at_a_time(tmp_path):
  table = arrow.table({'text': [f'{i}' * 200_000 for i in range(9)] * 4, 'n': list(range(36))})
  parquet.write_table(table, tmp_path / 'a.parquet')
  with parquet.ParquetFile(tmp_path / 'a.parquet') as file:
    group = file.metadata.row_group(0)
    # A dictionary holds equal texts once, so what is stored can be less than what is read.
    assert data_readers._rows_at_once(group, ['text']) < 400
    assert data_readers._rows_at_once(group, ['n']) == 1024
  assert texts(tmp_path) == table['text'].to_pylist()
