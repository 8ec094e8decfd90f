"""Corpora of text: what they read, and what they say where they cannot."""

import gzip
import json
import os

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from jaxformer.config import InputError, from_json, to_json
from jaxformer.data import Files, Mixture, PydocTopics, StandardLibrary, Tsv

pytestmark = pytest.mark.quick
LINES = b'{"text": "one"}\n\n{"text": "zwei \\u00fc", "id": 3}\n{"text": ""}'


def texts(path, **fields):
  return [row.texts[0] for row in Files(path=str(path), **fields).rows()]


@pytest.mark.parametrize(
  'name', ['a.txt', 'a.md', 'a', 'a.weird', 'a.txt.gz', 'a.txt.zst', 'a.py.gz']
)
def test_text_file_is_one_exact_document(tmp_path, name):
  data = 'first\r\nsecond é\n\n'.encode()
  compress = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}.get(
    os.path.splitext(name)[1], bytes
  )
  (tmp_path / name).write_bytes(compress(data))
  assert texts(tmp_path / name) == [data.decode()]


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.jsonl.gz', 'a.jsonl.zst', 'a.JSONL'])
def test_json_line_is_a_document(tmp_path, name):
  compress = {'.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}.get(
    os.path.splitext(name)[1], bytes
  )
  (tmp_path / name).write_bytes(compress(LINES))
  assert texts(tmp_path / name) == ['one', 'zwei ü', '']


def test_lines_longer_than_a_chunk_and_several_zstandard_frames(tmp_path):
  long = 'x' * 3_000_000
  rows = [json.dumps({'text': t}).encode() + b'\n' for t in (long, 'short', long)]
  compress = zstandard.ZstdCompressor().compress
  (tmp_path / 'a.jsonl.zst').write_bytes(b''.join(compress(r) for r in rows))
  assert texts(tmp_path / 'a.jsonl.zst') == [long, 'short', long]


def test_parquet_in_row_groups(tmp_path):
  table = arrow.table({'body': [f'row {i}' for i in range(5000)], 'n': list(range(5000))})
  parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=700)
  assert texts(tmp_path / 'a.parquet', text_field='body') == [f'row {i}' for i in range(5000)]


