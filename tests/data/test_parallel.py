"""Parallel corpora: every format gives the same pairs, and what is wrong is said with its place."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxformer.config import InputError, from_json, to_json
from jaxformer.data import ByDocument, JsonLines, Pair, Parquet, Tsv, TwoFiles
from jaxformer.data.pair_cache import divide_pairs, training_texts

pytestmark = pytest.mark.quick
PAIRS = [
  Pair('one two', 'uno dos', 'a'),
  Pair('thrée', 'tres', 'a'),
  Pair('four "4"', 'cuatro', 'b'),
  Pair('five', 'cinco', 'c'),
]


@pytest.fixture
def corpora(tmp_path):
  (tmp_path / 'a.tsv').write_text(
    ''.join('\t'.join((p.document, p.target, p.source)) + '\n' for p in PAIRS)
  )
  rows = [{'en': p.source, 'es': p.target, 'book': p.document, 'n': 1} for p in PAIRS]
  with gzip.open(tmp_path / 'a.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps(r) + '\n' for r in rows)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  (tmp_path / 'a.en').write_bytes('\ufeff'.encode() + '\r\n'.join(p.source for p in PAIRS).encode())
  (tmp_path / 'a.es').write_text('\n'.join(p.target for p in PAIRS) + '\n')
  fields = {'source_field': 'en', 'target_field': 'es', 'document_field': 'book'}
  return {
    'tsv': Tsv(path=str(tmp_path / 'a.tsv'), source_column=3, target_column=2, document_column=1),
    'jsonl': JsonLines(path=str(tmp_path / 'a.jsonl.gz'), **fields),
    'parquet': Parquet(path=str(tmp_path / 'a.parquet'), **fields),
    'files': TwoFiles(source_path=str(tmp_path / 'a.en'), target_path=str(tmp_path / 'a.es')),
  }


@pytest.mark.parametrize('name', ['tsv', 'jsonl', 'parquet', 'files'])
def test_every_format_gives_the_same_pairs(corpora, name):
  corpus = corpora[name]
  want = [p._replace(document='') for p in PAIRS] if name == 'files' else PAIRS
  assert list(corpus.pairs()) == list(corpus.pairs()) == want
  assert from_json(to_json(corpus)) == corpus
  manifest = corpus.manifest()
  assert manifest['type'] == corpus.tag
  assert manifest['sha256'] == corpus.fingerprint()
  assert all(len(f['sha256']) == 64 and f['bytes'] > 0 for f in manifest['files'])


def test_fingerprints_follow_content_and_columns_but_not_paths(corpora, tmp_path):
  tsv = corpora['tsv']
  (tmp_path / 'copy.tsv').write_bytes((tmp_path / 'a.tsv').read_bytes())
  (tmp_path / 'more.tsv').write_bytes((tmp_path / 'a.tsv').read_bytes() + b'd\td\td\n')
  assert tsv.replace(path=str(tmp_path / 'copy.tsv')).fingerprint() == tsv.fingerprint()
  more, bare, swapped = (
    {'path': str(tmp_path / 'more.tsv')},
    {'document_column': None},
    {'source_column': 2, 'target_column': 3},
  )
  others = [tsv.replace(**changes) for changes in (more, bare, swapped)]
  assert len({c.fingerprint() for c in [tsv, *others]}) == 4


@pytest.mark.parametrize(
  ('kind', 'content', 'fields', 'message'),
  [
    (Tsv, 'a\tb\nc\n', {}, r'x:2: 1 columns between tabs; column 2 is asked for'),
    (Tsv, 'a\tb\n', {'document_column': 3}, r'x:1: 2 columns between tabs; column 3'),
    (
      JsonLines,
      '{"source": "a", "target": "b"}\n{"source": "a", "es": "b"}\n',
      {},
      r"x:2: no field 'target' \(target_field\); fields there: source, es",
    ),
    (
      JsonLines,
      '{"source": "a", "target": 3}\n',
      {},
      r"x:1: field 'target' holds a int; target_field must name",
    ),
    (
      JsonLines,
      '{"source": "a", "target": "b"}\n',
      {'document_field': 'book'},
      r"no field 'book' \(document_field\)",
    ),
    (JsonLines, '["a", "b"]\n', {}, r'x:1: a JSON list'),
    (Parquet, 'PAR', {}, r'x: cannot be read as Parquet'),
  ],
)
def test_faulty_files_are_refused_with_the_place(tmp_path, kind, content, fields, message):
  (tmp_path / 'x').write_text(content)
  with pytest.raises(InputError, match=message):
    list(kind(path=str(tmp_path / 'x'), **fields).pairs())


def test_a_parquet_file_without_the_column(corpora):
  with pytest.raises(
    InputError, match=r"no field 'de' \(target_field\); fields there: en, es, book, n"
  ):
    list(corpora['parquet'].replace(target_field='de').pairs())


@pytest.mark.parametrize('longer', ['source', 'target'])
def test_files_that_are_not_aligned(tmp_path, longer):
  for side in ('source', 'target'):
    (tmp_path / side).write_text('a\nb\n' + 'c\nd\ne\n' * (side == longer))
  corpus = TwoFiles(source_path=str(tmp_path / 'source'), target_path=str(tmp_path / 'target'))
  with pytest.raises(InputError, match=rf'ends after 2 lines and .*{longer} has 5: not aligned'):
    list(corpus.pairs())


def test_settings_that_make_no_sense():
  for make, message in (
    (lambda: Tsv(path='a', source_column=2), 'target_column = 2'),
    (lambda: Tsv(path='a', document_column=0), 'document_column = 0'),
    (lambda: JsonLines(path='a', target_field='source'), 'another than source_field'),
    (
      lambda: list(TwoFiles(source_path='gone', target_path='gone').pairs()),
      "source_path = 'gone': must be a file that exists",
    ),
  ):
    with pytest.raises(InputError, match=message):
      make()


# ---- the split ---------------------------------------------------------------------------------


def corpus_of(tmp_path, rows):
  (tmp_path / 'c.tsv').write_text(''.join('\t'.join(r) + '\n' for r in rows))
  return Tsv(path=str(tmp_path / 'c.tsv'), document_column=3)


def test_documents_stay_together_and_blank_pairs_are_on_no_side(tmp_path):
  rows = [(f's{i}', f't{i}' if i % 10 else ' ', f'd{i // 5}') for i in range(300)]
  corpus = corpus_of(tmp_path, rows)
  placed = list(divide_pairs(corpus, ByDocument(fraction=0.3)))
  assert [p for _, p in placed] == [Pair(*r) for r in rows]
  assert {p.source for side, p in placed if side is None} == {f's{i}' for i in range(0, 300, 10)}
  sides = {}
  for side, pair in placed:
    if side is not None:
      sides.setdefault(pair.document, set()).add(side)
  assert all(len(s) == 1 for s in sides.values())
  held_out = sum(s == {'validation'} for s in sides.values())
  assert 8 <= held_out <= 28  # 18 of 60 expected, three standard deviations
  texts = list(training_texts(corpus, ByDocument(fraction=0.3), source=True, target=True))
  assert texts == [t for side, p in placed if side == 'train' for t in (p.source, p.target)]


def test_without_documents_the_same_source_is_on_one_side(tmp_path):
  corpus = corpus_of(tmp_path, [(f's{i % 20}', f't{i}', 'd') for i in range(200)]).replace(
    document_column=None
  )
  sides = {}
  for side, pair in divide_pairs(corpus, ByDocument(fraction=0.5)):
    sides.setdefault(pair.source, set()).add(side)
  assert all(len(s) == 1 for s in sides.values())
  assert set.union(*sides.values()) == {'train', 'validation'}


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([(' ', 'a', 'd')], 'holds no pair of texts'),
    ([('a', 'b', 'd'), ('c', 'd', 'd')], 'all pairs are of one document'),
  ],
)
def test_corpora_that_cannot_be_divided(tmp_path, rows, message):
  with pytest.raises(InputError, match=message):
    list(divide_pairs(corpus_of(tmp_path, rows), ByDocument()))