def test_folder_and_pattern_are_sorted_and_skip_hidden_files(tmp_path):
  for name in ('b.txt', 'sub/a.txt', 'sub/c.md', '.hidden/x.txt', '.DS_Store'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
  assert texts(tmp_path) == ['b.txt', 'sub/a.txt', 'sub/c.md']
  assert texts(tmp_path / '**' / '*.txt') == ['b.txt', 'sub/a.txt']
  assert list(Files(path=str(tmp_path)).files()) == ['b.txt', 'sub/a.txt', 'sub/c.md']


def truncated(data: bytes) -> bytes:
  return data[: len(data) // 2]


NOISE = os.urandom(4000).hex().encode()
BAD_FILES = {
  'nul.bin': (b'abc\0def', r'nul\.bin: not text \(a zero byte at offset 3\); accepted: text'),
  'latin.txt': (b'caf\xe9 au lait', r'latin\.txt: not valid UTF-8 at byte offset 3 \(byte 0xe9\)'),
  'bad.jsonl': (b'{"text": "a"}\n{"text": ', r'bad\.jsonl:2: not valid JSON'),
  'list.jsonl': (b'["a"]\n', r'list\.jsonl:1: a JSON list; every line must be one JSON object'),
  'field.jsonl': (
    b'{"body": "a", "id": 1}\n',
    r"field\.jsonl:1: no field 'text' \(text_field\); fields there: body, id",
  ),
  'number.jsonl': (b'{"text": 3}\n', r"number\.jsonl:1: field 'text' holds a int"),
  'latin.jsonl': (
    b'{"text": "a"}\n{"text": "\xe9"}\n',
    r'latin\.jsonl:2: not valid UTF-8 at byte offset 24',
  ),
  'half.jsonl': (
    b'{"text": "\\ud800"}\n',
    r"half\.jsonl:1: field 'text' holds half a surrogate pair",
  ),
  'cut.txt.gz': (truncated(gzip.compress(NOISE)), r'cut\.txt\.gz: cannot be read'),
  'cut.txt.zst': (
    truncated(zstandard.ZstdCompressor().compress(NOISE)),
    r'cut\.txt\.zst: .* \(the compressed data is cut off',
  ),
  'no.txt.gz': (b'plain text', r'no\.txt\.gz: cannot be read'),
  'no.txt.zst': (b'plain text', r'no\.txt\.zst: cannot be read'),
  'no.parquet': (b'plain text', r'no\.parquet: cannot be read as Parquet'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files_name_the_place(tmp_path, name):
  data, message = BAD_FILES[name]
  (tmp_path / name).write_bytes(data)
  with pytest.raises(InputError, match=message) as error:
    texts(tmp_path / name)
  assert '\n' not in str(error.value)


def test_parquet_without_the_field_names_those_there(tmp_path):
  parquet.write_table(arrow.table({'body': ['a'], 'id': [1]}), tmp_path / 'a.parquet')
  with pytest.raises(InputError, match=r"no field 'text' \(text_field\); fields there: body, id"):
    texts(tmp_path / 'a.parquet')
  with pytest.raises(InputError, match="row 1: field 'id' holds a int"):
    texts(tmp_path / 'a.parquet', text_field='id')


def test_bad_paths(tmp_path):
  with pytest.raises(InputError, match=r"Files\.path = '.*nothing': no such file or folder"):
    texts(tmp_path / 'nothing')
  with pytest.raises(InputError, match='no file matches the pattern'):
    texts(tmp_path / '*.nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(InputError, match='the folder holds no files'):
    texts(tmp_path / 'empty')


def test_unreadable_file(tmp_path, monkeypatch):
  path = tmp_path / 'secret.txt'
  path.write_text('x')
  os.chmod(path, 0)

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr('builtins.open', refuse)  # permissions do not bind the superuser
  with pytest.raises(InputError, match=r'secret\.txt: cannot be read \(Permission denied\)'):
    texts(path)
  with pytest.raises(InputError, match=r'secret\.txt: cannot be read \(Permission denied\)'):
    Files(path=str(path)).fingerprint()


def test_fingerprint_follows_content_names_and_field(tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  first = Files(path=str(tmp_path)).fingerprint()
  assert Files(path=str(tmp_path)).fingerprint() == first
  (tmp_path / 'a.txt').write_text('two')
  second = Files(path=str(tmp_path)).fingerprint()
  (tmp_path / 'b.txt').write_text('two')
  third = Files(path=str(tmp_path)).fingerprint()
  assert (
    len({first, second, third, Files(path=str(tmp_path), text_field='body').fingerprint()}) == 4
  )


def test_hashes_of_large_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch, cache):
  from jaxformer.data import cache_folder

  monkeypatch.setattr(cache_folder, 'RACY_SECONDS', -1.0)
  path, other = tmp_path / 'large.txt', tmp_path / 'other.txt'
  path.write_bytes(b'a' * (cache_folder.MEMO_BYTES + 1))
  other.write_bytes(b'b' * (cache_folder.MEMO_BYTES + 1))
  for p in (path, other):
    os.utime(p, (1e9, 1e9))
  source = Files(path=str(path))
  first = source.fingerprint(cache)
  with monkeypatch.context() as m:
    m.setattr('builtins.open', None)  # so that hashing again would fail
    assert source.fingerprint(cache) == first
  os.replace(other, path)  # of the same size and modification time
  assert source.fingerprint(cache) != first


def test_the_same_content_elsewhere_has_the_same_fingerprint(tmp_path):
  for folder in ('one', 'two'):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'a.txt').write_text('text')
  assert (
    Files(path=str(tmp_path / 'one')).fingerprint()
    == Files(path=str(tmp_path / 'two')).fingerprint()
  )


def test_standard_library_is_there_and_limited_deterministically():
  small = StandardLibrary(max_bytes=200_000)
  assert list(small.rows()) == list(small.rows())
  assert 190_000 < sum(len(row.texts[0].encode()) for row in small.rows()) <= 200_000
  names = set(StandardLibrary(max_bytes=400_000).files())
  assert set(small.files()) <= names
  assert list(small.files()) == sorted(small.files())
  assert not any('test' in n.split('/') or 'site-packages' in n for n in names)
  manifest = StandardLibrary(max_bytes=200_000).manifest()
  assert manifest['bytes'] == 200_000
  assert (
    manifest['sha256']
    == StandardLibrary(max_bytes=200_000).fingerprint()
    != StandardLibrary().fingerprint()
  )
  with pytest.raises(InputError, match='max_bytes = 0'):
    StandardLibrary(max_bytes=0)


def test_topics_are_prose():
  rows = list(PydocTopics().rows())
  assert len(rows) > 50
  assert sum(len(row.texts[0]) for row in rows) > 300_000


def test_manifests_are_json(tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  source = Mixture(corpora=(Files(path=str(tmp_path)), PydocTopics()), weights=(2.0, 1.0))
  manifest = json.loads(json.dumps(source.manifest()))
  assert manifest['parts'][0]['corpus']['files'][0]['name'] == 'a.txt'
  assert manifest['parts'][0]['corpus']['bytes'] == 4
  assert from_json(to_json(source)) == source


def test_mixture_of_mixtures_or_bad_weights():
  topics = PydocTopics()
  for corpora, weights, message in (
    ((Mixture(corpora=(topics,)),), None, 'corpora other than mixtures'),
    ((Tsv(path='x'),), None, 'corpora of one text per row'),
    ((), None, '1 to 1024 corpora'),
    ((topics,), (0.0,), r'Mixture\.weights = \(0\.0,\): must be a positive number per corpus'),
    ((topics,), (float('inf'),), 'must be a finite number'),
    ((topics,), (1.0, 2.0), 'a positive number per corpus'),
  ):
    with pytest.raises(InputError, match=message):
      Mixture(corpora=corpora, weights=weights)
  assert Mixture(corpora=(topics, topics)).part_weights() == (1.0, 1.0)
